"""A fine-tuning run from its start to its report: processes, lock, folder, tracker.

    RUN/config.json  log.jsonl  checkpoints/  eval/000010.png  lora/pytorch_lora_weights.safetensors

A run that is killed at any instant and started again ends with the same weights and the same log.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sampler.core.durable import make_folder
from sampler.errors import UsageError
from sampler.registry import suggestion
from sampler.rewards.compose import check_reward
from sampler.runs.lock import Lock
from sampler.training.base import TrainerBase
from sampler.training.fit_loop import FitLoop, Progress
from sampler.training.folder import claim, run_record
from sampler.training.session import Session
from sampler.training.settings import Settings


@dataclass(frozen=True)
class Report:
    """What a run made.

    folder; lora: the folder of the adapter, for `load_lora` (f_distill: of the student, for
    `sampler.load(student=...)`); updates: done in all; log: the records of log.jsonl; stopped: why
    before the last update, or ""; seconds: wall time of this call.
    """

    folder: Path
    lora: Path
    updates: int
    log: list[dict[str, Any]]
    stopped: str
    seconds: float


def fit(
    session: Session,
    trainer: TrainerBase,
    prompts: list[str],
    out: Path,
    settings: Settings,
    progress: Progress | None = None,
) -> Report:
    """Runs or resumes a fine-tuning; settings are resolved. See `sampler.finetune`."""
    from accelerate import Accelerator

    started = time.perf_counter()
    check_tracker(settings.log_with)
    cpu = session.engine.pipeline.device.type == "cpu"
    accelerator = Accelerator(cpu=cpu, log_with=settings.log_with, project_dir=str(out))
    world = accelerator.num_processes
    if settings.batch % (world * trainer.group):
        raise ValueError(
            f"batch = {settings.batch} must be a multiple of {world * trainer.group}, the number "
            "of processes times the images per prompt."
        )
    session = replace(session, gather=accelerator.gather)
    trainer.check(session)
    if session.reward is not None:
        check_reward(session.reward)
    main = accelerator.is_main_process
    if main:
        make_folder(out)
    with Lock(out) if main else nullcontext():
        if main:
            claim(out, run_record(session, trainer, prompts, settings))
        if settings.log_with:
            accelerator.init_trackers("sampler")
        accelerator.wait_for_everyone()
        with accelerator.main_process_first():
            trainer.prepare(session, prompts, out, settings)
        with trainer.trained(session, prompts, out, settings) as adapter:
            session = replace(session, adapter=adapter)
            run = FitLoop(session, trainer, prompts, out, settings, accelerator, adapter, progress)
            stopped = run.go()
        accelerator.wait_for_everyone()
        if settings.log_with:
            accelerator.end_training()
    seconds = time.perf_counter() - started
    return Report(out, run.result, run.done, run.journal.records, stopped, seconds)


def check_tracker(name: str | None) -> None:
    """Raises SamplerError (2) for a tracker that is not there: accelerate would go on without."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if name in (None, "all") or name in get_available_trackers():
        return
    if name not in LOGGER_TYPE_TO_CLASS:
        near = suggestion(name, LOGGER_TYPE_TO_CLASS)
        raise UsageError(f"fit.log_with: unknown tracker {name!r:.40}{near}.")
    extra = "the extra 'track' (pip install diffusion-sampler[track])"
    needs = extra if name in ("tensorboard", "trackio") else "its package, which is not installed"
    raise UsageError(f"fit.log_with = {name!r} needs {needs}.")
