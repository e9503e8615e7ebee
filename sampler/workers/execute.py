"""From a planned run to a finished one: who computes, and what the end is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sampler import registry
from sampler.core.binding import SamplerContext, bind_sampler
from sampler.core.loop import Loop
from sampler.errors import IncompleteError, MemoryLimitError
from sampler.runs.folder import Check, RunFolder
from sampler.runs.location import RunLocation, StopFlag
from sampler.workers import claims
from sampler.workers.work import Lines, Options, Tally, work


@dataclass(frozen=True)
class Request:
    """What to make of a run: what counts as missing, and how to work.

    lease: seconds after which the batches of a worker that went silent are taken by others.
    """

    retry_errors: bool = False
    check: Check = "size"
    options: Options = Options()
    lease: float = claims.LEASE


def left_to_do(run: RunFolder, request: Request) -> dict[int, list[int]]:
    """batch -> jobs, as the request counts them."""
    return run.missing(retry_errors=request.retry_errors, check=request.check)


def execute(
    run: RunFolder,
    load: Callable[[], Loop],
    location: RunLocation,
    request: Request,
    stop: StopFlag,
    told: Callable[[Lines], None] = lambda lines: None,
    began: Callable[[int], None] = lambda skipped: None,
) -> Tally:
    """Makes what is missing, in this process. The engine is loaded only if something is.

    began hears how many images are there already, told of every line that is on disk.

    Raises SamplerError: 5 storage, 6 the model is not that of the run, 3 beyond max_errors.
    """
    missing = left_to_do(run, request)
    tally = Tally(skipped=run.total - sum(len(jobs) for jobs in missing.values()))
    began(tally.skipped)
    if not missing:
        return tally
    engine = load()
    _check(run, engine)
    batches: Any = sorted(missing)
    if location.world > 1:
        chosen = [run.batches[number] for number in missing]

        def remaining() -> dict[int, list[int]]:
            return run.missing(check=request.check, batches=chosen)

        batches = claims.claimed_batches(location, missing, remaining, stop, request.lease)
    work(run, engine, batches, missing, request.options, tally, told, stop)
    return tally


def _check(run: RunFolder, engine: Loop) -> None:
    """Raises, before anything is spent, what would make every image of a group fail."""
    adapter = engine.pipeline
    if adapter.frames is not None:
        raise ValueError("A run folder keeps images, and this pipeline makes videos.")
    for settings in run.groups:
        size = adapter.size(settings.height, settings.width)
        grid = adapter.grid(settings.steps, size)
        rule = registry.build("guidance", settings.guidance)
        if (check := getattr(rule, "check", None)) is not None:
            check(adapter)
        if missing := rule.needs - {"cond", "uncond", *adapter.models}:
            raise ValueError(f"Guidance {rule.name!r} needs the model {min(missing)!r}.")
        method = registry.build("sampler", settings.sampler)
        bind_sampler(method, SamplerContext(adapter, grid, dict(settings.guidance), size))


def outcome(tally: Tally, where: str) -> None:
    """Raises the SamplerError that the end of a run stands for; nothing where all is done."""
    if tally.failed and not tally.done and tally.oom == tally.failed:
        raise MemoryLimitError("Out of memory with one image at a time; use a smaller size.")
    if tally.failed:
        raise IncompleteError(
            f"{tally.failed} image{'s' if tally.failed > 1 else ''} failed; "
            f"`sampler show {where} --errors` tells why, "
            f"`sampler resume {where} --retry-errors` tries again.",
        )


__all__ = ["Options", "Request", "Tally", "execute", "left_to_do", "outcome"]
