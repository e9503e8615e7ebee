"""Reward fine-tuning on the bundled model: reward against images made and against time.

    python scripts/study_finetune.py --out runs/study_finetune --updates 60 --seeds 0 1 2
    python scripts/study_finetune.py --out runs/study_finetune --plot docs/figures/finetune.png

Every combination of trainer, reward and seed is a run folder below --out and resumes there. The
gradient trainer (AlignProp) and the policy-gradient trainers (DDPO, RLCM) start from the same
adapter-free model; RLCM samples with the consistency sampler, which the bundled model was not
distilled for unless --lora names a student (scripts/distill_lcm.py).

--out gets curves.csv: one line per evaluation with reward, its standard deviation, images made,
denoiser rows, seconds of updates, drift from the base model, and the Fréchet distance of
--images samples in the bundled classifier's features (0 leaves it out).
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import torch

import sampler
from sampler import bundled
from sampler.finetune.lora import load_lora, unload_lora

# (reward that AlignProp follows, reward of the policies): one is the other's differentiable form.
REWARDS = {
    "compressibility": ("soft_compressibility", "compressibility"),
    "classifier": ("classifier", "classifier"),
    "colour": ("colour_agreement", "colour_agreement"),
}
TRAINERS: dict[str, dict[str, Any]] = {
    "alignprop": {"trainer": {"name": "alignprop", "truncation": "fixed", "k": 1}, "steps": 20},
    "ddpo": {"trainer": {"name": "ddpo"}, "steps": 20},
    "rlcm": {"trainer": {"name": "rlcm"}, "steps": 4, "guidance": "none"},
}
FIELDS: tuple[str, ...] = (
    "trainer", "reward", "seed", "update", "images", "rows", "seconds", "value", "std", "drift",
    "frechet",
)  # fmt: skip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/study_finetune"))
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, help="of sampling, for every trainer")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--trainers", nargs="+", default=list(TRAINERS), choices=list(TRAINERS))
    parser.add_argument("--rewards", nargs="+", default=list(REWARDS), choices=list(REWARDS))
    parser.add_argument("--prompts", type=int, default=32, help="how many captions to train on")
    parser.add_argument("--images", type=int, default=0, help="of the final Fréchet distance")
    parser.add_argument("--plot", type=Path, help="only plot what is in --out")
    options = parser.parse_args()
    if options.plot is not None:
        plot(options.out / "curves.csv", options.plot)
        return
    rows: list[dict[str, Any]] = []
    for reward in options.rewards:
        for trainer in options.trainers:
            for seed in options.seeds:
                rows += one_run(trainer, reward, seed, options)
                write(rows, options.out / "curves.csv")


def one_run(trainer: str, reward: str, seed: int, options: argparse.Namespace) -> list[Any]:
    """Trains, or reads what is there; one record per evaluation."""
    plan, folder = TRAINERS[trainer], options.out / f"{reward}-{trainer}-{seed}"
    captions = [p.text for p in bundled.prompts(options.prompts)]
    engine = sampler.load()
    settings = {
        "batch": options.batch,
        "micro": min(8, options.batch),
        "steps": options.steps or plan["steps"],
        "seed": seed,
        "guidance": plan.get("guidance"),
        "eval_every": max(1, options.updates // 10),
        "eval_prompts": tuple(captions[:16]),
    }
    report = sampler.finetune(
        engine,
        plan["trainer"],
        REWARDS[reward][trainer != "alignprop"],
        captions,
        folder,
        options.updates,
        settings=settings,
        progress=lambda record: print(json.dumps({"run": folder.name, **record}), flush=True),
    )
    rows, spent = [], {"images": 0, "rows": 0, "seconds": 0.0}
    for record in report.log:
        if record["kind"] == "update":
            spent = {
                "images": record["images"],
                "rows": record["rows"],
                "seconds": spent["seconds"] + record["seconds"],
            }
            continue
        row = {"trainer": trainer, "reward": reward, "seed": seed, **spent}
        row |= {"update": record["update"], "value": record["reward"], "std": record["reward_std"]}
        rows.append(row | {"drift": record["drift"], "frechet": ""})
    if options.images:
        load_lora(engine, report.lora)
        method = sampler.build("trainer", plan["trainer"]).defaults.sampler
        chosen = {"steps": settings["steps"], "guidance": settings["guidance"], "sampler": method}
        rows[-1]["frechet"] = frechet(engine, captions, chosen, options.images)
        unload_lora(engine)
    return rows


def frechet(engine: Any, captions: list[str], chosen: dict[str, Any], count: int) -> float:
    """The Fréchet distance of `count` samples to the shipped statistics of composites."""
    from sampler.bundled import classifier, measures

    prompts = [captions[i % len(captions)] for i in range(count)]
    images = engine.generate(
        prompts, seeds=list(range(count)), output="tensor", batch_size=16, **chosen
    ).images
    features = measures.extracted_features(classifier.load(), images)
    found = classifier.feature_statistics(features)
    return classifier.frechet_distance(*found, *classifier.reference_statistics())


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """All records so far, as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)


def plot(source: Path, target: Path) -> None:
    """Reward against images and against seconds; mean over seeds with all of them behind."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = list(csv.DictReader(source.open(encoding="utf-8")))
    rewards = list(dict.fromkeys(row["reward"] for row in rows))
    figure, axes = plt.subplots(
        2, len(rewards), figsize=(4 * len(rewards), 6), squeeze=False, layout="constrained"
    )
    for column, reward in enumerate(rewards):
        for line, against in enumerate(("images", "seconds")):
            axis = axes[line][column]
            for number, trainer in enumerate(TRAINERS):
                seeds = sorted({r["seed"] for r in rows if r["trainer"] == trainer})
                for seed in seeds:
                    mine = [r for r in rows if (r["trainer"], r["reward"], r["seed"]) ==
                            (trainer, reward, seed)]  # fmt: skip
                    xs, ys = ([float(r[k]) for r in mine] for k in (against, "value"))
                    label = trainer if seed == seeds[0] else None
                    axis.plot(xs, ys, color=f"C{number}", alpha=0.7, label=label)
            axis.set_xlabel("images made" if against == "images" else "seconds")
            axis.set_title(reward)
    axes[0][0].set_ylabel("reward")
    axes[0][0].legend()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=150)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
