"""A fine-tuning run from start to report: processes, lock, folder, tracker.

    RUN/config.json  log.jsonl  checkpoints/  eval/000010.png  lora/pytorch_lora_weights.safetensors

A run that is killed at any instant and resumed ends with the same weights and the same log.
"""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import nullcontext
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

from sampler.core.binding import model_name
from sampler.core.durable import make_folder, write_file
from sampler.core.errors import RunFolderError, UsageError
from sampler.models.lora_files import lora_file, lora_pairs
from sampler.registry import spec_of, suggestion
from sampler.rewards.base import Prompt, RewardBase
from sampler.runs.lock import Lock
from sampler.runs.stop import exit_on_sigterm
from sampler.training.base import TrainerBase
from sampler.training.fit_loop import FitLoop, Progress
from sampler.training.placement import check_placement, placed
from sampler.training.session import Session
from sampler.training.settings import Settings, changed


@dataclass(frozen=True)
class FinetuneResult:
    """Result of a run.

    folder: the run folder; lora: folder of the LoRA, for `load_lora` (of a whole network's
    pipeline, for `sampler.load`; f_distill: of the student, for `sampler.load(student=...)`);
    updates: done in all; log: records of log.jsonl; stopped: the reason to stop before the last
    update, or ""; seconds: wall time of this call.
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
) -> FinetuneResult:
    """Run or resume a fine-tuning; settings are resolved. See `sampler.finetune`."""
    from accelerate import Accelerator

    started = time.perf_counter()
    check_tracker(settings.log_with)
    cpu = session.pipeline.device.type == "cpu"
    accelerator = Accelerator(cpu=cpu, log_with=settings.log_with, project_dir=str(out))
    check_batch(trainer, settings, accelerator.num_processes)
    session = replace(
        session,
        gather=accelerator.gather,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        out=out,
    )
    if session.reward is not None and session.reward.batched and not trainer.judges_batches:
        raise ValueError(
            f"{trainer.name} scores images one by one, and {session.reward.name!r} judges whole "
            "batches; use nft, awm or dpo."
        )
    trainer.check(session)
    check_fields(trainer)
    check_placement(session, trainer, settings)
    if session.reward is not None:
        session.reward.check()
    main = accelerator.is_main_process
    if main:
        make_folder(out)
    with Lock(out) if main else nullcontext():
        if main:
            write_config(out, run_config(session, trainer, prompts, settings), trainer)
        if settings.log_with:
            accelerator.init_trackers("sampler")
        accelerator.wait_for_everyone()
        with placed(session, settings, out) as session:
            with accelerator.main_process_first():
                trainer.prepare(session, prompts, out, settings)
            with trainer.trainable(session, prompts, out, settings) as trainable:
                session = replace(session, trainable=trainable)
                loop = FitLoop(session, trainer, prompts, out, settings, accelerator, progress)
                with exit_on_sigterm():  # so that the loop saves a checkpoint
                    stopped = loop.run()
        accelerator.wait_for_everyone()
        if settings.log_with:
            accelerator.end_training()
    seconds = time.perf_counter() - started
    return FinetuneResult(out, loop.result, loop.done, loop.journal.records, stopped, seconds)


def check_batch(trainer: TrainerBase, settings: Settings, processes: int = 1) -> None:
    """Raise ValueError for a batch that cannot be dealt to processes, groups and minibatches."""
    unit = processes * trainer.images_per_prompt
    batch = settings.batch_of(trainer.images_per_prompt)
    if batch % unit:
        raise ValueError(
            f"batch = {batch} must be a multiple of {unit}, the number of processes "
            "times the images per prompt."
        )
    trainer.check_batch(batch // processes)


def check_fields(trainer: TrainerBase) -> None:
    """Raise ValueError for a field that is given and has no effect: one unlike its default."""
    defaults = {f.name: f.default for f in fields(cast(Any, trainer))}
    for key, setting in trainer.unused.items():
        if (value := getattr(trainer, key)) != defaults[key]:
            raise ValueError(
                f"{trainer.name}: {key} = {value!r} has no effect with {setting}; leave it out."
            )


def check_tracker(name: str | None) -> None:
    """Raise SamplerError (2) for a tracker that is not installed: accelerate would ignore it."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if name in (None, "all") or name in get_available_trackers():
        return
    if name not in LOGGER_TYPE_TO_CLASS:
        near = suggestion(name, LOGGER_TYPE_TO_CLASS)
        raise UsageError(f"fit.log_with: unknown tracker {name!r:.40}{near}.")
    extra = "the extra 'track' (pip install 'diffusion-sampler[track]')"
    needs = extra if name in ("tensorboard", "trackio") else "its package, which is not installed"
    raise UsageError(f"fit.log_with = {name!r} needs {needs}.")


def run_config(
    session: Session, trainer: TrainerBase, prompts: list[str], settings: Settings
) -> dict[str, Any]:
    """Return the configuration of a run as plain data."""
    config: dict[str, Any] = {
        "format": 1,
        "model": model_name(session.pipeline),
        "trainer": spec_of(trainer),
        "reward": spec_of(session.reward),
        "prompts": [
            {"prompt": text, **text.metadata}
            if isinstance(text, Prompt) and text.metadata
            else text
            for text in prompts
        ],
        "fit": settings.record(),
    }
    if images := trainer.images(prompts):
        digest = hashlib.sha256()
        for path in images:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        config["images"] = digest.hexdigest()
    if settings.init_lora is not None:
        files = [lora_file(path).read_bytes() for path, _ in lora_pairs(settings.init_lora)]
        config["init_lora"] = [hashlib.sha256(content).hexdigest() for content in files]

    def by_name(value: object) -> str:
        return value.name if isinstance(value, RewardBase) else repr(value)

    return json.loads(json.dumps(config, default=by_name))


def write_config(out: Path, config: dict[str, Any], trainer: TrainerBase) -> None:
    """Write config.json. Raises SamplerError (4) where the folder has another run's.

    Settings that the record of an earlier version lacks had their defaults.
    """
    path = out / "config.json"
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            before = {}
        own = {f.name: f.default for f in fields(cast(Any, trainer)) if f.default is not MISSING}
        defaults = {"fit": Settings().record(), "trainer": own}
        defaults = json.loads(json.dumps(defaults, default=repr))
        for section, known in defaults.items():
            if isinstance(given := before.get(section), dict):
                before[section] = known | given
        if different := changed(before, config, trainer.scheduled):
            raise RunFolderError(
                f"{out} holds another run; it differs in {', '.join(different[:5])}. Choose "
                "another folder, or the settings of that run to resume it."
            )
    write_file(path, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
