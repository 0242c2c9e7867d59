"""The package's form: imports point down and make no circle, what is private stays at home, pieces
are asked and not recognised."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "bilevax"

# From the ground up; what stands on one floor does not import its neighbours.
FLOORS = [
    ["tree", "results"],
    ["_core"],
    ["base"],
    ["_captured", "starts", "functions"],
    ["check"],
    ["linear", "inner", "data", "checkpoint", "tasks", "_estimate"],
    ["_call"],
    ["certificate", "hypergradient", "_traced", "_equations"],
    ["argmin", "root", "sharding"],
    ["_derivative"],
    ["estimate"],
    ["algorithms"],
    ["run"],
    ["solve", "multilevel", "replay"],
    ["plots", "nn", "testing", "callbacks", "games"],
    ["diagnostics", "attribution"],
    ["bilevax", "__main__"],
]
HEIGHT = {name: height for height, names in enumerate(FLOORS) for name in names}


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room(module: str) -> str:
    """The file or folder right under the package that a module belongs to."""
    return module.split(".")[1] if module != "bilevax" else "bilevax"


def imports(module: str) -> list[tuple[str, str]]:
    """What a module imports from the package when it runs, in functions too: pairs of a module and
    a name from it (or "")."""
    found: list[tuple[str, str]] = []

    def visit(node):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if (
                isinstance(child, ast.ImportFrom)
                and (child.module or "").split(".")[0] == "bilevax"
            ):
                for alias in child.names:
                    full = f"{child.module}.{alias.name}"
                    found.append((full, "") if full in MODULES else (child.module, alias.name))
            elif isinstance(child, ast.Import):
                found.extend(
                    (alias.name, "")
                    for alias in child.names
                    if alias.name.split(".")[0] == "bilevax"
                )
            visit(child)

    visit(ast.parse(MODULES[module].read_text()))
    return found


def test_every_room_has_a_floor():
    assert {room(module) for module in MODULES} == set(HEIGHT)


@pytest.mark.parametrize("module", list(MODULES))
def test_imports_point_down(module):
    here = room(module)
    for target, name in imports(module):
        if room(target) != here and not (target == "bilevax" and module == "bilevax.__main__"):
            assert HEIGHT[room(target)] < HEIGHT[here], (
                f"{module} imports {target} {name}, which stands on its own floor or above"
            )


def test_imports_make_no_circle():
    """Also within a room. A package's own names come from its modules, so importing the package
    counts as importing all that it imports."""
    graph = {
        module: {target for target, _ in imports(module) if target != module} for module in MODULES
    }
    done: set[str] = set()

    def walk(module, path):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for target in sorted(graph[module]):
                walk(target, [*path, module])
            done.add(module)

    for module in MODULES:
        walk(module, [])


def test_no_private_name_crosses_a_package():
    """What begins with an underscore is read by its own package alone; `_core` is the library's own
    ground."""
    for module, path in MODULES.items():
        home = module if path.name == "__init__.py" else module.rsplit(".", 1)[0]
        for target, name in imports(module):
            assert not name.startswith("_") or name == "__version__", (
                f"{module} imports {name} from {target}"
            )
            parts = target.split(".")
            for i, part in enumerate(parts):
                owner = ".".join(parts[:i])
                outside = (
                    part.startswith("_")
                    and part != "_core"
                    and not (home == owner or home.startswith(owner + "."))
                )
                assert not outside, f"{module} imports {target}"


# A file each of these folders is one method; what several of them need stands in a file that is
# none.
FAMILIES = ("algorithms", "linear", "inner", "hypergradient")
SHARED = {"bilevax.linear.preconditioner"}
CHOOSES = {"bilevax.algorithms.default"}  # between two of them, by what it is


@pytest.mark.parametrize("folder", FAMILIES)
def test_families_do_not_import_families(folder):
    def family(module):
        """The file, or the folder of several, right under `folder`; None for what is shared, and
        for the folder itself."""
        parts = module.split(".")
        if (
            parts[1:2] != [folder]
            or len(parts) < 3
            or parts[2].startswith("_")
            or parts[2] == "parts"
        ):
            return None
        name = ".".join(parts[:3])
        return None if name in SHARED else name

    for module in MODULES:
        if family(module) is None or module in CHOOSES:
            continue
        others = {family(target) for target, _ in imports(module)} - {None, family(module)}
        assert not others, f"{module} imports {sorted(others)}"


def test_pieces_are_asked():
    """Nothing outside `_core` reads the settings or the name of a piece, or looks which function
    stands in it."""
    recognising = re.compile(
        r"\.settings\b|\.vjp\.name|\.step\.name|\.(?:fn|step|vjp|solve) is "
        r"[a-z_]|isinstance\([\w.]+, (?:base\.)?Bound\)"
    )
    found = [
        f"{module}:{number}: {line.strip()}"
        for module, path in MODULES.items()
        if not module.startswith("bilevax._core")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if recognising.search(line) and "_core.settings import" not in line
    ]
    assert not found, "\n".join(found)


def test_the_path_to_the_linear_solve_is_as_written():
    """docs/contributing.md lists the functions from the call to the linear solve, each with what it
    calls next."""
    page = (ROOT / "docs" / "contributing.md").read_text()
    steps = re.findall(
        r"^\d+\. `(bilevax\.[\w.]+)` (calls|returns) `([\w.]+)`$", page, re.MULTILINE
    )
    files = set()
    for place, how, called in steps:
        parts = place.split(".")
        found = next(i for i in range(len(parts), 0, -1) if ".".join(parts[:i]) in MODULES)
        files.add(".".join(parts[:found]))
        value = importlib.import_module(".".join(parts[:found]))
        for part in parts[found:]:
            value = getattr(value, part)
        assert f"{called}(" in inspect.getsource(value) or (
            how == "returns" and called in inspect.getsource(value)
        ), f"{place}: no {called}"
    assert len(steps) == 7
    assert len(files) == 4


def test_a_file_holds_one_thing():
    long = {
        module: lines
        for module, path in MODULES.items()
        if (lines := len(path.read_text().splitlines())) > 610
    }
    assert not long, long
