"""The final report of the bundled model: figures of its images, floors, and the image grid."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from sampler.bundled import EvaluationPrompt, prompts
from sampler.bundled.classifier import (
    SmallClassifier,
    Statistics,
    feature_statistics,
    frechet_distance,
    load,
    reference_statistics,
)
from sampler.bundled.measures import measure
from scripts.bundled.classifier_task import HELD_OUT, accuracy, composite_features
from scripts.bundled.emoji_data import EmojiData
from scripts.bundled.networks import load_part, load_pipeline
from scripts.bundled.sd3_task import load_sd3


@dataclass(frozen=True)
class Settings:
    """Settings of the images: the package's defaults, in float32 with the stock pipeline."""

    steps: int = 20
    scale: float = 3.0
    seed: int = 0
    batch: int = 32


@torch.no_grad()
def generate(pipeline: Any, texts: Sequence[str], settings: Settings, title: str = "") -> Tensor:
    """Return images [N, 3, 64, 64] in [0, 1]; image i starts from its own seed, ``seed + i``."""
    made = []
    for start in track(range(0, len(texts), settings.batch), title or "images"):
        part = list(texts[start : start + settings.batch])
        seeds = range(settings.seed + start, settings.seed + start + len(part))
        result: Any = pipeline(
            part,
            num_inference_steps=settings.steps,
            guidance_scale=settings.scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="pt",
        )
        made.append(result.images.float().cpu())
    return torch.cat(made)


def prompt_figures(
    pipeline: Any,
    model: SmallClassifier,
    reference: Statistics,
    listed: Sequence[EvaluationPrompt],
    settings: Settings,
    title: str = "",
) -> tuple[dict[str, float], Tensor]:
    """Generate the prompts' images; return their figures and the images."""
    images = generate(pipeline, [prompt.text for prompt in listed], settings, title)
    return measure(model, images, listed, reference), images


@torch.no_grad()
def floors(
    model: SmallClassifier,
    pipeline: Any,
    data: EmojiData,
    reference: Statistics,
    count: int,
) -> dict[str, float]:
    """Return the distances of ``count`` real composites, and of their VAE reconstructions."""
    features = composite_features(model, data, count, HELD_OUT)
    vae: Any = pipeline.vae
    images = torch.cat([data.batch(64, HELD_OUT, i, 5).images for i in range(-(-count // 64))])
    decoded = [vae.decode(vae.encode(part).latents).sample for part in images[:count].split(64)]
    pictures = ((torch.cat(decoded) + 1) / 2).clamp(0, 1)
    return {
        "images": count,
        "real": frechet_distance(*feature_statistics(features), *reference),
        "autoencoder": frechet_distance(*feature_statistics(model.features(pictures)), *reference),
        "autoencoder_psnr": float(
            -10 * ((torch.cat(decoded) - images[:count]) / 2).square().mean().log10()
        ),
    }


def report(
    bundle: Path,
    data: EmojiData,
    images: int = 512,
    settings: Settings = Settings(),
    *,
    sd3: bool = False,
) -> tuple[dict[str, Any], Tensor]:
    """Return all figures of a bundle folder and the images at the default settings.

    sd3: of its small SD3 instead of its main pipeline.

    ``images`` pictures at the default scale; a quarter as many for each further row (scales 1, 3
    and 10, styled prompts, the weak sibling), so that the rows of that size are comparable.
    """
    others = max(2, images // 4)
    model = load(bundle / "classifier")
    reference = reference_statistics(bundle / "statistics.safetensors")
    pipeline: Any = load_sd3(bundle / "sd3") if sd3 else load_pipeline(bundle / "pipeline")
    figures: dict[str, Any] = {"settings": vars(settings) | {"dtype": "float32"}}
    figures["classifier"] = accuracy(model, data, 16 * images, settings.seed)
    figures["floors"] = [floors(model, pipeline, data, reference, n) for n in (images, others)]
    figures["default"], made = prompt_figures(
        pipeline, model, reference, prompts(images, folder=bundle), settings, "default"
    )
    figures["rows"] = {}

    def row(name: str, scale: float = settings.scale, styled: bool = False) -> None:
        listed = prompts(others, styled=styled, folder=bundle)
        varied = replace(settings, scale=scale)
        row, _ = prompt_figures(pipeline, model, reference, listed, varied, name)
        figures["rows"][name] = row

    for scale in (1.0, 3.0, 10.0):
        row(f"scale {scale:g}", scale)
    row(f"scale {settings.scale:g}, style named", styled=True)
    if (bundle / "weak").exists() and not sd3:
        pipeline.unet = load_part("unet", bundle / "weak")
        for scale in (1.0, 3.0):
            row(f"weak sibling, scale {scale:g}", scale)
    return figures, made


def table(figures: dict[str, Any]) -> str:
    """Return the figures as a Markdown table."""
    rows = {f"scale {figures['settings']['scale']:g} (default)": figures["default"]} | figures[
        "rows"
    ]
    lines = [
        "| images made with | N | concept | style | background | Fréchet | saturation | clipped |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        shares = [
            f"{row[key]:.3f}" if key in row else "-" for key in ("concept", "style", "background")
        ]
        lines.append(
            f"| {name} | {row['images']} | {' | '.join(shares)} | {row['frechet_distance']:.2f} "
            f"| {row['saturation']:.3f} | {100 * row['clipped_share']:.1f} % |"
        )
    return "\n".join(lines) + "\n"


def write_report(figures: dict[str, Any], folder: Path) -> None:
    """Write report.json and report.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(table(figures), encoding="utf-8")
