"""Evaluations on fixed prompts and seeds: reward, drift from the base model, a contact sheet."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sampler.core.batch import to_output
from sampler.core.durable import make_folder, write_file
from sampler.core.errors import UsageError
from sampler.evaluation.intervals import Difference, cluster_means, paired, pooled
from sampler.evaluation.parse import scorers_from
from sampler.evaluation.scorers import ImageScorer
from sampler.registry import suggestion
from sampler.training.batches import micro_batches
from sampler.training.session import Session
from sampler.training.settings import Settings


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
            (means,), weights = _prompt_means(self.prompts, [shown], self.weights.get(name))
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
    if reason := _became_worse(settings, evaluations) or _drifted(settings, last):
        return reason
    if not rewards:
        return ""
    best = max(range(len(rewards)), key=lambda i: rewards[i])
    if settings.patience is not None and len(rewards) - 1 - best >= settings.patience:
        return f"{settings.patience} evaluations brought no better reward"
    return ""


def _became_worse(settings: Settings, evaluations: list[dict[str, Any]]) -> str:
    """Return the reason of `fit.stop` after the last evaluation, or ""."""
    stop = settings.stop
    if stop is None or len(evaluations) < 2:
        return ""
    first, last = (one.get("evals", {}) for one in (evaluations[0], evaluations[-1]))
    weights = evaluations[-1].get("eval_weights", {})
    found, _ = _compared(settings, "stop", stop.scorer, last, first, weights)
    if found is None or found.verdict != "lower" or found.mean >= -stop.worse_by:
        return ""
    return f"{stop.scorer} fell by {-found.mean:.4g}, more than {stop.worse_by:g}"


def _drifted(settings: Settings, last: dict[str, Any]) -> str:
    """Return the reason of `fit.drift_stop` after the last evaluation, or ""."""
    stop = settings.drift_stop
    if stop is None:
        return ""
    now, before, weights = (last.get(k, {}) for k in ("evals", "base_evals", "eval_weights"))
    found, base = _compared(settings, "drift_stop", stop.scorer, now, before, weights)
    if found is None or found.verdict != "higher" or found.mean <= stop.above * abs(base):
        return ""
    return (
        f"{stop.scorer} is {found.mean / abs(base):.1%} above the base model's, more than "
        f"{stop.above:.1%}"
    )


def _compared(
    settings: Settings,
    key: str,
    scorer: str,
    now: dict[str, Any],
    before: dict[str, Any],
    weights: dict[str, list[float]],
) -> tuple[Difference | None, float]:
    """Return the paired difference of a column between two evaluations, and its mean before.

    None where no prompt has both.
    """
    for scores in (now, before):
        if scorer not in scores:
            known = ", ".join(scores)
            raise UsageError(f"fit.{key}: there is no column {scorer!r:.60}, only {known}.")
    both, prompts = [now[scorer], before[scorer]], settings.eval_prompts or ()
    means, of_prompts = _prompt_means(prompts, both, weights.get(scorer))
    if not len(means[0]):
        return None, 0.0
    return paired(*means, of_prompts), pooled(means[1], of_prompts)


def _prompt_means(
    prompts: Sequence[str],
    scores: Sequence[Sequence[float | None]],
    weights: Sequence[float] | None,
) -> tuple[list[NDArray[np.float64]], NDArray[np.float64] | None]:
    """Return the means of each prompt's scores, of every list of them, and the prompts' weights.

    An image that has no score in one of the lists is left out of all.
    """
    known = [i for i, row in enumerate(zip(*scores, strict=True)) if None not in row]
    names = [str(prompts[i]) for i in known]
    lists = [*scores, *([] if weights is None else [weights])]
    means = [cluster_means(names, [values[i] for i in known])[1] for values in lists]
    return (means, None) if weights is None else (means[:-1], means[-1])


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
