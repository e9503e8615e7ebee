"""The guidance study of docs/guidance.md, on the bundled model: images, figures and the document.

    python scripts/study_guidance.py images --out runs/study_guidance   # resumable
    python scripts/study_guidance.py report --out runs/study_guidance     # CSV, figures, document

Same prompts and seeds at every point. The network runs in bfloat16 (state, guidance and decoding
in float32), one thread.
"""

from __future__ import annotations

import csv
import json
import re
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from study_points import POINTS, Point
from torch import Tensor

import sampler
from sampler.binding import fingerprint
from sampler.bundled import classifier, prompts
from sampler.bundled.measures import clipped_share, extracted_features, saturation
from sampler.guidance.linear_ag_coefficients import Coefficients
from sampler.pipelines.classes import BundledClasses

DOCS = Path(__file__).resolve().parents[1] / "docs"
CHUNK = 64
DRAWS = 200
app = typer.Typer(add_completion=False)
Out = Annotated[Path, typer.Option(help="Folder of the images of every point.")]


@app.command()
def images(
    out: Out,
    count: Annotated[int, typer.Option(help="Images per point.")] = 256,
    points: Annotated[str, typer.Option(help="Only these, by name, comma-separated.")] = "",
    model: Annotated[str | None, typer.Option(help="Another copy of the bundled pipeline.")] = None,
    weak: Annotated[str | None, typer.Option(help="Another copy of the weak network.")] = None,
) -> None:
    """Make the images of every point that lacks some."""
    torch.set_num_threads(1)
    engine = sampler.load(model, dtype="bfloat16", weak=weak)
    adapter = engine.pipeline
    adapter.pipe.vae.float()
    adapter.classes = BundledClasses(adapter)
    wanted = [p for p in POINTS if not points or p.name in points.split(",")]
    for point in wanted:
        if "autoguidance" in point.name or "weak" in point.name:
            if "weak" not in adapter.models:
                continue
        folder = out / _folder_name(point)
        folder.mkdir(parents=True, exist_ok=True)
        for first in range(0, count, CHUNK):
            file = folder / f"{first:05d}.npz"
            if not file.exists():
                _chunk(engine, point, first, min(CHUNK, count - first), file)
        print(point.name, flush=True)


def _folder_name(point: Point) -> str:
    return re.sub(r"[^a-z0-9.]+", "_", point.name)


def _chunk(engine: Any, point: Point, first: int, count: int, file: Path) -> None:
    spec = point.spec
    if isinstance(spec, dict) and spec.get("coefficients") == "held":
        spec = {**spec, "coefficients": held(Coefficients.load("bundled"))}
    texts = [p.text for p in prompts(count, start=first)]
    started = time.process_time()
    made = engine.generate(
        texts, seeds=first, steps=20, guidance=spec, batch_size=CHUNK, output="tensor"
    )
    seconds = time.process_time() - started
    pixels = (made.images * 255).round().to(torch.uint8).numpy()
    key = fingerprint(engine.pipeline.network)
    part = file.with_suffix(".part.npz")
    np.savez(part, images=pixels, nfe=np.array(made.nfe), seconds=seconds, model=key)
    part.rename(file)


def held(fitted: Coefficients) -> Coefficients:
    """Coefficients that hold the last real c − u: û_t = c_t − (c_k − u_k), at the same steps."""
    policy, cond, uncond = fitted.keys["policy"], [], []
    for t in range(fitted.steps):
        last = max(i for i in range(t + 1) if policy[i])
        a, b = [0.0] * (t + 1), [0.0] * t
        if last < t:
            a[t], a[last], b[last] = 1.0, -1.0, 1.0
        cond.append(tuple(a))
        uncond.append(tuple(b))
    return Coefficients(tuple(cond), tuple(uncond), fitted.keys)


@app.command()
def report(out: Out, docs: Annotated[Path, typer.Option(help="Where it goes.")] = DOCS) -> None:
    """Measure all images that are there; write the CSV, the figures and the document."""
    from study_guidance_report import write_document, write_figures

    loaded = {p: _load(out / _folder_name(p)) for p in POINTS}
    loaded = {p: v for p, v in loaded.items() if v is not None}
    base = next(v["images"] for p, v in loaded.items() if p.name == "cfg 3")
    rows = [_measured(point, value, base) for point, value in loaded.items()]
    folder = docs / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "guidance_study.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    write_figures(folder, rows, {p.name: v["images"] for p, v in loaded.items()})
    write_document(docs / "guidance.md", folder / "guidance_study.csv")


def _load(folder: Path) -> dict[str, Any] | None:
    parts = [np.load(file) for file in sorted(folder.glob("?????.npz"))]
    if not parts:
        return None
    pixels = np.concatenate([part["images"] for part in parts])
    return {
        "images": torch.from_numpy(pixels).float() / 255,
        "nfe": np.concatenate([part["nfe"] for part in parts]),
        "seconds": sum(float(part["seconds"]) for part in parts),
        "model": str(parts[0]["model"]),
    }


def _measured(point: Point, value: dict[str, Any], base: Tensor) -> dict[str, Any]:
    """One row of the CSV; intervals are 95 % bootstrap over the images."""
    model, reference = classifier.load(), classifier.reference_statistics()
    pictures = value["images"]
    asked = prompts(len(pictures))
    with torch.no_grad():
        features = extracted_features(model, pictures)
        logits = model.logits(features)
    concept = logits.concept.argmax(1) == torch.tensor([p.concept for p in asked])
    background = logits.background.argmax(1) == torch.tensor([p.background for p in asked])
    right = (concept & background).double()
    same = ssim(pictures, base[: len(pictures)])

    def distance(rows: Tensor) -> float:
        found = classifier.feature_statistics(features[rows])
        return classifier.frechet_distance(*found, *reference)

    everything = torch.arange(len(pictures))
    row: dict[str, Any] = {
        "point": point.name,
        "study": point.study,
        "images": len(pictures),
        "rows": round(float(value["nfe"].mean()), 2),
        "concept": round(float(concept.double().mean()), 4),
        "background": round(float(background.double().mean()), 4),
    }
    measures = {
        "accuracy": (lambda rows: float(right[rows].mean()), 4),
        "frechet": (distance, 2),
        "ssim": (lambda rows: float(same[rows].mean()), 4),
        "saturation": (lambda rows: saturation(pictures[rows]), 4),
        "clipped": (lambda rows: clipped_share(pictures[rows]), 4),
    }
    g = torch.Generator().manual_seed(0)
    draws = [torch.randint(len(pictures), (len(pictures),), generator=g) for _ in range(DRAWS)]
    for name, (measure, digits) in measures.items():
        low, high = np.quantile([measure(rows) for rows in draws], (0.025, 0.975))
        row[name] = round(measure(everything), digits)
        row[f"{name}_low"], row[f"{name}_high"] = round(low, digits), round(high, digits)
    row["cpu_seconds_per_image"] = round(value["seconds"] / len(pictures), 3)
    row["model"] = value["model"]
    row["spec"] = json.dumps(point.spec)
    return row


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of images [B, 3, H, W] in [0, 1], mean per image [B].

    Wang et al. (2004): Gaussian window of 11 pixels, sigma 1.5, K = (0.01, 0.03), each channel.
    """
    taps = torch.exp(-((torch.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window = torch.outer(taps, taps) / taps.sum() ** 2

    def mean(x: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(x.flatten(0, 1)[:, None], window[None, None])

    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma * ma, mean(b * b) - mb * mb, mean(a * b) - ma * mb
    c1, c2 = 0.01**2, 0.03**2
    value = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    return value.flatten(1).mean(1).view(a.shape[0], -1).mean(1)


if __name__ == "__main__":
    app()
