"""Share of clipped values by APG's settings, on the bundled model, for docs/figures/apg_steps.csv.

    python -m scripts.study.apg_steps --out runs/apg_steps    # resumable

Float32, one thread. Clipped: share of values <= 1/255 or >= 254/255. Every setting has the same
prompts and seeds.
"""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import sampler
from sampler.bundled import prompts
from sampler.bundled.measures import clipped_share, saturation

DOCS = Path(__file__).resolve().parents[2] / "docs"
STEPS = (4, 6, 8, 10, 15, 20, 30, 50)
SCALES = (7.5, 15.0)
SAMPLERS = ("ddim", "ghvb")
RULES: dict[str, dict[str, Any]] = {
    "cfg": {"name": "cfg"},
    "apg, paper": {"name": "apg", "momentum": -0.5, "norm_threshold": 15.0},
    "apg, paper without momentum": {"name": "apg", "momentum": 0.0, "norm_threshold": 15.0},
    "apg, relative clip and momentum": {"name": "apg", "momentum": -0.5, "r_rel": 0.0586},
    "apg, relative clip": {"name": "apg", "momentum": 0.0, "r_rel": 0.0586},
}


def main(
    out: Annotated[Path, typer.Option(help="Folder of the rows made so far.")],
    count: Annotated[int, typer.Option(help="Images per setting.")] = 12,
    docs: Annotated[Path, typer.Option(help="Where the table goes.")] = DOCS,
) -> None:
    """Make the rows that are missing, and write the CSV."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    engine, rows = sampler.load(), []
    for setting in itertools.product(STEPS, SCALES, SAMPLERS, RULES):
        file = out / ("_".join(str(part) for part in setting).replace(", ", "-") + ".json")
        if not file.exists():
            file.write_text(json.dumps(_row(engine, *setting, count)))
        rows.append(json.loads(file.read_text()))
    with (docs / "figures" / "apg_steps.csv").open("w", newline="", encoding="utf-8") as table:
        writer = csv.DictWriter(table, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _row(
    engine: Any, steps: int, scale: float, method: str, rule: str, count: int
) -> dict[str, Any]:
    made = engine.generate(
        [prompt.text for prompt in prompts(count)],
        seeds=0,
        steps=steps,
        sampler=method,
        guidance={**RULES[rule], "scale": scale},
        output="tensor",
        batch_size=count,
    )
    return {
        "rule": rule,
        "sampler": method,
        "scale": scale,
        "steps": steps,
        "images": count,
        "clipped": round(float(clipped_share(made.images)), 4),
        "saturation": round(float(saturation(made.images)), 4),
    }


if __name__ == "__main__":
    typer.run(main)
