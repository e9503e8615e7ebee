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
from sampler.core.errors import UsageError
from sampler.evaluation.intervals import pooled
from sampler.evaluation.parse import scorers_from
from sampler.evaluation.scorers import ImageScorer
from sampler.registry import suggestion
from sampler.training.batches import micro_batches
from sampler.training.session import Session
from sampler.training.settings import Settings
from sampler.training.stopping import prompt_means


@dataclass(frozen=True)
class RewardEvaluation:
    """Latents [N, ...] and images [N, 3, H, W] of N prompts, and their scores [N] by name.

    "" is the reward itself; others are its parts. watched: scores [N] of `fit.evals`, by column;
    weights: of the prompts [N] in the mean of a column, all 1 where it is left out.
    """

    prompts: list[str]

    latents: Tensor
    images: Tensor
    scores: dict[str, Tensor]
    watched: dict[str, Tensor]
    weights: dict[str, list[float]]

    def record(self, base: RewardEvaluation) -> dict[str, Any]:
        """Return mean and standard deviation of the reward, the means of its parts and of further
        scorers, the latters' single scores and those of the base model, and the drift.

        Means of further scorers are those of `sampler.evaluate`: of prompts, by their weights.
        drift: E||x_0 − base||² / D of the latents; base: the base model's for the same seeds.
        """
        found: dict[str, Any] = {}
        for name, scores in self.scores.items():
            found[f"reward_{name}" if name else "reward"] = float(scores.mean())
        if (total := self.scores.get("")) is not None:
            found["reward_std"] = float(total.std()) if len(total) > 1 else 0.0
            if bad := (~total.isfinite()).nonzero()[:, 0].tolist():
                found["not_finite"] = bad
        for name, scores in self.watched.items():
            shown = [value if math.isfinite(value) else None for value in scores.tolist()]
            (means,), weights = prompt_means(self.prompts, [shown], self.weights.get(name))
            found[f"eval_{name}"] = pooled(means, weights) if len(means) else math.nan
        if self.watched:  # of each prompt, for paired differences
            found["evals"] = {name: scores.tolist() for name, scores in self.watched.items()}
            found["base_evals"] = {name: scores.tolist() for name, scores in base.watched.items()}
        if self.weights:
            found["eval_weights"] = self.weights
        return {**found, "drift": float((self.latents - base.latents).square().mean())}


def evaluate(session: Session, prompts: list[str], rewarded: bool = True) -> RewardEvaluation:
    """Sample N prompts with the seeds 0 .. N − 1 and score them, a share in every process.

    rewarded: by the reward, and not by `fit.evals` alone. A collective operation. Images are scored
    in micro-batches; scores may be NaN.
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
    watched: dict[str, list[Tensor]] = {}
    for part in micro_batches(range(share), session.micro) if rewarded or session.evals else ():
        images, texts = result.images[part], [prompts[rows[i]] for i in part]
        with torch.no_grad():
            if rewarded and session.reward is not None and not session.reward.batched:
                found = session.scores(images, texts)
                for name, values in {"": found.total, **found.parts}.items():
                    scores.setdefault(name, []).append(values)
            for scorer in session.evals:
                for name, values in scorer.columns(images, texts).items():
                    watched.setdefault(name, []).append(values)

    def whole(value: Tensor) -> Tensor:
        every = session.gather(value.to(session.pipeline.device))
        return (
            every.unflatten(0, (session.world, share)).transpose(0, 1).flatten(0, 1)[: len(prompts)]
        )

    of_reward, of_evals = (
        {name: whole(torch.cat(values)) for name, values in found.items()}
        for found in (scores, watched)
    )
    weights = {
        name: [of_prompt.get(prompt, 0.0) for prompt in prompts]
        for scorer in session.evals
        for name, of_prompt in scorer.weights(prompts).items()
    }
    images = whole(result.images)
    return RewardEvaluation(prompts, whole(result.latents), images, of_reward, of_evals, weights)


def evaluation_scorers(settings: Settings, allow_python: bool) -> tuple[ImageScorer, ...]:
    """Build the scorers of `fit.evals`, before anything is sampled.

    Raises UsageError for unknown ones, measures of sets, and a stop rule that watches none of them.
    """
    scorers = scorers_from(settings.evals, allow_python)
    images = [scorer for scorer in scorers if isinstance(scorer, ImageScorer)]
    if len(images) < len(scorers):
        wrong = next(s.label for s in scorers if not isinstance(s, ImageScorer))
        raise UsageError(f"fit.evals: {wrong!r} is a measure of sets; give scorers of images.")
    for scorer in images:
        scorer.check()
    labels = [scorer.label for scorer in images]
    for key, rule in (("stop", settings.stop), ("drift_stop", settings.drift_stop)):
        name = "" if rule is None else rule.scorer
        if name and not any(name == label or name.startswith(f"{label}.") for label in labels):
            near = suggestion(name, labels) if labels else ""
            raise UsageError(f"fit.{key}: {name!r:.60} is not one of fit.evals{near}.")
    return tuple(images)


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
