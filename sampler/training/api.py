"""`sampler.finetune`: build a run from names and files, then `fit`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sampler import registry
from sampler.core.errors import UsageError
from sampler.training.prompts import read_prompts

if TYPE_CHECKING:
    from sampler.engine import Engine
    from sampler.training.fit import FinetuneResult
    from sampler.training.fit_loop import Progress


def finetune(
    engine: Engine,
    trainer: Any = "alignprop",
    reward: Any = "soft_compressibility",
    prompts: str | Path | Sequence[str | Mapping[str, Any]] = (),
    out: str | Path = "runs/tune",
    updates: int | None = None,
    *,
    settings: Any = None,
    allow_python: bool = False,
    progress: Progress | None = None,
) -> FinetuneResult:
    """Fine-tune the engine's network for a reward and write a LoRA; resume the run in `out`.

    With the setting adapter = "full" the result is a stock pipeline. The trainer "f_distill" writes
    a one- or few-step student instead. It and "denoise", which learns images of your own, need no
    reward.

    trainer, reward: a name, a mapping or an instance; the reward also a function (images, prompts)
        -> scores, or "module:function" with allow_python.
    prompts: texts, mappings {"prompt": text, "meta_...": value}, or a prompt file. Rewards get the
        metadata, without "meta_" (`sampler.rewards.base`). A trainer on data has its own.
    out: the run folder; the LoRA is written to out/lora, a pipeline to out/model.
    updates: number of batches to learn from (20).
    settings: `sampler.training.settings.Settings` or a mapping of its fields.
    progress: called as progress(record) after every update and evaluation.

    The engine and its pipeline are left unchanged; `load_lora` applies the LoRA. Raises ValueError
    or SamplerError before anything is sampled where the run cannot be trained, SamplerError (4) for
    the folder of another run, and SamplerError (3) after too many updates that were not finite.
    """
    from sampler.rewards.python import reward_from
    from sampler.training.evaluate import evaluation_scorers
    from sampler.training.fit import fit
    from sampler.training.session import Session
    from sampler.training.settings import settings_from

    if engine.hosted:
        raise UsageError(
            f"{type(engine.pipeline.pipe).__name__} is hosted: its own call runs, and fine-tuning "
            "needs a class with an adapter."
        )
    if engine.pipeline.frames is not None:
        raise ValueError("Fine-tuning needs images, and this pipeline generates videos.")
    method = registry.build("trainer", trainer)
    if reward is None and method.needs_reward:
        raise ValueError(f"Trainer {method.name!r} needs a reward.")
    scorer = None if reward is None else reward_from(reward, allow_python)
    texts = method.texts(read_prompts(prompts))
    chosen = settings_from(settings)
    method.check_settings(chosen)
    chosen = chosen if updates is None else replace(chosen, updates=updates)
    scores = scorer is not None and not scorer.batched
    if not scores and (chosen.stop_reward, chosen.patience) != (None, None):
        raise ValueError(
            "stop_reward and patience need a reward of single images, and this run has none."
        )
    evals = evaluation_scorers(chosen, allow_python)
    chosen = chosen.resolved(method.defaults, engine, texts, method.images_per_prompt)
    size = engine.pipeline.size(chosen.height, chosen.width)
    engine.pipeline.grid(chosen.steps or 0, size)  # refuses a wrong number of steps early
    session = Session(
        engine,
        scorer,
        chosen.sampler,
        chosen.guidance,
        chosen.steps or 1,
        size,
        chosen.micro or 1,
        chosen.negative,
        evals=evals,
    )
    return fit(session, method, texts, Path(out), chosen, progress)
