"""The study of `forecast` on the bundled model: images, and the figures of every point.

    python -m scripts.study.forecast images --out runs/study_forecast   # resumable
    python -m scripts.study.forecast report --out runs/study_forecast   # docs/figures/forecast.csv

Float32, one thread, batches of 8. Three seeds, each with prompts of its own. SSIM is to the same
run without forecasts: the same prompts, seeds, sampler family's base (DDIM) and number of steps.
"""

from __future__ import annotations

import csv
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

import sampler
from sampler.bundled import classifier, prompts
from sampler.bundled.measures import clipped_share, extracted_features
from sampler.guidance import Forecast
from sampler.metrics import ssim
from sampler.types import Branch, Cond, GuidanceBase, Prediction

DOCS = Path(__file__).resolve().parents[2] / "docs"
SEEDS = (0, 1, 2)
CFG: dict[str, Any] = {"name": "cfg", "scale": 3.0}
POLICY = tuple(int(c) for c in "11110100100100100101")
HOLD = {"name": "adaptive", "rule": CFG, "threshold": 0.95, "after": "hold"}
app = typer.Typer(add_completion=False)
Out = Annotated[Path, typer.Option(help="Folder of the images of every point.")]


@dataclass(frozen=True)
class AsX0(GuidanceBase):
    """CFG as a prediction of x0, on which EasyCache's criterion is ComfyUI's LazyCache."""

    rule: Any = sampler.build("guidance", CFG)

    @property
    def needs(self) -> frozenset[str]:
        return self.rule.needs

    def plan(self, x: Any, span: Any, cond: Cond, state: Any) -> dict[str, Branch]:
        return dict(self.rule.plan(x, span, cond, ()))

    def combine(self, x: Any, preds: Any, span: Any, state: Any) -> tuple[Prediction, Any]:
        pred, _ = self.rule.combine(x, preds, span, ())
        return Prediction.from_x0(x, pred.x0, span.now), state


@dataclass(frozen=True)
class Point:
    """name: its row in the CSV; steps, sampler, spec: of the run; base: the point compared to."""

    name: str
    spec: Any
    steps: int = 20
    sampler: str = "ddim"
    base: str = "cfg, 20 steps"


def ours(**fields: Any) -> dict[str, Any]:
    return {"name": "forecast", "rule": CFG, **fields}


SD_CPP = {"basis": "chebyshev", "degree": 3, "ridge": 1.0, "blend": 0.4, "space": "native"}
SPECTRUM = {"basis": "chebyshev", "degree": 4, "ridge": 0.1, "space": "native", "warmup": 5}
LAZY = Forecast(rule=AsX0(), when="change", form="comfyui", threshold=0.2)
FORTY: dict[str, Any] = {"steps": 40, "base": "cfg, 40 steps"}
POINTS = (
    Point("cfg, 20 steps", CFG),
    Point("forecast 0.016", ours()),
    Point("forecast 0.024", ours(tolerance=0.024)),
    Point("forecast, policy of 20 evaluations", ours(policy=POLICY)),
    Point("forecast, window", ours(when="window")),
    Point("cfg, 11 steps", CFG, 11),
    Point("cfg, 11 steps of dpmpp_2m", CFG, 11, "dpmpp_2m"),
    Point("cfg, 10 steps", CFG, 10),
    Point("cfg, 10 steps of dpmpp_2m", CFG, 10, "dpmpp_2m"),
    Point("easycache 0.1", ours(when="change")),
    Point("easycache 0.2", ours(when="change", threshold=0.2)),
    Point("lazycache 0.2", LAZY),
    Point("spectrum, sd.cpp", ours(when="window", **SD_CPP)),
    Point("spectrum, published", ours(when="window", growth=0.75, **SPECTRUM)),
    Point("linear_ag", {"name": "linear_ag"}),
    Point("adaptive, hold", HOLD),
    Point("forecast over adaptive, hold", {"name": "forecast", "rule": HOLD}),
    Point("forecast 0.016, whole batch", ours(compact="batch")),
    Point("cfg, 40 steps", CFG, **FORTY),
    Point("forecast 0.012, 40 steps", ours(tolerance=0.012), **FORTY),
    Point("forecast 0.024, 40 steps", ours(tolerance=0.024), **FORTY),
    Point("cfg, 14 steps", CFG, 14, base="cfg, 40 steps"),
    Point("cfg, 14 steps of dpmpp_2m", CFG, 14, "dpmpp_2m", base="cfg, 40 steps"),
)


@app.command()
def images(
    out: Out,
    count: Annotated[int, typer.Option(help="Images per point and seed.")] = 48,
    only: Annotated[str, typer.Option(help="Points whose name or base has this in it.")] = "",
    seconds: Annotated[float, typer.Option(help="Begin no point after this time.")] = 400.0,
) -> None:
    """Make the images that are missing; ends with a word when all are there."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    engine, began = sampler.load(), time.monotonic()
    for number, point in enumerate(POINTS):
        for seed in SEEDS if only in f"{point.name} {point.base}" else ():
            file = out / f"{number:02d}_{seed}.npz"
            if file.exists():
                continue
            if time.monotonic() - began > seconds:
                return
            _chunk(engine, point, seed, count, file)
            print(point.name, seed, flush=True)
    print("complete", flush=True)


def _chunk(engine: Any, point: Point, seed: int, count: int, file: Path) -> None:
    texts = [p.text for p in prompts(count, start=seed * count)]
    run: dict[str, Any] = {"steps": point.steps, "sampler": point.sampler, "batch_size": 8}
    started = time.process_time()
    made = engine.generate(texts, seeds=1000 * seed, guidance=point.spec, output="tensor", **run)
    spent = time.process_time() - started
    pixels = (made.images * 255).round().to(torch.uint8).numpy()
    part = file.with_suffix(".part.npz")
    np.savez(part, images=pixels, nfe=np.array(made.nfe), seconds=spent)
    part.rename(file)


@app.command()
def report(out: Out, docs: Annotated[Path, typer.Option(help="Where it goes.")] = DOCS) -> None:
    """Measure the images that are there; write the CSV, with its old rows of other points."""
    model, path = classifier.load(), docs / "figures" / "forecast.csv"
    with path.open(encoding="utf-8") as file:
        old = {(row["point"], int(row["seed"])): row for row in csv.DictReader(file)}
    found = [
        row
        for n, p in enumerate(POINTS)
        for s in SEEDS
        if (row := _measured(model, out, n, p, s) or old.get((p.name, s)))
    ]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(found[0]))
        writer.writeheader()
        writer.writerows(found)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The lines of the table in docs/howto/half_the_calls.md: means of the seeds, least SSIM."""
    lines = [
        "| setting | NFE | SSIM | worst image | accuracy | CPU s |",
        "|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["point"] for row in rows):
        own = [row for row in rows if row["point"] == name]
        if len(own) < len(SEEDS):
            continue

        def mean(key: str, own: list[dict[str, Any]] = own) -> float:
            return sum(float(row[key]) for row in own) / len(own)

        worst = min(float(row["worst_ssim"]) for row in own)
        cells = [name, f"{mean('rows'):.1f}", f"{mean('ssim'):.4f}", f"{worst:.3f}"]
        cells += [f"{mean('accuracy'):.3f}", f"{mean('cpu_seconds_per_image'):.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _measured(model: Any, out: Path, number: int, point: Point, seed: int) -> dict[str, Any] | None:
    file = out / f"{number:02d}_{seed}.npz"
    if not file.exists():
        return None
    base = [p.name for p in POINTS].index(point.base)
    value, other = np.load(file), np.load(out / f"{base:02d}_{seed}.npz")
    pictures, before = (torch.from_numpy(v["images"]).float() / 255 for v in (value, other))
    asked = prompts(len(pictures), start=seed * len(pictures))
    with torch.no_grad():
        logits = model.logits(extracted_features(model, pictures))
    concept = logits.concept.argmax(1) == torch.tensor([p.concept for p in asked])
    background = logits.background.argmax(1) == torch.tensor([p.background for p in asked])
    same, rows = ssim(pictures, before), value["nfe"]
    return {
        "point": point.name,
        "base": point.base,
        "seed": seed,
        "images": len(pictures),
        "rows": round(float(rows.mean()), 2),
        "least_rows": int(rows.min()),
        "most_rows": int(rows.max()),
        "ssim": round(float(same.mean()), 4),
        "worst_ssim": round(float(same.min()), 4),
        "accuracy": round(float((concept & background).double().mean()), 4),
        "clipped": round(float(clipped_share(pictures)), 4),
        "cpu_seconds_per_image": round(float(value["seconds"]) / len(pictures), 3),
    }


if __name__ == "__main__":
    app()
