"""One small update, thrown away: whether a fine-tuning works, and what all of it would cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from sampler import registry
from sampler.errors import IncompleteError
from sampler.training.api import finetune, prompt_texts
from sampler.training.settings import settings_from

if TYPE_CHECKING:
    from sampler.engine import Engine


@dataclass(frozen=True)
class Trial:
    """images, rows: of the one update; seconds: its wall time; total: for the whole run, without
    its evaluations."""

    images: int
    rows: int
    seconds: float
    total: float


def trial(
    engine: Engine,
    trainer: Any,
    reward: Any,
    prompts: str | Path | Sequence[str],
    settings: Any = None,
    *,
    allow_python: bool = False,
) -> Trial:
    """One update of as few images as the trainer takes, with all else as in the run.

    The engine is as before and no file is left. Raises what the run would raise, and SamplerError
    (3) for a score, loss or gradient that is not finite.
    """
    method, chosen = registry.build("trainer", trainer), settings_from(settings)
    texts = prompt_texts(prompts)
    count = method.group if method.group > 1 else min(2, chosen.batch)
    small = replace(
        chosen, updates=1, batch=count, micro=None, eval_every=0, stop_reward=None, patience=None,
        max_drift=None, log_with=None,
    )  # fmt: skip
    with TemporaryDirectory() as folder:
        done = finetune(
            engine,
            method.tried(count),
            reward,
            texts[:count],
            folder,
            settings=small,
            allow_python=allow_python,
        )
    record = done.log[-1]
    if "skipped" in record:
        raise IncompleteError(f"The update is not finite: {record['skipped']}")
    total = record["seconds"] / count * chosen.batch * chosen.updates
    return Trial(count, record["rows"], record["seconds"], total)
