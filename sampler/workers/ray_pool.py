"""Ray: batches as tasks of actors, one actor per GPU, retried elsewhere when an actor is lost.

Only numbers of batches travel. Every actor opens the run folder (a shared one, or a URL), writes
its images and its own journal there; doing a batch twice does no harm.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from sampler.config.schema import ModelConfig
from sampler.core.loop import Loop
from sampler.errors import SamplerError, UsageError
from sampler.runs.folder import RunFolder
from sampler.runs.location import StopFlag
from sampler.runs.store import open_store
from sampler.workers.execute import Request, left_to_do
from sampler.workers.prompt_cache import PromptCache
from sampler.workers.work import Lines, Options, Tally, work

RETRIES = 5
ASKED = 1.0  # seconds between looks at whether to stop
START = 300.0  # seconds without any actor, after which the run gives up

Load = Callable[[ModelConfig], Loop]


@dataclass
class Worker:
    """One actor: an engine, and the run folder as worker `number`."""

    where: str
    number: int
    model: dict[str, Any]
    options: dict[str, Any]
    load: Load

    def __post_init__(self) -> None:
        self.run = RunFolder(open_store(self.where, self.number))
        self.engine = self.load(ModelConfig(**self.model))
        self.texts = PromptCache(self.engine.pipeline)

    def ready(self) -> list[dict[str, Any]]:
        """Answers when the engine is loaded; there are no results yet."""
        return []

    def batch(self, number: int, missing: list[int]) -> list[dict[str, Any]]:
        """Makes one batch; its journal lines, when they are on disk."""
        lines: list[dict[str, Any]] = []

        def told(new: Lines) -> None:
            lines.extend(dict(line) for line in new)

        options = Options(**self.options)
        left = {number: missing}
        work(self.run, self.engine, [number], left, options, Tally(), told, texts=self.texts)
        return lines


def execute_on_ray(
    run: RunFolder,
    model: ModelConfig,
    address: str | None,
    request: Request,
    stop: StopFlag,
    told: Callable[[Lines], None],
    began: Callable[[int], None],
    load: Load,
) -> Tally:
    """Makes what is missing with all GPUs of a Ray cluster, or its CPUs where it has none.

    address: of the cluster; None starts a local one, "auto" finds the one of this machine. A
    batch whose actor is lost is given to another one, RETRIES times. load: makes the engine of an
    actor, there.
    """
    if request.options.drop_encoders:
        raise UsageError("model.drop_encoders: actors take batches one by one; leave it out.")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reads it when it is imported
    ray = _ray()
    missing = left_to_do(run, request)
    tally = Tally(skipped=run.total - sum(map(len, missing.values())))
    began(tally.skipped)
    if not missing:
        return tally
    started = not ray.is_initialized()
    if started:
        ray.init(address=address, include_dashboard=False, log_to_driver=False,
                 configure_logging=False)  # fmt: skip
    try:
        where = run.store.where if "://" in run.store.where else os.path.abspath(run.store.where)
        pool = _Pool(ray, where, model, request.options, load)
        pool.finish(missing, stop, lambda lines: (tally.count(lines), told(lines)))
        tally.stopped = stop()
    finally:
        if started:
            ray.shutdown()
    return tally


class _Pool:
    """The actors, and which batch each of them has."""

    def __init__(
        self, ray: Any, where: str, model: ModelConfig, options: Options, load: Load
    ) -> None:
        self._ray = ray
        gpus = int(ray.cluster_resources().get("GPU", 0))
        self._resources = {"num_gpus": 1} if gpus else {"num_cpus": 1}
        self._count = gpus or max(1, int(ray.cluster_resources().get("CPU", 1)))
        self._made = 0
        self._arguments = (where, asdict(model), asdict(options), load)
        self._tries: dict[int, int] = {}

    def finish(
        self, missing: dict[int, list[int]], stop: StopFlag, told: Callable[[Lines], Any]
    ) -> None:
        """Gives batches out until all are made. Raises SamplerError where one cannot be.

        A batch goes to an actor that has said it is ready: one that replaces a lost actor may
        never get a place, where a node has gone for good.
        """
        waiting = sorted(missing, reverse=True)
        idle: list[Any] = []
        starting = dict(self._actor() for _ in range(min(self._count, len(waiting))))
        working: dict[Any, tuple[int, Any]] = {}
        heard = time.monotonic()
        while (waiting or working) and not stop():
            while waiting and idle:
                actor, number = idle.pop(), waiting.pop()
                task = actor.batch.remote(number, missing[number])
                working[task] = (number, actor)
            done, _ = self._ray.wait([*working, *starting], timeout=ASKED)
            heard = time.monotonic() if done or working else heard
            if time.monotonic() - heard > START:
                raise SamplerError(f"No Ray actor has started for {START:.0f} s.")
            for task in done:
                number, actor = working.pop(task, (None, starting.pop(task, None)))
                try:
                    lines = self._ray.get(task)
                    idle.append(actor)
                    told(lines)
                except self._ray.exceptions.RayTaskError as error:
                    raise _as_own(error) from None
                except self._ray.exceptions.RayError as error:
                    if number is not None:
                        self._retry_decode(number, error)
                        waiting.append(number)
                    starting.update([self._actor()])

    def _retry_decode(self, number: int, error: Exception) -> None:
        self._tries[number] = self._tries.get(number, 0) + 1
        if self._tries[number] > RETRIES:
            raise SamplerError(f"Batch {number} was lost {RETRIES} times: {error}.")

    def _actor(self) -> tuple[Any, Any]:
        """(what says that it is ready, a new actor), with a journal of its own."""
        self._made += 1
        where, model, options, load = self._arguments
        remote = self._ray.remote(**self._resources)(Worker)
        actor = remote.remote(where, self._made, model, options, load)
        return actor.ready.remote(), actor


def _as_own(error: Any) -> SamplerError:
    """What went wrong in an actor, as it would have been here."""
    cause = error.cause if isinstance(getattr(error, "cause", None), SamplerError) else None
    return cause or SamplerError(str(error).strip().splitlines()[-1])


def _ray() -> Any:
    try:
        ray = importlib.import_module("ray")
    except ModuleNotFoundError:
        raise UsageError(
            "--executor ray needs the extra 'ray' (pip install diffusion-sampler[ray])."
        ) from None
    return ray
