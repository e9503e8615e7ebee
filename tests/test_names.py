"""No name of a package hides one of its modules: both forms of import find the same."""

import importlib
import pkgutil
import sys

import pytest

import sampler

MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages(sampler.__path__, "sampler.")
    if not info.name.endswith("__main__")
)


@pytest.mark.parametrize("package", sorted({name.rpartition(".")[0] for name in MODULES}))
def test_a_module_is_found_under_its_name(package):
    """`import a.b as x` looks b up in a, where a function of that name would hide it."""
    for name in MODULES:
        parent, _, leaf = name.rpartition(".")
        if parent == package:
            importlib.import_module(name)
            assert getattr(sys.modules[package], leaf) is sys.modules[name], name
