"""Pictures of the documentation's tour, from the settings shown on the page.

python -m scripts.site.tour [first|trajectory|choices|tuned ...] [--folder docs/figures]
"""

from __future__ import annotations

import argparse
import io
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import sampler
from sampler.core.batch import to_output
from sampler.models.lora import load_lora
from sampler.runs.grid import Sheet, drawn

PROMPTS = ("a red apple on a blue background", "a fox on a green background")
CFG = {"name": "cfg", "scale": 3}
FORECAST = {"name": "forecast", "rule": CFG}
CHOICES: dict[str, tuple[Any, Any]] = {
    "ddim, cfg 3": ("ddim", {"name": "cfg", "scale": 3}),
    "ghvb, cfg 10": ("ghvb", {"name": "cfg", "scale": 10}),
    "ghvb, apg 10": ("ghvb", {"name": "apg", "scale": 10}),
}
CHOSEN = (
    "a fox on a green background",
    "a penguin on a sky blue background",
    "a robot on an orange background",
    "a frog on a pink background",
)
TUNED = tuple(
    f"{thing} on a gray background" for thing in ("a dog", "a taxi", "a penguin", "a frog")
)


def sheet(
    rows: Sequence[str], columns: Sequence[str], images: Sequence[Sequence[Image.Image]]
) -> bytes:
    cells = {}
    for row, line in enumerate(images):
        for column, image in enumerate(line):
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            cells[row, column] = buffer.getvalue()
    return drawn(Sheet("", list(rows), list(columns), cells))


def first() -> bytes:
    """The first two images of the tour, which are also the README's."""
    made = sampler.load().generate(
        PROMPTS, seeds=1, steps=20, sampler={"name": "ab", "order": 2},
        guidance={"name": "cfg", "scale": 3},
    )  # fmt: skip
    return sheet([""], ["", ""], [made.images])


@torch.no_grad()
def trajectory() -> bytes:
    """A run in progress: x as an image after every fourth step, and the NFE so far."""
    engine = sampler.load()
    adapter = engine.pipeline
    size = adapter.size(None, None)
    cond = adapter.encode(PROMPTS[1:], [""], True, size)
    x = torch.randn(1, *adapter.latent_shape(*size), generator=torch.Generator().manual_seed(2))
    start, grid = engine.start(x, adapter.grid(20, size), cond, "ddim", FORECAST, seeds=[2])
    seen = [s for s in engine.steps(start, grid, cond, "ddim", FORECAST) if s.index % 4 == 0]
    pictures = to_output(torch.cat([adapter.decode(s.x) for s in seen]), "pil")
    return sheet([""], [f"{s.index}: {s.nfe[0]} rows" for s in seen], [pictures])


def choices() -> bytes:
    """The same prompts and seeds under other samplers and rules, at ten steps."""
    engine, images = sampler.load(), []
    for method, rule in CHOICES.values():
        made = engine.generate(CHOSEN, seeds=10, steps=10, sampler=method, guidance=rule)
        images.append(made.images)
    return sheet(list(CHOICES), [""] * len(CHOSEN), images)


def tuned() -> bytes:
    """The tour's fine-tuning: the same seeds before and after."""
    engine = sampler.load()
    rows = [engine.generate(TUNED, seeds=1).images]
    with tempfile.TemporaryDirectory() as folder:
        report = sampler.finetune(
            engine,
            trainer={"name": "alignprop", "truncation": "fixed", "k": 1},
            reward="colourfulness",
            prompts=TUNED,
            out=Path(folder) / "run",
            updates=20,
            settings={"batch": 8, "steps": 10},
        )
        load_lora(engine, (report.lora, 1.0))
        rows.append(engine.generate(TUNED, seeds=1).images)
    return sheet(["before", "after"], [""] * len(TUNED), rows)


PICTURES: dict[str, Callable[[], bytes]] = {
    "first": first,
    "trajectory": trajectory,
    "choices": choices,
    "tuned": tuned,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PICTURES))
    parser.add_argument("--folder", type=Path, default=Path("docs/figures"))
    options = parser.parse_args(arguments)
    for name in options.names or PICTURES:
        (options.folder / f"tour_{name}.png").write_bytes(PICTURES[name]())


if __name__ == "__main__":
    main()
