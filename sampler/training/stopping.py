"""Reasons to stop a run before its last update, by the evaluations in its log."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sampler.core.errors import UsageError
from sampler.evaluation.intervals import Difference, cluster_means, paired, pooled
from sampler.training.settings import Settings


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
    (first, second), of_prompts = prompt_means(prompts, both, weights.get(scorer))
    if not len(first):
        return None, 0.0
    return paired(first, second, of_prompts), pooled(second, of_prompts)


def prompt_means(
    prompts: Sequence[str],
    scores: Sequence[Sequence[float | None]],
    weights: Sequence[float] | None,
) -> tuple[list[NDArray[np.float64]], NDArray[np.float64] | None]:
    """Return the means of each prompt's scores, of every list of them, and the prompts' weights.

    An image that has no score in one of the lists is left out of all.
    """
    known = [i for i, row in enumerate(zip(*scores, strict=True)) if None not in row]
    if not known:
        return [np.empty(0) for _ in scores], None
    names = [str(prompts[i]) for i in known]
    lists = [*scores, *([] if weights is None else [weights])]
    means = [cluster_means(names, [values[i] for i in known])[1] for values in lists]
    return (means, None) if weights is None else (means[:-1], means[-1])
