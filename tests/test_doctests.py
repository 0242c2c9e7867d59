"""Every ``>>>`` example in the package runs and prints what it says."""

import doctest
import importlib
import pkgutil

import pytest

import bilevax
from tests.readers import as_reader

MODULES = [
    "bilevax",
    *sorted(info.name for info in pkgutil.walk_packages(bilevax.__path__, "bilevax.")),
]
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.mark.turns
@pytest.mark.parametrize("name", MODULES)
def test_module(name, tmp_path):
    module = importlib.import_module(name)
    examples = [
        case
        for case in doctest.DocTestFinder(exclude_empty=True).find(module, name)
        if case.examples
    ]
    printed: list[str] = []
    runner = doctest.DocTestRunner(optionflags=OPTIONS, verbose=False)
    with as_reader(tmp_path):
        for case in examples:
            runner.run(case, out=printed.append)
    assert runner.failures == 0, "".join(printed)


def test_examples_are_found():
    """The finder sees the examples at all: an empty search would pass everything above."""
    finder = doctest.DocTestFinder()
    found = [
        case
        for name in MODULES
        for case in finder.find(importlib.import_module(name), name)
        if case.examples
    ]
    assert len(found) >= 10
