"""The README's picture: the same prompts and seeds with several rules, and the NFE of each.

python -m scripts.site.readme_grid [--out docs/figures/readme.png]
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

import sampler
from sampler.runs.grid import Sheet, drawn

PROMPTS = (
    "a fox on a green background",
    "a penguin on a sky blue background",
    "a robot on an orange background",
    "a frog on a pink background",
    "a taxi on a gray background",
    "a red apple on a white background",
)
ROWS: dict[str, tuple[str, dict[str, Any]]] = {  # name: model, options of `generate`
    "cfg 3": ("bundled", {"guidance": {"name": "cfg", "scale": 3}}),
    "cfg 15": ("bundled", {"guidance": {"name": "cfg", "scale": 15}}),
    "apg 15": ("bundled", {"guidance": {"name": "apg", "scale": 15}}),
    "forecast": (
        "bundled",
        {"guidance": {"name": "forecast", "rule": {"name": "cfg", "scale": 3}}},
    ),
    "student": ("bundled-student", {"steps": 1}),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/figures/readme.png"))
    out = parser.parse_args(arguments).out
    rows = {}
    for name, (model, options) in ROWS.items():
        made = sampler.load(model).generate(PROMPTS, seeds=10, **options)
        cost = sum(made.nfe) / len(made.nfe)
        rows[f"{name}: {cost:g} row{'s' * (cost > 1)}"] = made.images
    out.write_bytes(grid(rows))


def grid(rows: Mapping[str, Sequence[Image.Image]]) -> bytes:
    """A PNG of images side by side, one named row for each item."""
    cells = {}
    for row, images in enumerate(rows.values()):
        for column, image in enumerate(images):
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            cells[row, column] = buffer.getvalue()
    columns = max(map(len, rows.values()))
    return drawn(Sheet("", list(rows), [""] * columns, cells))


if __name__ == "__main__":
    main()
