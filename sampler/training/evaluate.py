"""Evaluations on fixed prompts and seeds: reward, drift from the base model, a contact sheet."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sampler.core.batch import to_output
from sampler.core.durable import make_folder, write_file
from sampler.rewards.base import score
from sampler.training.session import Session
from sampler.training.settings import Settings


def evaluation_images(session: Session, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Return latents [N, ...] and images [N, 3, H, W] of N prompts with the seeds 0 .. N − 1."""
    result = session.engine.generate(
        prompts,
        negative=session.negative or None,
        seeds=list(range(len(prompts))),
        steps=session.steps,
        height=session.size[0],
        width=session.size[1],
        sampler=session.method,
        guidance=session.rule,
        batch_size=session.micro,
        output="tensor",
    )
    return result.latents, result.images


def measure(
    session: Session, prompts: list[str], latents: Tensor, images: Tensor, base: Tensor
) -> dict[str, Any]:
    """Return mean and standard deviation of the reward, its parts, and the drift.

    drift: E||x_0 − base||² / D, `base` the latents of the base model for the same seeds.
    """
    drift = float((latents - base).square().mean())
    if session.reward is None:
        return {"drift": drift}
    with torch.no_grad():
        scores = score(session.reward, images, prompts)
        parts = session.reward.parts(images, prompts)
    spread = float(scores.std()) if len(scores) > 1 else 0.0
    values = {f"reward_{name}": float(part.mean()) for name, part in parts.items()}
    return {"reward": float(scores.mean()), "reward_std": spread, "drift": drift, **values}


def stop_reason(settings: Settings, evaluations: list[dict[str, Any]]) -> str:
    """Return the reason to stop after these evaluations, or ""; a function of the log alone."""
    if not evaluations:
        return ""
    last, rewards = evaluations[-1], [e["reward"] for e in evaluations if "reward" in e]
    if settings.stop_reward is not None and rewards and rewards[-1] >= settings.stop_reward:
        return f"the evaluation reward {rewards[-1]:.4g} reached {settings.stop_reward:g}"
    if settings.max_drift is not None and last["drift"] > settings.max_drift:
        return f"the drift {last['drift']:.4g} exceeds {settings.max_drift:g}"
    if not rewards:
        return ""
    best = max(range(len(rewards)), key=lambda i: rewards[i])
    if settings.patience is not None and len(rewards) - 1 - best >= settings.patience:
        return f"{settings.patience} evaluations brought no better reward"
    return ""


def save_sheet(images: Tensor, path: Path) -> None:
    """Write images [N, 3, H, W] as one PNG, arranged as a square."""
    from PIL import Image

    make_folder(path.parent)
    count, _, high, wide = images.shape
    columns = math.ceil(math.sqrt(count))
    sheet = Image.new("RGB", (columns * wide, math.ceil(count / columns) * high), "white")
    for i, image in enumerate(to_output(images.float().clamp(0, 1).cpu(), "pil")):
        sheet.paste(image, (i % columns * wide, i // columns * high))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_file(path, buffer.getvalue())
