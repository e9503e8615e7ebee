"""Evaluations on fixed prompts and seeds: reward, drift from the base model, a contact sheet."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sampler.core.batch import to_output
from sampler.core.durable import make_folder, write_file
from sampler.training.batches import micro_batches
from sampler.training.session import Session
from sampler.training.settings import Settings


@dataclass(frozen=True)
class Evaluation:
    """Latents [N, ...] and images [N, 3, H, W] of N prompts, and their scores [N] by name.

    "" is the reward itself; others are its parts.
    """

    latents: Tensor
    images: Tensor
    scores: dict[str, Tensor]

    def record(self, base: Tensor) -> dict[str, Any]:
        """Return mean and standard deviation of the reward, the means of its parts, and the drift.

        drift: E||x_0 − base||² / D, `base` the latents of the base model for the same seeds.
        """
        found: dict[str, Any] = {}
        for name, scores in self.scores.items():
            found[f"reward_{name}" if name else "reward"] = float(scores.mean())
        if (total := self.scores.get("")) is not None:
            found["reward_std"] = float(total.std()) if len(total) > 1 else 0.0
            if bad := (~total.isfinite()).nonzero()[:, 0].tolist():
                found["not_finite"] = bad
        return {**found, "drift": float((self.latents - base).square().mean())}


def evaluate(session: Session, prompts: list[str], rewarded: bool = True) -> Evaluation:
    """Sample N prompts with the seeds 0 .. N − 1 and score them, a share in every process.

    A collective operation. Images are scored in micro-batches; scores may be NaN.
    """
    share = -(-len(prompts) // session.world)  # equal in all processes; the last ones repeat rows
    rows = [(session.rank + session.world * k) % len(prompts) for k in range(share)]
    result = session.engine.generate(
        [prompts[row] for row in rows],
        negative=session.negative or None,
        seeds=rows,
        steps=session.steps,
        height=session.size[0],
        width=session.size[1],
        sampler=session.method,
        guidance=session.rule,
        batch_size=session.micro,
        output="tensor",
    )
    scores: dict[str, list[Tensor]] = {}
    if rewarded and session.reward is not None:
        for part in micro_batches(range(share), session.micro):
            with torch.no_grad():
                found = session.scores(result.images[part], [prompts[rows[i]] for i in part])
            for name, values in {"": found.total, **found.parts}.items():
                scores.setdefault(name, []).append(values)

    def whole(value: Tensor) -> Tensor:
        every = session.gather(value.to(session.pipeline.device))
        return (
            every.unflatten(0, (session.world, share)).transpose(0, 1).flatten(0, 1)[: len(prompts)]
        )

    gathered = {name: whole(torch.cat(values)) for name, values in scores.items()}
    return Evaluation(whole(result.latents), whole(result.images), gathered)


def stop_reason(settings: Settings, evaluations: list[dict[str, Any]]) -> str:
    """Return the reason to stop after these evaluations, or ""; a function of the log alone.

    A reward that was not finite is None in the log, and no improvement.
    """
    if not evaluations:
        return ""
    last, rewards = evaluations[-1], [e["reward"] for e in evaluations if "reward" in e]
    rewards = [-math.inf if reward is None else reward for reward in rewards]
    if settings.stop_reward is not None and rewards and rewards[-1] >= settings.stop_reward:
        return f"the evaluation reward {rewards[-1]:.4g} reached {settings.stop_reward:g}"
    drift = math.inf if last["drift"] is None else last["drift"]
    if settings.max_drift is not None and drift > settings.max_drift:
        return f"the drift {drift:.4g} exceeds {settings.max_drift:g}"
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
