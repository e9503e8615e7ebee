"""Batches as tasks of Ray actors, one actor per GPU; lost batches are retried on another actor.

Only batch numbers travel. Every actor opens the run folder (on shared storage, or a URL) and writes
its images and its own journal there; computing a batch twice does no harm.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from sampler.config.model import ModelConfig
from sampler.core.errors import SamplerError, UsageError, first_line
from sampler.core.loop import Loop
from sampler.runs.folder import RunFolder
from sampler.runs.relocation import absolute
from sampler.runs.stop import StopFlag
from sampler.runs.store import open_store
from sampler.workers.execute import check_dtype
from sampler.workers.prompt_cache import PromptCache
from sampler.workers.work import JournalLines, Tally, WorkOptions, work

RETRIES = 5
POLL_SECONDS = 1.0
START_TIMEOUT = 300.0  # seconds without any running actor, after which the run fails

Load = Callable[[RunFolder, ModelConfig], Loop]


@dataclass
class Worker:
    """One actor: an engine, and the run folder opened as worker `number`."""

    where: str
    number: int
    model: dict[str, Any]
    options: dict[str, Any]
    load: Load

    def ready(self) -> list[dict[str, Any]]:
        """Load the engine; returns no journal lines.

        An error here is the caller's; one in the constructor would only end the actor.
        """
        self.run = RunFolder(open_store(self.where, self.number))
        self.engine = self.load(self.run, ModelConfig(**self.model))
        check_dtype(self.run, self.engine)
        self.cache = PromptCache(self.engine.pipeline)
        return []

    def batch(self, number: int, missing: list[int]) -> list[dict[str, Any]]:
        """Compute one batch and return its journal lines, which are on disk."""
        lines: list[dict[str, Any]] = []

        def on_written(new: JournalLines) -> None:
            lines.extend(dict(line) for line in new)

        work(
            self.run,
            self.engine,
            [number],
            {number: missing},
            WorkOptions(**self.options),
            Tally(),
            on_written,
            cache=self.cache,
        )
        return lines


def execute_on_ray(
    run: RunFolder,
    model: ModelConfig,
    address: str | None,
    options: WorkOptions,
    stop: StopFlag,
    on_written: Callable[[JournalLines], None],
    on_start: Callable[[int], None],
    load: Load,
) -> Tally:
    """Generate what is missing on all GPUs of a Ray cluster, or on its CPUs if it has no GPU.

    address: of the cluster; None starts a local one, "auto" finds the one of this machine. A
    batch whose actor is lost is retried RETRIES times. load: loads the engine of a run, in the
    actor, after comparing its model with the planned one. Raises UsageError if no cluster answers.
    """
    if options.drop_encoders:
        raise UsageError("model.drop_encoders: actors take batches one by one; leave it out.")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reads it when it is imported
    ray = _ray()
    missing = run.missing(retry_errors=options.retry_errors, check=options.check)
    tally = Tally(skipped=run.total - sum(map(len, missing.values())))
    on_start(tally.skipped)
    if not missing:
        return tally
    started = not ray.is_initialized()
    if started:
        _connect(ray, address)
    try:
        where = run.store.where if "://" in run.store.where else os.path.abspath(run.store.where)
        pool = _Pool(ray, where, absolute(model), options, load)
        pool.finish(missing, stop, lambda lines: (tally.count(lines), on_written(lines)))
        tally.stopped = stop()
    finally:
        if started:
            ray.shutdown()
    return tally


def _connect(ray: Any, address: str | None) -> None:
    """Start a local cluster, or connect to one. Raises UsageError if none answers."""
    try:
        local: dict[str, Any] = {} if address else {"include_dashboard": False}
        ray.init(address=address, log_to_driver=False, configure_logging=False, **local)
    except (OSError, ValueError, RuntimeError) as error:
        where = f"answers at --address {address}" if address else "can be started here"
        raise UsageError(f"No Ray cluster {where}: {first_line(error)[:200]}") from None


class _Pool:
    """Actors and their batches."""

    def __init__(
        self, ray: Any, where: str, model: ModelConfig, options: WorkOptions, load: Load
    ) -> None:
        self._ray = ray
        gpus = int(ray.cluster_resources().get("GPU", 0))
        self._resources = {"num_gpus": 1} if gpus else {"num_cpus": 1}
        self._count = gpus or max(1, int(ray.cluster_resources().get("CPU", 1)))
        self._created = 0
        self._arguments = (where, asdict(model), asdict(options), load)
        self._retries: dict[int, int] = {}

    def finish(
        self,
        missing: dict[int, list[int]],
        stop: StopFlag,
        on_written: Callable[[JournalLines], Any],
    ) -> None:
        """Distribute batches until all are done. Raises SamplerError if one is lost too often.

        A batch goes only to an actor that reports ready: a replacement for a lost actor may never
        be scheduled, if its node is gone for good.
        """
        waiting = sorted(missing, reverse=True)
        idle: list[Any] = []
        starting = dict(self._actor() for _ in range(min(self._count, len(waiting))))
        working: dict[Any, tuple[int, Any]] = {}
        progressed = time.monotonic()
        while (waiting or working) and not stop():
            while waiting and idle:
                actor, number = idle.pop(), waiting.pop()
                task = actor.batch.remote(number, missing[number])
                working[task] = (number, actor)
            done, _ = self._ray.wait([*working, *starting], timeout=POLL_SECONDS)
            progressed = time.monotonic() if done or working else progressed
            if time.monotonic() - progressed > START_TIMEOUT:
                raise SamplerError(f"No Ray actor has started for {START_TIMEOUT:.0f} s.")
            for task in done:
                number, actor = working.pop(task, (None, starting.pop(task, None)))
                try:
                    lines = self._ray.get(task)
                    idle.append(actor)
                    on_written(lines)
                except self._ray.exceptions.RayTaskError as error:
                    raise _original(error) from None
                except self._ray.exceptions.RayError as error:
                    if number is not None:
                        self._count_retry(number, error)
                        waiting.append(number)
                    starting.update([self._actor()])

    def _count_retry(self, number: int, error: Exception) -> None:
        self._retries[number] = self._retries.get(number, 0) + 1
        if self._retries[number] > RETRIES:
            raise SamplerError(f"Batch {number} was lost {RETRIES} times: {error}.")

    def _actor(self) -> tuple[Any, Any]:
        """Start an actor with a journal of its own; returns (its `ready` task, the actor)."""
        self._created += 1
        where, model, options, load = self._arguments
        remote = self._ray.remote(**self._resources)(Worker)
        actor = remote.remote(where, self._created, model, options, load)
        return actor.ready.remote(), actor


def _original(error: Any) -> SamplerError:
    """The error that an actor raised, as it would be without Ray."""
    cause = error.cause if isinstance(getattr(error, "cause", None), SamplerError) else None
    return cause or SamplerError(str(error).strip().splitlines()[-1])


def _ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ModuleNotFoundError:
        raise UsageError(
            "--executor ray needs the extra 'ray' (pip install 'diffusion-sampler[ray]')."
        ) from None
