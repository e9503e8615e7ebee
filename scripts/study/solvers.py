"""Quality against evaluations of the samplers on the bundled model, on both of its processes.

    python -m scripts.study.solvers [--minutes 12]

Rows are added to docs/figures/samplers_quality.csv as they are made, and a run goes on where the
last one stopped. `bundled` has variance-preserving levels, `bundled-flow` those of flow matching;
three seeds of eight prompts each, CFG 3, the models' own grids.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import sampler
from sampler.bundled import BUNDLED_SCALE, EvaluationPrompt, prompts
from sampler.bundled.classifier import load
from sampler.bundled.measures import extracted_features
from sampler.calibration.solvers import Measured, measured, name_of

FILE = Path(__file__).parents[2] / "docs" / "figures" / "samplers_quality.csv"
MODELS = ("bundled", "bundled-flow")
STEPS = (6, 10, 20)
# Where the first rows show a break: sampler, steps, grid.
MORE: tuple[tuple[str, int, str | None], ...] = (
    ("dpmpp_3m_sde", 25, None),
    ("res_multistep", 8, None),
    ("dpmpp_3m_sde", 15, "exponential"),
)
IMAGES = 8
SEEDS = (0, 1, 2)
SAMPLERS: tuple[Any, ...] = (
    "ddim", {"name": "ab", "order": 2}, "dpmpp_2m", "unipc", "res_multistep", "res_2s",
    "euler_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde", "er_sde", "sa_solver",
)  # fmt: skip


def study(done: Sequence[dict[str, str]]) -> Iterator[dict[str, Any]]:
    """Yield the rows of every seed, model and sampler that `done` does not have all of."""
    classifier = load()
    for seed in SEEDS:
        listed = prompts(IMAGES * len(SEEDS))[IMAGES * seed : IMAGES * (seed + 1)]
        concepts = torch.tensor([prompt.concept for prompt in listed])
        for model in MODELS:
            have = {
                (r["sampler"], int(r["steps"]), r["grid"] or None)
                for r in done
                if (r["model"], r["seed"]) == (model, str(seed))
            }
            wanted = [(SAMPLERS, STEPS, None), *(((name,), (n,), grid) for name, n, grid in MORE)]
            for specs, steps, grid in wanted:
                left = [s for s in specs if {(name_of(s), n, grid) for n in steps} - have]
                rows = _measured(model, listed, left, steps, grid, 1000 * seed) if left else ()
                for row in rows:
                    features = extracted_features(classifier, row.result.images)
                    right = classifier.logits(features).concept.argmax(1) == concepts
                    yield {"model": model, "seed": seed, **_figures(row), "right": int(right.sum())}


def _measured(
    model: str,
    listed: Sequence[EvaluationPrompt],
    samplers: Sequence[Any],
    steps: Sequence[int],
    grid: str | None,
    seed: int,
) -> Iterator[Measured]:
    return measured(
        sampler.load(model),
        [prompt.text for prompt in listed],
        samplers=samplers,
        steps=steps,
        grids=(grid,),
        guidance={"name": "cfg", "scale": BUNDLED_SCALE},
        seed=seed,
        output="tensor",
        own_paths=False,
        finer=5,
    )


def _figures(row: Measured) -> dict[str, Any]:
    return {
        "sampler": name_of(row.sampler),
        "grid": row.grid,
        "steps": row.steps,
        "nfe": row.nfe,
        "images": IMAGES,
        "distance": row.distance,
        "spread": row.spread,
        "solver_error": row.solver_error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=12.0, help="stop after this long")
    end = time.process_time() + 60 * parser.parse_args().minutes
    done: list[dict[str, str]] = []
    if FILE.exists():
        with FILE.open(newline="", encoding="utf-8") as file:
            done = list(csv.DictReader(file))
    for row in study(done):
        with FILE.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(row))
            if not file.tell():
                writer.writeheader()
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})
        print(row, flush=True)
        if time.process_time() > end:
            return


if __name__ == "__main__":
    main()
