"""Dry run of a fine-tuning: one small update, discarded, with an estimate of the cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from sampler import registry
from sampler.core.errors import IncompleteError, UsageError
from sampler.training.api import finetune
from sampler.training.evaluate import evaluation_scorers
from sampler.training.fit import check_batch, check_tracker
from sampler.training.prompts import read_prompts
from sampler.training.settings import settings_from

if TYPE_CHECKING:
    from sampler.engine import Engine


@dataclass(frozen=True)
class DryRun:
    """Result of a dry run.

    images: of the one update; nfe: network evaluations of all of them; seconds: wall time;
    total: estimated seconds of the run without its evaluations.
    """

    images: int
    nfe: int
    seconds: float
    total: float


def dry_run(
    engine: Engine,
    trainer: Any,
    reward: Any,
    prompts: str | Path | Sequence[str | Mapping[str, Any]],
    settings: Any = None,
    *,
    allow_python: bool = False,
) -> DryRun:
    """Perform one update of as few images as the trainer takes, otherwise as in the run.

    The engine is left unchanged and no file remains. Raises the errors of the run itself, and
    SamplerError (3) for a score, loss or gradient that is not finite.
    """
    method, chosen = registry.build("trainer", trainer), settings_from(settings)
    if getattr(reward, "batched", False):
        raise UsageError("A dry run cannot wait for votes; use another reward.")
    check_batch(method, chosen)
    check_tracker(chosen.log_with)
    evaluation_scorers(chosen, allow_python)
    texts = read_prompts(prompts)
    group = method.images_per_prompt
    batch = chosen.batch_of(group)
    count = group if group > 1 else min(2, batch)
    small = replace(
        chosen, updates=1, batch=count, micro=None, eval_every=0, stop_reward=None, patience=None,
        max_drift=None, evals=(), stop=None, drift_stop=None, log_with=None,
    )  # fmt: skip
    with TemporaryDirectory() as folder:
        report = finetune(
            engine,
            method.for_dry_run(count),
            reward,
            texts[:count],
            folder,
            settings=small,
            allow_python=allow_python,
        )
    record = report.log[-1]
    if "skipped" in record:
        raise IncompleteError(f"The update is not finite: {record['skipped']}")
    total = record["seconds"] / count * batch * chosen.updates
    return DryRun(count, record["nfe"], record["seconds"], total)
