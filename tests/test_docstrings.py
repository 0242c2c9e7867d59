"""Every public name is documented as its reader needs it: arguments, what comes back, what is
raised, an example that runs, a source."""

import importlib
import inspect
import re

import pytest

import bilevax as bx
from bilevax.base import Algorithm, Bound, Hypergradient

NAMESPACES = (
    "algorithms",
    "attribution",
    "callbacks",
    "checkpoint",
    "data",
    "games",
    "hypergradient",
    "inner",
    "linear",
    "nn",
    "plots",
    "replay",
    "sharding",
    "testing",
)


def public() -> dict[str, object]:
    """Public functions and classes by their qualified names."""
    found = {
        name: getattr(bx, name) for name in bx.__all__ if not inspect.ismodule(getattr(bx, name))
    }
    for space in NAMESPACES:
        module = importlib.import_module(f"bilevax.{space}")
        names = getattr(module, "__all__", None) or [
            n for n, v in vars(module).items() if getattr(v, "__module__", None) == module.__name__
        ]
        found |= {
            f"{space}.{name}": getattr(module, name) for name in names if not name.startswith("_")
        }
    return {
        name: value for name, value in found.items() if callable(value) or inspect.isclass(value)
    }


FUNCTIONS = {name: value for name, value in public().items() if inspect.isfunction(value)}
METHODS = [name for name in FUNCTIONS if name.startswith(("algorithms.", "hypergradient."))]


def arguments(fn) -> list[str]:
    return [name for name in inspect.signature(fn).parameters if name not in ("self", "args")]


@pytest.mark.parametrize("name", list(public()))
def test_summary(name):
    doc = inspect.getdoc(public()[name])
    assert doc, f"{name} has no docstring"
    summary = doc.split("\n\n")[0].strip()
    assert summary.endswith((".", ":", "?")) and len(summary.splitlines()) <= 2, (
        f"{name}: it begins with no sentence of one or two lines"
    )


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_sections(name):
    fn = FUNCTIONS[name]
    doc = inspect.getdoc(fn)
    for argument in arguments(fn):
        assert re.search(rf"^\s+[\w, *]*\b{re.escape(argument)}\b[\w, *]*:", doc, re.MULTILINE), (
            f"{name}: argument {argument!r} is not described"
        )
    assert re.search(r"^Returns:|^Yields:|^Raises:", doc, re.MULTILINE), (
        f"{name} does not say what it returns"
    )
    assert not re.search(r"^(?:Returns|Yields):\n .*:(?: |$)", doc, re.MULTILINE), (
        f"{name}: the page would take what is before the colon of 'Returns' for a type"
    )
    assert ">>>" in doc, f"{name} has no example"
    assert re.search(r"^Examples:\n +>>> ", doc, re.MULTILINE), (
        f"{name}: its example stands in no section Examples, which the page would show as code"
    )
    source = inspect.getsource(fn)
    if re.search(r"^    raise |^        raise ", source, re.MULTILINE):
        assert "Raises:" in doc, f"{name} raises, and does not say so"


@pytest.mark.parametrize("name", METHODS)
def test_methods_name_their_source(name):
    assert re.search(r"(Source|Sources|References?):", inspect.getdoc(FUNCTIONS[name])), (
        f"{name} names no source"
    )


def test_help_of_the_main_call_is_complete():
    doc = inspect.getdoc(bx.solve_bilevel)
    assert all(f"\n  {name}:" in doc for name in inspect.signature(bx.solve_bilevel).parameters)


def test_reprs_show_their_settings():
    method = bx.hypergradient.implicit(bx.linear.cg(maxiter=20))
    assert isinstance(method, Hypergradient) and "maxiter=20" in repr(method)
    algorithm = bx.algorithms.soba(0.1, 0.2)
    assert (
        isinstance(algorithm, Algorithm) and "soba(" in repr(algorithm) and "0.1" in repr(algorithm)
    )
    assert repr(Bound("f", len, a=1)) == "f(a=1)"


def test_namespaces_list_what_is_public():
    for space in ("algorithms", "hypergradient", "inner", "linear"):
        module = importlib.import_module(f"bilevax.{space}")
        assert set(module.__all__) <= set(dir(module))
        assert len(module.__all__) == len(set(module.__all__))


def test_completion_shows_what_is_public():
    for space in (*NAMESPACES, "attribution", "diagnostics", "multilevel", "replay"):
        module = importlib.import_module(f"bilevax.{space}")
        assert sorted(module.__all__) == dir(module)
        assert all(hasattr(module, name) for name in module.__all__)
