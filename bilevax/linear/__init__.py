"""Linear solvers on pytrees, ``(matvec, b, x0) -> (x, LinearInfo)``, made by factories.

| solver | for | matvecs |
|---|---|---|
| `cg` | symmetric positive definite; the default | 1 an iteration |
| `minres` | symmetric, indefinite | 1 an iteration |
| `gmres`, `bicgstab` | anything invertible | 1, 2 an iteration |
| `neumann`, `nystrom` | of fixed cost, approximate; read the residual | as many as terms, columns |
| `ekfac`, `kfac`, `diagonal` | networks: of layers; preconditioners, too | 1, for the residual |
| `gauss_newton` | networks: the Gauss-Newton matrix for the Hessian | those of its solver |
| `cholesky`, `lu` | small problems, references | as many as unknowns |
| `identity` | one-step hypergradients | 1, for the residual |
| `lineax` | any solver of the lineax package | its own |
"""

from bilevax.linear.bicgstab import bicgstab
from bilevax.linear.cg import cg
from bilevax.linear.dense import cholesky, lu
from bilevax.linear.gauss_newton import gauss_newton
from bilevax.linear.gmres import gmres
from bilevax.linear.identity import identity
from bilevax.linear.kronecker import diagonal, ekfac, kfac, layers
from bilevax.linear.lineax import lineax
from bilevax.linear.minres import minres
from bilevax.linear.neumann import neumann
from bilevax.linear.nystrom import nystrom, nystrom_preconditioner
from bilevax.linear.preconditioner import Preconditioner, precondition


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "Preconditioner",
    "bicgstab",
    "cg",
    "cholesky",
    "diagonal",
    "ekfac",
    "gauss_newton",
    "gmres",
    "identity",
    "kfac",
    "layers",
    "lineax",
    "lu",
    "minres",
    "neumann",
    "nystrom",
    "nystrom_preconditioner",
    "precondition",
]
