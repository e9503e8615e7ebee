"""The figures of docs/samplers.md: studies mixture, orders, auto, bundled, inverse; and plots.

Every study appends rows to docs/figures/samplers_<study>.csv as they are made, and goes on where
it was stopped. `plots` draws the pictures from those files.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FIGURES = Path(__file__).parents[1] / "docs" / "figures"


def append(study: str, rows: Iterable[dict[str, Any]]) -> None:
    """Adds rows to a study's file as they come."""
    path = FIGURES / f"samplers_{study}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    for row in rows:
        fresh = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(row))
            if fresh:
                writer.writeheader()
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})
        print(row, flush=True)


def stored(study: str) -> list[dict[str, str]]:
    """The rows of a study's file; none where it is missing."""
    path = FIGURES / f"samplers_{study}.csv"
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def orders() -> Iterable[dict[str, Any]]:
    """Observed orders of convergence on one mixture (scale 1), on equal and on Karras' steps."""
    import torch
    from samplers_mixture import exact, pair

    import sampler
    from sampler.types import Level

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "study", choices=["mixture", "orders", "auto", "bundled", "inverse", "plots"]
    )
    parser.add_argument(
        "--images", type=int, default=0, help="images a point (default: the study's)"
    )
    options = parser.parse_args()
    if options.study == "mixture":
        from samplers_mixture import study

        append("mixture", study())
    elif options.study == "orders":
        append("orders", orders())
    elif options.study == "auto":
        from samplers_mixture import carry_over

        append("auto", carry_over())
    elif options.study == "bundled":
        from samplers_bundled import study as bundled

        append("bundled", bundled(stored("bundled"), options.images or 256))
    elif options.study == "inverse":
        from samplers_inverse import study as inverse

        append("inverse", inverse(stored("inverse"), options.images or 64))
    else:
        from samplers_plots import draw

        draw(FIGURES, stored)


if __name__ == "__main__":
    main()
