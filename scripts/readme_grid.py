"""The picture of the README: the same prompts and seeds under several rules, and what each costs.

python scripts/readme_grid.py [--out docs/figures/readme.png]
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
APG = {"name": "apg", "scale": 15, "r_rel": 0.0586}
ROWS: dict[str, Any] = {
    "cfg 3": {"name": "cfg", "scale": 3},
    "cfg 15": {"name": "cfg", "scale": 15},
    "apg 15": APG,
    "linear_ag": "linear_ag",
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/figures/readme.png"))
    out = parser.parse_args(arguments).out
    engine = sampler.load()
    names, cells = [], {}
    for row, (name, rule) in enumerate(ROWS.items()):
        made = engine.generate(PROMPTS, seeds=10, guidance=rule)
        names.append(f"{name}: {sum(made.nfe) / len(made.nfe):g} rows")
        for column, image in enumerate(made.images):
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            cells[row, column] = buffer.getvalue()
    out.write_bytes(drawn(Sheet("", names, [""] * len(PROMPTS), cells)))


if __name__ == "__main__":
    main()
