"""Import rules, read from the syntax trees and from the table in docs/how_it_works.md.

Every import counts: inside a function, under TYPE_CHECKING, of a module or of a name. There is no
list of exceptions.
"""

import ast
import graphlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHIPPED = {"sampler": ROOT / "sampler", "sampler_kernels": ROOT / "kernels" / "sampler_kernels"}


@dataclass(frozen=True)
class Import:
    """`module` imports `target`."""

    module: str
    target: str


def modules(places):
    """{"sampler.types": path} of the modules in the folders of packages."""
    found = {}
    for package, folder in places.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name] = path
    return found


MODULES = modules(SHIPPED)
SCRIPTS = modules({"scripts": ROOT / "scripts"})


def imports_of(name, text, known=frozenset(MODULES | SCRIPTS)):
    """The imports of a module's source, `from package import submodule` resolved."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found.extend(Import(name, alias.name) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.append(Import(name, inner if inner in known else node.module))
    return found


def imports_in(modules):
    return [i for name, path in modules.items() for i in imports_of(name, path.read_text())]


@pytest.fixture(scope="module")
def imports():
    return imports_in(MODULES)


def below(name, *packages):
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def own(name):
    return below(name, "sampler", "sampler_kernels")


def room(module):
    """The folder or file of the package that a module belongs to; None for the package's face."""
    parts = module.split(".")
    return parts[0] if parts[0] == "sampler_kernels" else (parts[1] if parts[1:] else None)


def order_on_the_page():
    """The rooms of the table in docs/how_it_works.md, from bottom to top and left to right."""
    page = (ROOT / "docs" / "how_it_works.md").read_text(encoding="utf-8")
    table = page.partition("## What imports what")[2].splitlines()
    cells = [line[4:].partition("  ")[0] for line in table if line.startswith("    ")]
    return " ".join(cells).split()


ORDER = order_on_the_page()


def violations(imports):
    """Own imports that point upwards."""
    place = {name: number for number, name in enumerate(ORDER)}
    return [
        f"{i.module} imports {i.target}"
        for i in imports
        if own(i.target) and room(i.target) and room(i.module)
        if place[room(i.target)] > place[room(i.module)]
    ]


# library -> the only modules that may import it
ONLY = {
    "triton": ("sampler_kernels.triton_ops", "sampler_kernels.triton_kernels"),
    "diffusers": ("sampler.pipelines", "sampler.models", "sampler.stock", "sampler.engine.loading"),
    "transformers": (
        "sampler.pipelines",
        "sampler.models",
        "sampler.stock",
        "sampler.rewards.encoders",
    ),
    "accelerate": ("sampler.training",),
    "typer": ("sampler.cli",),
    "rich": ("sampler.cli",),
    "yaml": ("sampler.config.yaml",),
    "gradio": ("sampler.ui",),
    "starlette": ("sampler.ui",),
}


def misplaced(imports):
    """Libraries imported outside their one place."""
    return [
        f"{entry.module} imports {entry.target}"
        for entry in imports
        for library, places in ONLY.items()
        if below(entry.target, library) and not below(entry.module, *places)
    ]


def cycle(imports):
    """An import cycle between our modules, or None."""
    graph = {}
    for entry in imports:
        if entry.target in (MODULES | SCRIPTS) and entry.target != entry.module:
            graph.setdefault(entry.module, set()).add(entry.target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return " -> ".join(error.args[1])
    return None


def test_the_page_lists_every_room():
    assert sorted(ORDER) == sorted({room(name) for name in MODULES} - {None})


def test_imports_point_down(imports):
    assert violations(imports) == []


def test_each_library_has_its_place(imports):
    assert misplaced(imports) == []


def test_there_is_no_cycle(imports):
    assert cycle(imports) is None
    assert cycle(imports_in(SCRIPTS)) is None


def test_nothing_shipped_imports_a_script(imports):
    assert [i for i in imports if below(i.target, "scripts", "tests")] == []


def test_a_class_name_has_one_meaning():
    homes = {}
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name, []).append(name)
    assert [found for found in homes.items() if len(found[1]) > 1] == []


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

    assert len(sampler.__all__) == 31
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
    assert {i.target for i in found} == {
        "typing",
        "triton.language",
        "sampler.engine",
        "diffusers",
        "sampler.cli.report",
    }
    assert len(violations(found)) == 2 and len(misplaced(found)) == 2
    loop = [
        Import("sampler.types", "sampler.core.noise"),
        Import("sampler.core.noise", "sampler.types"),
    ]
    assert cycle(loop) and not cycle(loop[:1])
    study = "from scripts.study import training_page\n"
    assert {i.target for i in imports_of("scripts.study.training", study)} == {
        "scripts.study.training_page"
    }
