"""The README's picture: the same prompts and seeds at half the calls, and at high guidance.

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
from sampler.core.batch import to_output
from sampler.runs.grid import Sheet, drawn

PROMPTS = (
    "a fox on a green background",
    "a penguin on a sky blue background",
    "a robot on an orange background",
    "a frog on a pink background",
    "a taxi on a gray background",
    "a red apple on a white background",
)
RULES: dict[str, dict[str, Any]] = {
    "cfg 3": {"name": "cfg", "scale": 3},
    "forecast (cfg 3)": {"name": "forecast", "rule": {"name": "cfg", "scale": 3}},
    "cfg 12": {"name": "cfg", "scale": 12},
    "apg 12": {"name": "apg", "scale": 12},
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/figures/readme.png"))
    out = parser.parse_args(arguments).out
    out.write_bytes(grid(labelled()))


def labelled() -> dict[str, Sequence[Image.Image]]:
    """Images of every rule, by its name, mean NFE, and what its pair of rows compares.

    The first pair compares SSIM to the full run, the second the share of clipped values.
    """
    from sampler.bundled.measures import clipped_share
    from sampler.metrics import ssim

    engine, rows, before = sampler.load(), {}, None
    for name, rule in RULES.items():
        result = engine.generate(PROMPTS, seeds=10, guidance=rule, output="tensor")
        nfe = sum(result.nfe) / len(result.nfe)
        before = result.images if before is None else before
        if name.endswith(("3", "3)")):
            figure = f"SSIM {float(ssim(result.images, before).mean()):.3f}"
        else:
            figure = f"{100 * clipped_share(result.images):.0f} % clipped"
        rows[f"{name}: NFE {nfe:.0f}, {figure}"] = to_output(result.images, "pil")
    return rows


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
