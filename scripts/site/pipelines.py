"""Write docs/pipelines.md: what works with which classic pipeline class of diffusers.

    python -m scripts.site.pipelines [--new] [CLASS...]

Every class with a recipe in `tests/classic` is called as it is, inside `sampler.guide`, with a
drop-in scheduler and hosted. The rows go to docs/figures/pipelines.csv as they come; with --new
only those that are missing there are made, with names of classes only theirs. The page is then
written from all rows.
"""

from __future__ import annotations

import argparse
import csv
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch

import sampler
from sampler.pipelines import supported
from sampler.pipelines.call_arguments import arguments, reserved, scheduler_name, takes_images
from scripts.site.pipelines_page import page
from tests.classic.recipe import Recipe
from tests.classic.stand_ins import stand_ins
from tests.classic.table import LEFT_OUT, TINY

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "pipelines.md"
ROWS = ROOT / "docs" / "figures" / "pipelines.csv"
COLUMNS = ("class", "family", "native", "hosted", "guide", "scheduler", "inputs")
FIRST_ORDER = ("DDIM", "Euler", "EDMEuler", "FlowMatchEuler")  # whose steps are those of `ddim`
Row = dict[str, str]


def classes() -> Iterator[str]:
    """Names of the classic pipeline classes that diffusers exports."""
    for name in sorted(dir(diffusers)):
        named = name.endswith("Pipeline") and name != "DiffusionPipeline" and "Modular" not in name
        if named and not name.startswith(("Flax", "Auto")):
            yield name


def family(name: str) -> str:
    """Folder of diffusers that a class comes from."""
    parts = getattr(diffusers, name).__module__.split(".")
    parts = [part for part in parts[2:-1] if part != "deprecated"]
    return parts[0] if parts else ""


def guide(recipe: Recipe, pipe: Any, plain: torch.Tensor) -> str:
    """Rule that gives the pipeline's own images: "cfg" at its scale, "none" of one branch."""
    rule: dict[str, Any] = {"name": "cfg", "scale": 3.0}
    try:
        with sampler.guide(pipe, rule) as calls:
            recipe.called(pipe)
    except ValueError as error:
        if "evaluates one branch" not in str(error):
            raise
        rule = {"name": "none"}
    else:
        if calls.form is None:
            return "no step was taken"
        rule["scale"] = calls.form.scale
        if calls.form.match_norm is not None:
            rule["match_norm"] = calls.form.match_norm
    with sampler.guide(pipe, rule) as calls:
        found = recipe.called(pipe)
    if rule["name"] == "none" and calls.form is not None and len(calls.form.roles) > 1:
        return "refused, though it evaluates two branches"
    name = rule["name"] + (" with match_norm" if "match_norm" in rule else "")
    return name if gap(found, plain) <= 1e-5 else f"differs by {gap(found, plain):.0e}"


def drop_in(recipe: Recipe, pipe: Any, plain: torch.Tensor) -> str:
    """ "equal" where `ddim` in the pipeline gives its own images, "finite" where `ab` does."""
    own = scheduler_name(type(pipe))
    before = getattr(pipe, own, None)
    if before is None:
        return "It has no scheduler of its own, which a drop-in could replace."
    kind = type(before).__name__
    try:
        setattr(pipe, own, sampler.scheduler("ddim", before))
        apart = gap(recipe.called(pipe), plain)
        setattr(pipe, own, sampler.scheduler("ab", before))
        other = recipe.called(pipe)
        if not other.isfinite().all():
            return "not finite"
        if torch.equal(other, plain):
            return "Its inner pipeline has the scheduler that counts; give that one the drop-in."
    finally:
        setattr(pipe, own, before)
    if apart <= 1e-5:
        return "equal"
    first_order = kind.removesuffix("Scheduler").removesuffix("Discrete") in FIRST_ORDER
    return f"differs by {apart:.0e}" if first_order else "finite"


def hosted(recipe: Recipe, pipe: Any, _: torch.Tensor) -> str:
    """ "yes" after calls of the hosted engine with `ab` and `ghvb`."""
    cls = type(pipe)
    engine: Any = sampler.load(pipe).as_hosted()
    own = {**recipe.settings(cls), **recipe.inputs(cls)}
    inputs = {
        name: [value] if isinstance(value, list) and len(value) == 1 else value  # one per prompt
        for name, value in own.items()
        if name not in reserved(cls) and value is not None
    }
    size = {name: own[name] for name in ("height", "width") if name in own}
    prompt = own.get("prompt", "3" if "class_labels" in own else "")
    if "negative_prompt" in own:
        size["negative"] = own["negative_prompt"]
    for name in ("ab", "ghvb"):
        with stand_ins(cls):
            result = engine.generate(prompt, seeds=1, steps=3, sampler=name, inputs=inputs, **size)
        assert len(result.images) == 1 and result.nfe[0] > 0
    return "yes"


def gap(found: torch.Tensor, plain: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((found - plain).abs().max() / plain.abs().max().clamp_min(1e-9))


def tried(attempt: Callable[..., str], recipe: Recipe, pipe: Any, plain: torch.Tensor) -> str:
    """Result of an attempt, or the sentence with which it is refused."""
    try:
        return attempt(recipe, pipe, plain)
    except (ValueError, sampler.SamplerError) as error:
        text = " ".join(str(error).split())
        return text if text.endswith(".") else f"diffusers: {text}."  # no sentence of ours
    except Exception as error:  # a reason that is no sentence of ours is a fault worth seeing
        return f"**{type(error).__name__}** {str(error)[:100]}"


def row(name: str) -> Row:
    """Row of a class. Raises what its plain call raises."""
    cls = getattr(diffusers, name)
    native = "yes" if name in supported() else ""
    known = {} if name in LEFT_OUT and cls.__module__.endswith("_objects") else arguments(cls)
    found = {"class": name, "family": family(name), "native": native}
    found["inputs"] = " ".join(filter(takes_images, known))
    if name in LEFT_OUT:
        return {**found, **dict.fromkeys(("hosted", "guide", "scheduler"), LEFT_OUT[name])}
    recipe = TINY[name]
    pipe = recipe.build(name)
    plain = recipe.called(pipe)
    cells = {"hosted": hosted, "guide": guide, "scheduler": drop_in}
    return found | {k: tried(attempt, recipe, pipe, plain) for k, attempt in cells.items()}


def read() -> dict[str, Row]:
    """Rows that are there already, by class."""
    if not ROWS.exists():
        return {}
    with ROWS.open(encoding="utf-8", newline="") as file:
        return {one["class"]: one for one in csv.DictReader(file)}


def write(rows: dict[str, Row]) -> None:
    with ROWS.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([rows[name][column] for column in COLUMNS] for name in sorted(rows))


def main(given: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--new", action="store_true", help="only classes without a row")
    parser.add_argument("names", nargs="*")
    chosen = parser.parse_args(given)
    warnings.simplefilter("ignore")
    diffusers.utils.logging.disable_progress_bar()
    rows = read()
    for name in classes():
        if name not in (chosen.names or classes()) or (chosen.new and name in rows):
            continue
        if name not in TINY and name not in LEFT_OUT:
            continue
        rows[name] = row(name)
        write(rows)
        sys.stderr.write(f"{rows[name]}\n")
    if not set(TINY) - set(rows):
        PAGE.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
