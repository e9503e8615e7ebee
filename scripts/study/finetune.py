"""Reward fine-tuning on the bundled models: reward against images and CPU time, and drift.

    python -m scripts.study.finetune train --out runs/study_finetune --seeds 0 1 2
    python -m scripts.study.finetune sweep --out runs/study_finetune
    python -m scripts.study.finetune plot  --out runs/study_finetune --figures docs/figures

AlignProp and DDPO tune the bundled model, RLCM its few-step student. All three follow the same
differentiable rewards, which the policies see as numbers only, without classifier-free guidance (it
would leave the classifier and the colours nothing to gain). Each run is a folder below --out and
resumes there; a call goes on with what is missing, seed by seed.

`train` writes finetune_curves.csv: one line per evaluation, with the reward of 16 fixed prompts and
seeds, images made and process CPU seconds of the updates so far, and the drift from the base model.
`sweep` loads the final adapters of seed 0 with weights 0 to 1 and writes finetune_mix.csv: reward,
JPEG size, drift, and Fréchet distance to real composites in the bundled classifier's features.
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
from sampler.bundled import classifier, measures
from sampler.models.lora import load_lora, unload_lora
from sampler.rewards.scoring import score
from scripts.study.finetune_plots import curves, strips
from scripts.study.finetune_summary import FIELDS, summary

REWARDS = ("soft_compressibility", "classifier", "colour_agreement")
# Per trainer: model, trainer, sampling, images per update, updates, updates between evaluations.
TRAINERS: dict[str, dict[str, Any]] = {
    "alignprop": {
        "model": "bundled",
        "trainer": {"name": "alignprop", "truncation": "fixed", "k": 1},
        "fit": {"steps": 8, "guidance": "none", "batch": 8, "updates": 24, "eval_every": 3},
    },
    "ddpo": {
        "model": "bundled",
        "trainer": {"name": "ddpo"},
        "fit": {"steps": 8, "guidance": "none", "batch": 32, "updates": 16, "eval_every": 4},
    },
    "rlcm": {
        "model": "bundled-lcm",
        "trainer": {"name": "rlcm"},
        "fit": {
            "steps": 4,
            "guidance": {"name": "embedded", "scale": 1.0},
            "batch": 32,
            "updates": 24,
            "eval_every": 4,
        },
    },
}
COMMON = {"lr": 1e-3, "micro": 32, "mixed_precision": "bf16", "checkpoint_every": 5}
CURVES = ("reward", "trainer", "seed", "update", "images", "cpu_seconds", "value", "std", "drift")
MIX = ("reward", "trainer", "weight", "value", "jpeg_kb", "drift", "frechet", "images")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("task", choices=["train", "sweep", "plot"])
    parser.add_argument("--out", type=Path, default=Path("runs/study_finetune"))
    parser.add_argument("--figures", type=Path, default=Path("docs/figures"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--trainers", nargs="+", default=list(TRAINERS), choices=list(TRAINERS))
    parser.add_argument("--rewards", nargs="+", default=list(REWARDS), choices=REWARDS)
    parser.add_argument("--prompts", type=int, default=16, help="captions to train on")
    parser.add_argument("--images", type=int, default=64, help="per point of the sweep")
    parser.add_argument("--updates", type=int, help="of every run, to try the script")
    options = parser.parse_args()
    if options.task == "plot":
        plot(options)
        return
    for seed in options.seeds if options.task == "train" else [0]:
        for reward in options.rewards:
            for trainer in options.trainers:
                if options.task == "train":
                    train(trainer, reward, seed, options)
                else:
                    sweep(trainer, reward, options)


def captions(count: int) -> list[str]:
    """Prompts "a {concept} on a {background} background"."""
    return [p.text for p in bundled.prompts(128)][:: max(1, 128 // count)][:count]


def train(trainer: str, reward: str, seed: int, options: argparse.Namespace) -> None:
    """Train or resume one run, and write the curves of all runs so far."""
    plan, folder = TRAINERS[trainer], options.out / f"{reward}-{trainer}-{seed}"
    texts = captions(options.prompts)
    settings = {**COMMON, **plan["fit"], "seed": seed, "eval_prompts": tuple(texts[:16])}
    if options.updates is not None:
        settings |= {"updates": options.updates, "eval_every": 1}
    if not (folder / "lora" / "manifest.json").is_file():
        sampler.finetune(
            sampler.load(plan["model"]), plan["trainer"], reward, texts, folder,
            settings=settings,
            progress=lambda record: print(json.dumps({"run": folder.name, **record}), flush=True),
        )  # fmt: skip
    write(options.out / "finetune_curves.csv", CURVES, records(options.out))


def records(out: Path) -> list[dict[str, Any]]:
    """One line per evaluation of every run below `out`."""
    rows = []
    for path in sorted(out.glob("*/log.jsonl")):
        reward, trainer, seed = path.parent.name.rsplit("-", 2)
        images, spent = 0, 0.0
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if record["kind"] == "update":
                images, spent = record["images"], spent + record["cpu_seconds"]
                continue
            row = {"reward": reward, "trainer": trainer, "seed": seed, "update": record["update"]}
            row |= {"images": images, "cpu_seconds": round(spent, 2), "drift": record["drift"]}
            rows.append(row | {"value": record["reward"], "std": record["reward_std"]})
    return rows


@torch.no_grad()
def sweep(trainer: str, reward: str, options: argparse.Namespace) -> None:
    """Evaluate the final LoRA of seed 0 at several weights: the trade-off of `mix`."""
    folder, path = options.out / f"{reward}-{trainer}-0", options.out / "finetune_mix.csv"
    rows: list[dict[str, Any]] = read(path) if path.is_file() else []
    if not (folder / "lora").is_dir() or (reward, trainer) in {
        (r["reward"], r["trainer"]) for r in rows
    }:
        return
    plan, judge = TRAINERS[trainer], sampler.build("reward", reward)
    engine, size = sampler.load(plan["model"]), sampler.build("reward", "compressibility")
    texts = [captions(options.prompts)[i % options.prompts] for i in range(options.images)]
    method = sampler.build("trainer", plan["trainer"]).defaults.sampler
    found, base = [], None
    for weight in (0.0, 0.25, 0.5, 0.75, 1.0):
        load_lora(engine, (folder, weight))
        made = engine.generate(
            texts, seeds=list(range(len(texts))), steps=plan["fit"]["steps"], sampler=method,
            guidance=plan["fit"]["guidance"], batch_size=16, output="tensor",
        )  # fmt: skip
        unload_lora(engine)
        base = made.latents if base is None else base
        features = measures.extracted_features(classifier.load(), made.images)
        statistics = (
            *classifier.feature_statistics(features),
            *classifier.reference_statistics(),
        )
        found.append(
            {
                "reward": reward, "trainer": trainer, "weight": weight,
                "value": float(score(judge, made.images, texts).mean()),
                "jpeg_kb": -float(score(size, made.images, texts).mean()),
                "drift": float((made.latents - base).square().mean()),
                "frechet": classifier.frechet_distance(*statistics), "images": len(texts),
            }
        )  # fmt: skip
        if weight in (0.0, 1.0):
            torch.save(made.images[:8].half(), options.out / f"{reward}-{trainer}-{weight:g}.pt")
    write(path, MIX, rows + found)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a CSV."""
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path: Path, fields: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    """Write all lines as CSV, creating the parent folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Round numbers to four digits."""
    return {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}


def plot(options: argparse.Namespace) -> None:
    """The figures, the summary, and copies of the CSVs beside them."""
    options.figures.mkdir(parents=True, exist_ok=True)
    rows, mix = (read(options.out / f"finetune_{name}.csv") for name in ("curves", "mix"))
    found = [rounded(row) for row in summary(rows, mix)]
    write(options.figures / "finetune_summary.csv", FIELDS, found)
    for name in ("finetune_curves.csv", "finetune_mix.csv"):
        text = (options.out / name).read_text(encoding="utf-8")
        (options.figures / name).write_text(text, encoding="utf-8")
    curves(rows, mix, options.figures / "finetune_curves.png")
    strips(options.out, REWARDS, options.figures / "finetune_strips.png")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
