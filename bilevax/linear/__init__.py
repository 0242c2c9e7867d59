"""Linear solvers on pytrees, ``(matvec, b, x0) -> (x, LinearInfo)``, made by factories.

| solver | for | matvecs |
|---|---|---|
| `cg` | symmetric positive definite; the default | 1 an iteration |
| `minres` | symmetric, indefinite | 1 an iteration |
| `gmres`, `bicgstab` | anything invertible | 1, 2 an iteration |
| `neumann`, `nystrom` | approximations of fixed cost; read the residual | as many as terms, columns |
| `cholesky`, `lu` | small problems, references | as many as unknowns |
| `identity` | one-step hypergradients | 1, for the residual |
| `lineax` | any solver of the lineax package | its own |
"""

from bilevax.linear.bicgstab import bicgstab as bicgstab
from bilevax.linear.cg import cg as cg
from bilevax.linear.dense import cholesky as cholesky
from bilevax.linear.dense import lu as lu
from bilevax.linear.gmres import gmres as gmres
from bilevax.linear.identity import identity as identity
from bilevax.linear.lineax import lineax as lineax
from bilevax.linear.minres import minres as minres
from bilevax.linear.neumann import neumann as neumann
from bilevax.linear.nystrom import Preconditioner as Preconditioner
from bilevax.linear.nystrom import nystrom as nystrom
from bilevax.linear.nystrom import nystrom_preconditioner as nystrom_preconditioner
from bilevax.linear.nystrom import precondition as precondition
