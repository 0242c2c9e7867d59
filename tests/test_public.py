"""The public names and signatures, as they stand in tests/public_names.txt.

A rename keeps the old name with a DeprecationWarning for a minor release; a change of meaning
stands in the changelog with the old line and the new. When a change is meant: ``python -m
tests.test_public`` writes the file anew.
"""

import difflib
import importlib
import inspect
import re
from pathlib import Path

import bilevax as bx

FILE = Path(__file__).with_name("public_names.txt")
SPACES = (
    "algorithms", "attribution", "base", "callbacks", "checkpoint", "data", "diagnostics", "games",
    "hypergradient", "inner", "linear", "multilevel", "nn",
    "plots", "replay", "sharding", "testing",
)  # fmt: skip


def _signature(value) -> str:
    """Parameters and their defaults. Annotations are the type checker's affair, addresses
    nobody's."""
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return ""
    plain = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in signature.parameters.values()
    ]
    text = str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))
    return re.sub(r"<(\w+) ([\w.<>]+) at 0x[0-9a-f]+>", r"<\2>", text)


def _lines() -> list[str]:
    lines = []
    for name in bx.__all__:
        value = getattr(bx, name)
        if not inspect.ismodule(value):
            lines.append(f"{name}{_described(value)}")
    for space in SPACES:
        module = importlib.import_module(f"bilevax.{space}")
        mine = [
            n
            for n, v in vars(module).items()
            if not n.startswith("_") and getattr(v, "__module__", None) == module.__name__
        ]
        names = sorted(getattr(module, "__all__", mine))
        lines += [f"{space}.{name}{_described(getattr(module, name))}" for name in names]
    return lines


def _described(value) -> str:
    if inspect.isclass(value) and issubclass(value, bx.RESULTS):
        return " " + ", ".join(f"{code.name}={code.value}" for code in value)
    if inspect.isclass(value) or inspect.isroutine(value):
        return _signature(value)
    return f" {type(value).__name__}"


def test_public_names_are_as_written():
    was, now = FILE.read_text().splitlines(), _lines()
    assert was == now, "\n".join(
        difflib.unified_diff(was, now, "tests/public_names.txt", "the package", lineterm="", n=0)
    )


if __name__ == "__main__":
    FILE.write_text("\n".join(_lines()) + "\n")
