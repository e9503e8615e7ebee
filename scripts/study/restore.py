"""Methods of `engine.restore` on the bundled model: error, fit and coverage by the spread.

    python -m scripts.study.restore measure SPRITES   docs/figures/restore.csv
    python -m scripts.study.restore picture           docs/figures/restore.png

x4 super-resolution with noise 0.05 (in units of [-1, 1]); three samples per image, by three seeds.
Coverage is the share of pixels whose true value lies between the least and the greatest of the
three samples: 0.5 for samples of the posterior, whatever it is.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import sampler
from sampler.bundled import prompts
from sampler.samplers import operators
from sampler.samplers.measurement import measurement
from sampler.samplers.methods import METHODS, Problem, strategies
from sampler.samplers.variational import VBLE
from scripts.study.restore_tables import ORDER
from scripts.study.samplers_inverse import MEASURED
from scripts.study.samplers_restore import dps, pictures, psnr

NOISE, SEEDS, STEPS, BATCH = 0.05, 3, 24, 16
ZETA = 5.0  # of dps, tuned for this operator: figures/samplers_tuning.csv
OWN, REAL = 16, 64
SLOW, FEW = ("admm", "vble"), 16  # the first of the real images alone
OPERATOR = {"name": "superres", "factor": 4}
FIGURES = Path("docs/figures")
SHOWN = ({"name": "superres", "factor": 4}, {"name": "deblur"},
         {"name": "inpaint", "mask": "configs/images/apple_mask.png"})  # fmt: skip
SIDE, GAP = 128, 4  # of a picture in the sheet

app = typer.Typer(help="Methods of image restoration.", no_args_is_help=True)


def sets(engine: sampler.Engine, sprites: Path) -> Iterator[tuple[str, list[str], Tensor]]:
    """Yield (name, prompts, images in [0, 1]): the model's own images, and real composites."""
    from scripts.bundled.emoji_data import EmojiData

    own = [prompt.text for prompt in prompts(OWN, start=MEASURED[0])]
    yield "own", own, pictures(engine, MEASURED, OWN)
    batch = EmojiData(sprites).batch(2 * REAL, 4_000_003, 0)
    chosen = [i for i, text in enumerate(batch.captions) if text][:REAL]
    yield "real", [batch.captions[i] for i in chosen], batch.images[chosen] / 2 + 0.5


def samples(engine: sampler.Engine, method: str, texts: list[str], y: Tensor) -> Tensor:
    """Restorations [SEEDS, B, 3, H, W] of measurements y [B, ...]; one where none is drawn."""
    if method == "pseudo-inverse":
        return (operators.build(OPERATOR).A_dagger(y) / 2 + 0.5).clamp(0, 1)[None]
    parts: list[Tensor] = []
    for k in range(0, len(y), BATCH):
        part = _drawn(engine, method, texts[k : k + BATCH], y[k : k + BATCH], k)
        parts.append(part.clamp(0, 1))
    return torch.cat(parts, 1)


def _drawn(engine: sampler.Engine, method: str, texts: list[str], y: Tensor, first: int) -> Tensor:
    """Restorations [SEEDS, B, 3, H, W] of one batch, which begins at an image."""
    rows = [[1000 * seed + first + i for i in range(len(y))] for seed in range(SEEDS)]
    if method == "vble":  # three draws of one distribution
        made = measurement(OPERATOR, y, name="vble", needs_start=True)
        found = VBLE(NOISE, samples=SEEDS).restore(engine.pipeline, made, (64, 64), rows[0], SEEDS)
        return found.images.transpose(0, 1)
    if method == "dps":
        operator = operators.build(OPERATOR)
        drawn = [dps(engine, operator, y, texts, seeds, ZETA, STEPS) for seeds in rows]
        return torch.stack(drawn)
    noise = NOISE if METHODS[method].needs_noise else None
    _, spec, rule = strategies(method, Problem(OPERATOR, y, noise))
    for solver in (spec, rule):  # average pooling needs no more
        if isinstance(solver, dict) and solver["name"] in ("daps", "data", "admm"):
            solver["cg"] = 2
    run: dict[str, Any] = {"steps": STEPS, "sampler": spec, "guidance": rule}
    run |= {"batch_size": BATCH, "output": "tensor"}
    return torch.stack([engine.generate(texts, seeds=seeds, **run).images for seeds in rows])


def measured(found: Tensor, truth: Tensor, y: Tensor) -> dict[str, Any]:
    """Errors in dB, distance to y, and coverage, each with the standard error over images."""
    seen = operators.build(OPERATOR).A(found.flatten(0, 1) * 2 - 1) - y.repeat(len(found), 1, 1, 1)
    row: dict[str, Any] = {"psnr": torch.stack([psnr(one, truth) for one in found]).mean(0)}
    row["psnr_of_mean"] = psnr(found.mean(0), truth)
    row["misfit"] = seen.square().mean((1, 2, 3)).sqrt().view(len(found), -1).mean(0)
    if len(found) > 1:
        inside = (found.amin(0) <= truth) & (truth <= found.amax(0))
        row["coverage"] = inside.double().mean((1, 2, 3))
    out: dict[str, Any] = {}
    for name, values in row.items():
        out |= {name: float(values.mean()), f"{name}_se": float(values.std() / len(values) ** 0.5)}
    return out


@app.command()
def measure(
    sprites: Annotated[Path, typer.Argument(help="Made by scripts/bundled/prepare_emoji.py.")],
    out: Annotated[Path, typer.Option(help="CSV to write; its rows are kept.")] = FIGURES
    / "restore.csv",
) -> None:
    """Measure every method on both sets; rows that the file has are not measured again."""
    torch.set_num_threads(1)
    engine, fields = sampler.load(), ["set", "method", "images", "steps"]
    fields += [f"{name}{end}" for name in ("psnr", "psnr_of_mean", "misfit", "coverage")
               for end in ("", "_se")]  # fmt: skip
    done = list(csv.DictReader(out.open())) if out.exists() else []
    known = {(row["set"], row["method"]) for row in done}
    with out.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, fields)
        if not done:
            writer.writeheader()
        for name, texts, truth in sets(engine, sprites):
            y = operators.measure(operators.build(OPERATOR), truth * 2 - 1, NOISE / 2, seed=77)
            for method in ORDER:
                if (name, method) in known:
                    continue
                n = FEW if method in SLOW else len(y)
                row = measured(samples(engine, method, texts[:n], y[:n]), truth[:n], y[:n])
                row = {k: round(v, 4) for k, v in row.items()}
                steps = {"pseudo-inverse": 0, "vble": VBLE.iterations}.get(method, STEPS)
                writer.writerow({"set": name, "method": method, "images": n,
                                 "steps": steps, **row})  # fmt: skip
                stream.flush()


@app.command()
def picture(
    out: Annotated[Path, typer.Option(help="PNG to write.")] = FIGURES / "restore.png",
) -> None:
    """Draw measurement, two samples of daps, their mean, spread and the truth, a row per task."""
    from PIL import Image

    from sampler.core.images import read
    from sampler.runs.restored import WHITE

    engine, truth = sampler.load(), read("configs/images/apple.png")
    sheet = Image.new("RGB", (6 * (SIDE + GAP), len(SHOWN) * (SIDE + GAP)), "white")
    for row, spec in enumerate(SHOWN):
        operator = operators.build(spec)
        y = operators.measure(operator, truth * 2 - 1, NOISE / 2, seed=5)
        found = engine.restore(
            y, operator=spec, noise=NOISE, prompt="a red apple on a blue background", n=8,
            steps=30, seeds=1, output="tensor",
        )  # fmt: skip
        spread = (found.std.square().mean(0, keepdim=True).sqrt() / WHITE).expand(3, -1, -1)
        shown = [y[0] / 2 + 0.5, *found.images[:2], found.mean, spread, truth[0]]
        for column, image in enumerate(shown):
            pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
            part = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.NEAREST)
            sheet.paste(part, (column * (SIDE + GAP), row * (SIDE + GAP)))
    sheet.quantize(128).save(out, optimize=True)


if __name__ == "__main__":
    app()
