"""The guidance study of docs/guidance_study.md, on the bundled model: images, figures, pages.

    python -m scripts.study.guidance images --out runs/study_guidance   # resumable
    python -m scripts.study.guidance overhead                          # cost of the rules alone
    python -m scripts.study.guidance real --sprites emoji/sprites.npz   # the training images
    python -m scripts.study.guidance report --out runs/study_guidance     # CSV, figures, document

Same prompts and seeds at every point. The network runs in bfloat16 (state, guidance and decoding
in float32), one thread.
"""

from __future__ import annotations

import csv
import platform
import re
import time
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
import typer

import sampler
from sampler.bundled import prompts
from sampler.bundled.measures import clipped_share, saturation
from sampler.core.binding import network_hash
from sampler.guidance.linear_ag_coefficients import Coefficients
from sampler.pipelines.classes import BundledClasses
from scripts.study.guidance_measures import measured
from scripts.study.points import POINTS, SCALE, Point

DOCS = Path(__file__).resolve().parents[2] / "docs"
CHUNK = 64
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
    """Generate the missing images of every point."""
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
    key = network_hash(engine.pipeline.network)
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
    """Measure all existing images; write the CSV, the figures and the document."""
    from scripts.study.guidance_document import write_documents
    from scripts.study.guidance_figures import write_figures

    found = [(point, _load(out / _folder_name(point))) for point in POINTS]
    loaded = [(point, value) for point, value in found if value is not None]
    base = next(value["images"] for point, value in loaded if point.name == "cfg 3")
    rows = [measured(point, value, base) for point, value in loaded]
    folder = docs / "figures"
    _write(folder / "guidance_study.csv", rows)
    write_figures(folder, rows, {p.name: v["images"] for p, v in loaded})
    write_documents(docs, folder)


@app.command()
def real(
    sprites: Annotated[Path, typer.Option(help="Made by scripts/bundled/prepare_emoji.py.")],
    docs: Annotated[Path, typer.Option(help="Where it goes.")] = DOCS,
) -> None:
    """Measure the training images, for saturation and clipping."""
    from scripts.bundled.emoji_data import EmojiData

    pictures = EmojiData(sprites).batch(2048, 0, 0).images / 2 + 0.5
    row = {
        "images": len(pictures),
        "saturation": round(saturation(pictures), 4),
        "clipped": round(clipped_share(pictures), 4),
    }
    _write(docs / "figures" / "guidance_real.csv", [row])


@app.command()
def overhead(docs: Annotated[Path, typer.Option(help="Where it goes.")] = DOCS) -> None:
    """Measure the rules' own CPU time per step, batch 8, against the network's (float32)."""
    torch.set_num_threads(1)
    adapter = sampler.load().pipeline
    asked, size = prompts(8), adapter.size(None, None)
    cond = adapter.encode([p.text for p in asked], [""] * 8, True, size)
    levels = adapter.grid(20, size)
    x = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    out = torch.randn(16, 4, 16, 16, generator=torch.Generator().manual_seed(16))
    stub = sampler.Engine(sampler.denoiser(lambda x, level, c: out[: len(x)], "v"))

    def clocked(engine: Any, rule: Any, repeats: int) -> float:
        """Milliseconds of CPU per step: the least of the repeats."""
        taken = []
        for _ in range(repeats):
            started = time.process_time()
            engine.run(x, levels, cond, "ddim", rule, list(range(8)))
            taken.append(time.process_time() - started)
        return 1000 * min(taken) / (len(levels) - 1)

    network = clocked(sampler.Engine(cast(Any, adapter)), {"name": "cfg", "scale": SCALE}, 3)
    machine = f"{platform.processor() or platform.machine()}, one thread, torch {torch.__version__}"
    rows, bare = [], clocked(stub, "none", 10)
    for spec in RULES:
        cost = clocked(stub, spec, 10) - bare
        words = (spec["name"], spec.get("rule", {}).get("name"), "rescale" in spec and "rescaled")
        rows.append(
            {
                "rule": " ".join(word for word in words if word),
                "rule_ms": round(cost, 4),
                "network_ms": round(network, 2),
                "machine": machine,
            }
        )
    _write(docs / "figures" / "guidance_overhead.csv", rows)


RULES: tuple[dict[str, Any], ...] = (
    {"name": "cfg", "scale": SCALE},
    {"name": "cfg", "scale": SCALE, "rescale": 0.7},
    {"name": "apg", "momentum": -0.5},
    {"name": "cfg_zero", "zero_init_steps": 0},
    {"name": "adaptive", "rule": {"name": "cfg"}, "threshold": 1.0},
    {"name": "adaptive", "rule": {"name": "apg", "momentum": -0.5}, "threshold": 1.0},
    {"name": "linear_ag"},
    {"name": "forecast", "rule": {"name": "cfg"}},
)


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


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


if __name__ == "__main__":
    app()
