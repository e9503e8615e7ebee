"""The figures of docs/samplers.md and docs/restoring.md: the studies below, then `plots`.

Every study adds rows to docs/figures/samplers_<study>.csv as they are made. The long ones go on
where they were stopped (`--minutes` stops them in good time), the others start afresh. `inverse`
and `times` need `tuning` before them.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SHORT = ("mixture", "orders", "times", "grids")
LONG = ("bundled", "tuning", "inverse", "calibrated")
FIGURES = Path(__file__).parents[2] / "docs" / "figures"


def append(study: str, rows: Iterable[dict[str, Any]], minutes: float = math.inf) -> None:
    """Append rows to a study's file as they are measured, until the time budget is spent."""
    path, end = FIGURES / f"samplers_{study}.csv", time.monotonic() + 60 * minutes
    path.parent.mkdir(parents=True, exist_ok=True)
    for row in rows:
        fresh = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(row))
            if fresh:
                writer.writeheader()
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})
        print(row, flush=True)
        if time.monotonic() > end:
            return


def stored(study: str) -> list[dict[str, str]]:
    """Read the rows of a study's file; none if it is missing."""
    name = study if study.startswith("restore") else f"samplers_{study}"
    path = FIGURES / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def orders() -> Iterable[dict[str, Any]]:
    """Observed orders of convergence on one mixture (scale 1), on equal and on Karras' steps."""
    import torch

    import sampler
    from sampler.types import Level
    from scripts.study.samplers_mixture import exact, pair

    mix = pair()[0]
    z = 8 * torch.randn(4, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def levels(kind: str, steps: int) -> list[Level]:
        ends = (8.0, 0.5) if kind == "equal" else (8 ** (1 / 7), 0.5 ** (1 / 7))
        points = torch.linspace(*ends, steps + 1, dtype=torch.float64)
        us = (points if kind == "equal" else points**7).tolist()
        return [Level(u, 1 / math.sqrt(1 + u * u), u / math.sqrt(1 + u * u)) for u in us]

    methods: dict[str, Any] = {f"ab {r}": {"name": "ab", "order": r} for r in range(1, 6)}
    methods |= {
        f"ab {r} variable": {"name": "ab", "order": r, "steps": "variable"} for r in (2, 3, 4)
    }
    methods |= {f"ghvb {m:g}": {"name": "ghvb", "momentum_number": m} for m in (0.5, 1.8, 2.5, 3.8)}
    methods |= {
        f"heavy_ball {m:g}": {"name": "heavy_ball", "momentum_number": m} for m in (1.8, 3.8)
    }
    methods |= {name: name for name in ("nesterov", "heun", "dpmpp_2m", "unipc")}
    engine = sampler.Engine(sampler.denoiser(lambda x, level, _: mix.eps(x, level)))
    for kind, (name, spec) in itertools.product(("equal", "karras"), methods.items()):
        errors = []
        for steps in (40, 80, 160, 320):
            grid = levels(kind, steps)
            end = engine.run(z * grid[0].alpha, grid, sampler=spec)
            errors.append(
                float((end - exact(mix.eps, z * grid[0].alpha, grid[0], grid[-1])).norm())
            )
        observed = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
        yield {"sampler": name, "grid": kind, "error at 320": errors[-1], "order": observed[-1]}


def grids() -> Iterable[dict[str, Any]]:
    """Errors of the candidates of `sampler calibrate grid`, on the bundled model with UniPC."""
    import json

    import sampler
    from sampler.calibration.grids import calibrate_grid
    from sampler.calibration.solvers import name_of

    prompts = Path(__file__).parents[2].joinpath("configs", "calibration.txt").read_text()
    found = calibrate_grid(
        sampler.load(),
        prompts.splitlines()[:8],
        sampler="unipc",
        steps=(8, 20),
        guidance=[{"name": "cfg", "scale": 3.0}],
    )
    for entry in found["entries"]:
        for text, error in entry["errors"].items():
            grid = json.loads(text)
            yield {
                "steps": entry["steps"],
                "grid": "own" if grid is None else name_of(grid),
                "error": error,
                "chosen": int(grid == entry["grid"]),
                "prompts": entry["prompts"],
            }


def rows_of(study: str, images: int | None) -> Iterable[dict[str, Any]]:
    """Yield the rows of a study that are missing in its file; `images` per point."""
    from scripts.study import (
        samplers_bundled,
        samplers_calibrated,
        samplers_inverse,
        samplers_mixture,
    )

    done, count = stored(study), {} if images is None else {"images": images}
    if study == "mixture":
        return samplers_mixture.study()
    if study == "orders":
        return orders()
    if study == "grids":
        return grids()
    if study == "bundled":
        return samplers_bundled.study(done, **count)
    if study == "tuning":
        return samplers_inverse.tuning(done)
    if study == "inverse":
        return samplers_inverse.study(done, stored("tuning"), **count)
    if study == "times":
        return samplers_inverse.times(stored("tuning"))
    return samplers_calibrated.study(done, **count)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=[*SHORT, *LONG, "sheets", "plots"])
    parser.add_argument("--images", type=int, help="images a point (default: the study's)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this long")
    options = parser.parse_args()
    if options.study == "plots":
        from scripts.study.samplers_plots import draw
        from scripts.study.samplers_tables import write

        draw(FIGURES, stored)
        write(FIGURES.parent, stored)
    elif options.study == "sheets":
        from scripts.study import samplers_sheets

        samplers_sheets.draw(FIGURES, stored("tuning"))
    else:
        if options.study in SHORT:
            (FIGURES / f"samplers_{options.study}.csv").unlink(missing_ok=True)
        append(options.study, rows_of(options.study, options.images), options.minutes)


if __name__ == "__main__":
    main()
