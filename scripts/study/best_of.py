"""Measure how much of the gain of best of 16 drafts keep, and at what cost.

    python -m scripts.study.best_of    # docs/figures/best_of.csv

Full runs have 12 steps of `ab` at scale 3, drafts fewer; all 16 seeds of every prompt are run in
full, so that the choice by drafts is compared with the choice by the full runs themselves. A gain
is the chosen image's score in full minus the mean of the 16; share is the drafts' mean gain over
that of the full runs, with a 95 % interval by bootstrap over prompts. evaluations is the cost of
drafts and one full run, over that of 16 full runs. judge is the share of right concepts of the
chosen images by the classifier that chooses nothing, judge_random that of all 16.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

import sampler
from sampler.bundled import prompts
from sampler.evaluation.intervals import paired, resampled
from sampler.evaluation.lines import seed_of
from sampler.evaluation.scorers import JudgeScorer
from sampler.rewards.scoring import score

FIGURES = Path(__file__).parents[2] / "docs" / "figures" / "best_of.csv"
FULL, DRAFTS = 12, (2, 3, 4, 6)
REWARDS = ("classifier", "colour_agreement", "soft_compressibility")


def main(
    figures: Annotated[Path, typer.Option(help="CSV to write.")] = FIGURES,
    count: Annotated[int, typer.Option(min=2, help="Prompts, which name a style.")] = 24,
    candidates: Annotated[int, typer.Option(min=2, help="Images per prompt.")] = 16,
) -> None:
    """Generate all candidates in full and as drafts, choose, and compare."""
    torch.set_num_threads(1)
    engine = sampler.load(dtype="float32")
    texts = [p.text for p in prompts(count, styled=True) for _ in range(candidates)]
    seeds = [seed_of(text, k % candidates) for k, text in enumerate(texts)]

    def images(steps: int) -> Tensor:
        made = engine.generate(
            texts, seeds=seeds, steps=steps, sampler={"name": "ab", "order": 2}, batch_size=32,
            guidance={"name": "cfg", "scale": 3.0}, output="tensor",
        )  # fmt: skip
        print(steps, "steps", flush=True)
        return (made.images * 255).round() / 255

    full, drafts = images(FULL), {steps: images(steps) for steps in DRAFTS}
    with torch.no_grad():
        right = JudgeScorer().columns(full, texts)["judge.concept"].view(count, candidates)
    rows = []
    for reward in REWARDS:
        judged = sampler.build("reward", reward)
        scores = score(judged, full, texts).view(count, candidates).double()
        best = (scores.amax(1) - scores.mean(1)).numpy()
        for steps in DRAFTS:
            chosen = score(judged, drafts[steps], texts).view(count, candidates).argmax(1)
            taken = scores.gather(1, chosen[:, None])[:, 0]
            gain = (taken - scores.mean(1)).numpy()
            means = resampled(np.stack([gain, best], 1))
            low, high = np.quantile(means[:, 0] / means[:, 1], (0.025, 0.975))
            found = right.gather(1, chosen[:, None])[:, 0].double()
            gap = paired(found.numpy(), right.double().mean(1).numpy())
            row: dict[str, Any] = {
                "reward": reward, "draft_steps": steps, "prompts": count, "candidates": candidates,
                "share": gain.mean() / best.mean(), "share_low": low, "share_high": high,
                "gain": gain.mean(), "full_gain": best.mean(),
                "winner": float((taken >= scores.amax(1)).double().mean()),
                "evaluations": (candidates * steps + FULL) / (candidates * FULL),
                "judge": float(found.mean()), "judge_random": float(right.mean()),
                "judge_change": gap.mean,
                "judge_change_low": gap.interval and gap.interval[0],
                "judge_change_high": gap.interval and gap.interval[1],
            }  # fmt: skip
            rows.append({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
            print(rows[-1], flush=True)
    with figures.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [*rows[0]])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    typer.run(main)
