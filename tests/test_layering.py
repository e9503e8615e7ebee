"""Who may import whom, read from the syntax trees. An arrow points to what may be imported.

    sampler_kernels  <-  types, registry  <-  core  <-  samplers, guidance, rewards  <-  config
                     <-  model_files  <-  runs  <-  workers  <-  engine  <-  pipelines
                     <-  models, stock  <-  training, calibration  <-  loading  <-  cli  <-  ui

docs/how_it_works.md has the whole order.

An import inside a function counts as an import (laziness is about time, not about layers); one
under TYPE_CHECKING does not.
"""

import ast
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLACES = {"sampler": ROOT / "sampler", "sampler_kernels": ROOT / "kernels" / "sampler_kernels"}


@dataclass(frozen=True)
class Import:
    """`module` imports `target`; `early`: when the module itself is imported."""

    module: str
    target: str
    early: bool


def modules():
    """{"sampler.types": path} of everything that is shipped."""
    found = {}
    for package, folder in PLACES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name] = path
    return found


MODULES = modules()


def imports_of(name, text, known=frozenset(MODULES)):
    """The imports of a module's source, `from package import submodule` resolved."""
    found = []

    def visit(node, early):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                visit(child, early)
            return
        if isinstance(node, ast.Import):
            found.extend(Import(name, alias.name, early) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.append(Import(name, inner if inner in known else node.module, early))
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, early and not inside)

    visit(ast.parse(text), True)
    return found


IMPORTS = [i for name, path in MODULES.items() for i in imports_of(name, path.read_text())]


def below(name, *packages):
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def own(name):
    return below(name, "sampler", "sampler_kernels")


# layer -> what of our own it may import besides itself; the first prefix that fits a module counts
TYPES = ("sampler.types", "sampler.errors", "sampler_kernels")
STRATEGY = (*TYPES, "sampler.constraints", "sampler.registry", "sampler.core")
RULES = {
    "sampler_kernels": (),
    "sampler.errors": (),
    "sampler.types": ("sampler_kernels",),
    "sampler.constraints": (),
    "sampler.registry": ("sampler.constraints",),
    "sampler.core": (*TYPES, "sampler.constraints", "sampler.registry"),
    "sampler.samplers": STRATEGY,
    "sampler.guidance": STRATEGY,
    "sampler.rewards": (*STRATEGY, "sampler.bundled"),
    "sampler.bundled": (),
    "sampler.model_files": ("sampler.errors", "sampler.bundled", "sampler.core"),
    "sampler.config": STRATEGY,
}


def violations(imports):
    """Own imports that point upwards."""
    wrong = []
    for entry in imports:
        layer = next((layer for layer in RULES if below(entry.module, layer)), None)
        if layer is None or not own(entry.target):
            continue
        if not below(entry.target, layer, *RULES[layer]):
            wrong.append(f"{entry.module} imports {entry.target}")
    return wrong


# library -> the only modules that may import it
ONLY = {
    "triton": ("sampler_kernels.triton_ops", "sampler_kernels.triton_kernels"),
    "diffusers": ("sampler.pipelines", "sampler.models", "sampler.stock", "sampler.loading"),
    "transformers": (
        "sampler.pipelines",
        "sampler.models",
        "sampler.stock",
        "sampler.loading",
        "sampler.rewards.encoders",
    ),
    "accelerate": ("sampler.training.fit",),
    "typer": ("sampler.cli",),
    "rich": ("sampler.cli",),
    "yaml": ("sampler.config.yaml",),
    "gradio": ("sampler.ui",),
    "starlette": ("sampler.ui",),
    "sampler.ui": ("sampler.ui", "sampler.cli.ui"),  # the page lies on top; its command starts it
}


def misplaced(imports):
    """Libraries imported outside their one place."""
    return [
        f"{entry.module} imports {entry.target}"
        for entry in imports
        for library, places in ONLY.items()
        if below(entry.target, library) and not below(entry.module, *places)
    ]


def cycles(imports):
    """Import cycles between our modules, over the imports made at import time."""
    edges = {}
    for entry in imports:
        if entry.early and entry.target in MODULES and entry.target != entry.module:
            edges.setdefault(entry.module, set()).add(entry.target)
    found, done = [], set()

    def walk(name, path):
        if name in path:
            found.append(" -> ".join([*path[path.index(name) :], name]))
        elif name not in done:
            for target in sorted(edges.get(name, ())):
                walk(target, [*path, name])
            done.add(name)

    for name in sorted(edges):
        walk(name, [])
    return found


def test_layers_import_only_what_lies_below():
    assert violations(IMPORTS) == []


def order_on_the_page():
    """The modules of the table in docs/how_it_works.md, from bottom to top and left to right."""
    page = (ROOT / "docs" / "how_it_works.md").read_text(encoding="utf-8")
    table = page.partition("## What imports what")[2].splitlines()
    cells = [line[4:].partition("  ")[0] for line in table if line.startswith("    ")]
    return " ".join(cells).split()


def test_the_page_tells_the_order():
    def part(module):
        return module.split(".")[1 if module.startswith("sampler.") else 0]

    order = order_on_the_page()
    assert sorted(order) == sorted({part(name) for name in MODULES} - {"sampler"})
    place = {name: number for number, name in enumerate(order)}
    starts = ("sampler.cli.ui", "sampler.ui")  # the page lies on top; its command starts it
    wrong = [
        f"{i.module} imports {i.target}"
        for i in IMPORTS
        if own(i.target) and part(i.target) in place and part(i.module) in place
        if place[part(i.target)] > place[part(i.module)]
        if not (i.module == starts[0] and below(i.target, starts[1]))
    ]
    assert wrong == []


def test_each_library_has_its_place():
    assert misplaced(IMPORTS) == []


def test_there_is_no_cycle():
    assert cycles(IMPORTS) == []


def test_late_imports_hide_no_cycle():
    assert cycles([replace(i, early=True) for i in IMPORTS]) == []


def test_strategies_stand_alone():
    """A strategy's file uses another strategy's class through the registry only."""
    from sampler import registry

    homes = {}
    for kind in ("sampler", "guidance"):
        for name in registry.names(kind):
            cls = registry.lookup(kind, name)
            homes.setdefault(cls.__module__, set()).add(cls.__name__)
    for name in homes:
        for node in ast.walk(ast.parse(MODULES[name].read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in homes:
                borrowed = homes[node.module] & {alias.name for alias in node.names}
                assert not borrowed, f"{name} imports {borrowed} of {node.module}"


LIGHT = ("sampler", "sampler_kernels", "sampler.types", "sampler.registry", "sampler.config.layers")
PACKAGES = ("sampler.samplers", "sampler.guidance", "sampler.bundled", "sampler.cli")


@pytest.mark.parametrize("module", [*LIGHT, *PACKAGES, "sampler.runs.*"])
def test_importing_is_light(module):
    heavy = ("torch", "diffusers", "transformers", "accelerate", "peft", "triton")
    chosen = [module] if module in MODULES else [n for n in MODULES if below(n, module[:-2])]
    lines = "; ".join(f"import {name}" for name in chosen)
    code = f"import sys; {lines}; print([n for n in {heavy!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_every_public_name_exists():
    import sampler

    assert len(sampler.__all__) == 29
    assert all(getattr(sampler, name).__doc__ for name in sampler.__all__)
    with pytest.raises(AttributeError, match="No sampler attribute lod"):
        sampler.lod  # noqa: B018


def test_the_checks_see_what_they_look_for():
    source = """
from typing import TYPE_CHECKING
import triton.language
from sampler import engine
if TYPE_CHECKING:
    import diffusers
def later():
    from sampler.cli import report
"""
    found = imports_of("sampler.samplers.bad", source)
    assert [(i.target, i.early) for i in found if i.target != "typing"] == [
        ("triton.language", True),
        ("sampler.engine", True),
        ("sampler.cli.report", False),
    ]
    assert len(violations(found)) == 2 and len(misplaced(found)) == 1
    loop = [
        Import("sampler.types", "sampler.core.noise", True),
        Import("sampler.core.noise", "sampler.types", True),
    ]
    assert cycles(loop) and not cycles(loop[:1])
