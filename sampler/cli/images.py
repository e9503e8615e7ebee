"""The run behind `sampler generate`: every batch is on disk before the next one starts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sampler import registry
from sampler.cli.models import model_name
from sampler.config import Config, strategy_of
from sampler.runs import writer
from sampler.types import SamplerError

if TYPE_CHECKING:
    from sampler.cli.report import Report
    from sampler.engine import Engine, Result
    from sampler.generate import Job

FAILED = 3  # the exit code of a run that finished with failed images


@dataclass(frozen=True)
class _Made:
    """What one batch came to."""

    written: int
    failed: int


def make_images(config: Config, prompts: Sequence[str], engine: Engine, report: Report) -> None:
    """Makes and writes the images of a configuration, n per prompt.

    Raises SamplerError and ValueError before the first evaluation for what can be known by then;
    SamplerError (3) at the end where images were not finite.
    """
    from sampler.generate import DEFAULT_BATCH, expand

    folder = Path(config.output.dir)
    run = config.run
    size = DEFAULT_BATCH if run.batch_size == "auto" else run.batch_size
    jobs = expand(prompts, run.negative_prompt, run.seed, run.n)
    method = strategy_of(config, "sampler", engine.sampler)
    rule = strategy_of(config, "guidance", engine.guidance)
    plan = {
        "images": len(jobs),
        "batches": -(-len(jobs) // size),
        "batch_size": size,
        "steps": run.steps,
        "sampler": registry.spec_of(method),
        "guidance": registry.spec_of(rule),
        "model": model_name(config.model),
        "device": str(engine.pipeline.device),
        "out": str(folder),
    }
    report.event("plan", **plan)
    for name, value in plan.items():
        report.detail(f"{name}: {value}")
    written = failed = 0
    seconds = 0.0
    try:
        with report.progress(len(jobs)) as meter:
            for first in range(0, len(jobs), size):
                batch = jobs[first : first + size]
                result = _evaluate(engine, batch, size, config, (method, rule))
                made = _write(result, first, folder, config, engine, report)
                written, failed = written + made.written, failed + made.failed
                seconds += result.seconds
                meter.advance(len(batch))
    except KeyboardInterrupt:
        report.note(f"{written} of {len(jobs)} images are in {folder}.")
        raise
    report.event("summary", done=written, failed=failed, seconds=round(seconds, 3), out=str(folder))
    report.note(f"{written} images in {folder}, {seconds:.1f} s of sampling and decoding.")
    if failed:
        raise SamplerError(f"{failed} of {len(jobs)} images were not finite.", FAILED)


def _evaluate(
    engine: Engine, jobs: Sequence[Job], size: int, config: Config, strategies: tuple[Any, Any]
) -> Result:
    method, rule = strategies
    return engine.generate(
        [job.prompt for job in jobs],
        negative=[job.negative for job in jobs],
        seeds=[job.seed for job in jobs],
        steps=config.run.steps,
        width=config.run.width,
        height=config.run.height,
        sampler=method,
        guidance=rule,
        batch_size=size,
    )


def check_folder(folder: Path) -> None:
    """Refuses, before anything is computed, a place where no image can be written."""
    above = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    if not above.is_dir():
        raise SamplerError(f"{above} is a file; give a folder for the images.", 5)
    if not os.access(above, os.W_OK | os.X_OK):
        raise SamplerError(f"{above} is not writable.", 5)


def _write(
    result: Result, first: int, folder: Path, config: Config, engine: Engine, report: Report
) -> _Made:
    """The batch's images as files; those with NaN or infinite latents are reported instead."""
    written = failed = 0
    for row, image in enumerate(result.images):
        index, seed = first + row, result.seeds[row]
        if not bool(result.latents[row].isfinite().all()):
            failed += 1
            report.event("item", index=index, status="error", seed=seed, error="nonfinite")
            report.note(f"sampler: image {index} (seed {seed}) is not finite and not written.")
            continue
        record = _record(result, row, config, engine)
        key = writer.key_of(record)
        path = _store(folder, key, writer.encode_png(image, _metadata(record, key, config)))
        written += 1
        report.result(str(path))
        report.event(
            "item",
            index=index,
            status="ok",
            file=str(path),
            key=key,
            seed=seed,
            nfe=result.nfe[row],
        )
    return _Made(written, failed)


def _store(folder: Path, key: str, data: bytes) -> Path:
    """Writes under the next free number of the folder, however many processes write there."""
    while True:
        path = folder / writer.file_name(writer.next_index(folder), key)
        try:
            writer.write_new(path, data)
            return path
        except FileExistsError:
            continue


def _record(result: Result, row: int, config: Config, engine: Engine) -> dict[str, Any]:
    """Everything that the image is a function of, but the libraries' versions."""
    plain = result.config
    negative = plain["negative"]
    return {
        "prompt": plain["prompts"][row],
        "negative_prompt": negative[row] if negative else None,
        "seed": result.seeds[row],
        **{name: plain[name] for name in ("steps", "width", "height", "sampler", "guidance")},
        "model": model_name(config.model),
        "revision": config.model.revision,
        "variant": config.model.variant,
        "dtype": str(engine.pipeline.dtype).removeprefix("torch."),
    }


def _metadata(record: Mapping[str, Any], key: str, config: Config) -> dict[str, Any] | None:
    if config.output.metadata == "none":
        return None
    if config.output.metadata == "basic":
        names = {kind: record[kind]["name"] for kind in ("sampler", "guidance")}
        return {"key": key, "seed": record["seed"], **names}
    libraries = ("diffusion-sampler", "torch", "diffusers", "transformers")
    return {**record, "key": key, "versions": {name: metadata.version(name) for name in libraries}}
