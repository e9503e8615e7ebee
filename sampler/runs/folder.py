"""The run folder: what was planned, what is done, and what is left to do.

run.json      facts of the run, written last: a folder without it is planned anew
plan.json     settings and batches
jobs.jsonl    all jobs, one per line
journal.jsonl results, appended (journal-<n>.jsonl of further workers)
images/ failed/ grids/ gallery.html .lock
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from sampler.errors import RunFolderError, UsageError
from sampler.runs import journal, names
from sampler.runs.jobs import Job, JobSettings, Model
from sampler.runs.metadata import Metadata
from sampler.runs.plan import Batch
from sampler.runs.store import Store

FORMAT = 1
RUN, PLAN, JOBS = "run.json", "plan.json", "jobs.jsonl"
Check = Literal["size", "hash"]


@dataclass(frozen=True)
class Output:
    """How results are kept. flagged: what becomes of images that a safety checker flags."""

    metadata: Metadata = "full"
    template: str | None = None
    flagged: Literal["keep", "blur", "drop"] = "keep"


@dataclass(frozen=True)
class Facts:
    """What a run folder remembers beside its jobs. config: as the user gave it, resolved."""

    model: Model
    output: Output = field(default_factory=Output)
    config: dict[str, Any] = field(default_factory=dict[str, Any])


class RunFolder:
    """A planned run in a store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        run, plan = _json(store, RUN), _json(store, PLAN)
        try:
            if run["v"] != FORMAT:
                raise RunFolderError(f"{store.where} is a run folder of format {run['v']}.")
            native = run["model"].get("native")
            self.model = Model(**{**run["model"], "native": tuple(native) if native else None})
            self.output = Output(**run["output"])
            self.config: dict[str, Any] = run["config"]
            self.hash: str = plan["hash"]
            self.rows: int = plan["rows"]
            self.total: int = plan["jobs"]
            self.groups = [JobSettings(**group) for group in plan["groups"]]
            self.duplicates: list[tuple[int, int]] = [(a, b) for a, b in plan["duplicates"]]
            self.batches = [
                Batch(number, group, _expanded(ranges))
                for number, (group, ranges) in enumerate(plan["batches"])
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{store.where}: run.json or plan.json is damaged: {error}.") from None
        self._path = store.local(JOBS)
        self._starts = array("Q")
        self._keys = bytearray()

    def jobs(self) -> Iterator[Job]:
        """All jobs, in order."""
        with open(self._path, "rb") as stream:
            for line in stream:
                yield Job.parse(line)

    def job(self, index: int) -> Job:
        """One job, read from where it is."""
        return self.jobs_of([index])[0]

    def jobs_of(self, indices: Iterable[int]) -> list[Job]:
        """Some jobs, such as those of a batch."""
        self._index()
        found = []
        with open(self._path, "rb") as stream:
            for index in indices:
                stream.seek(self._starts[index])
                found.append(Job.parse(stream.readline()))
        return found

    def key(self, index: int) -> str:
        """The key of a job, from memory."""
        self._index()
        return self._keys[20 * index : 20 * index + 20].decode()

    def name(self, job: Job) -> str:
        """The file name of a job's image, relative to the folder."""
        return names.image_name(job, self.groups[job.group], self.total, self.output.template)

    def results(self) -> journal.Results:
        """What the journals say now."""
        return journal.read(self.store.journals())

    def missing(
        self,
        results: journal.Results | None = None,
        *,
        retry_errors: bool = False,
        check: Check = "size",
        batches: Iterable[Batch] | None = None,
    ) -> dict[int, list[int]]:
        """What is left: batch number -> jobs of it to write.

        Done is: the last record is "ok" and the file has the recorded size (check="hash": and
        SHA-256). Errors and dropped images are settled, unless errors are retried.
        """
        results = results or self.results()
        sizes = self.store.sizes()
        self._index()
        left: dict[int, list[int]] = {}
        for batch in self.batches if batches is None else batches:
            todo = [
                index
                for index in batch.jobs
                if not self._settled(
                    results.entries.get(self.key(index)), sizes, retry_errors, check
                )
            ]
            if todo:
                left[batch.id] = todo
        return left

    def _settled(
        self, entry: journal.Entry | None, sizes: dict[str, int], retry: bool, check: Check
    ) -> bool:
        if entry is None:
            return False
        if entry["status"] != "ok":
            return not (retry and entry["status"] == "error")
        if sizes.get(entry["file"]) != entry["bytes"]:
            return False
        return check == "size" or self.digest(entry["file"]) == entry["sha256"]

    def digest(self, name: str) -> str | None:
        """The SHA-256 of a file of the run."""
        data = self.store.read(name)
        return None if data is None else hashlib.sha256(data).hexdigest()

    def _index(self) -> None:
        """Where every job's line starts, and its key, which follows `{"key":"`; read once."""
        if len(self._starts) == self.total:
            return
        starts, keys, position = array("Q"), bytearray(), 0
        with open(self._path, "rb") as stream:
            for line in stream:
                starts.append(position)
                keys += line[8:28]
                position += len(line)
        if len(starts) != self.total:
            raise UsageError(f"{self._path} holds {len(starts)} jobs, not {self.total}.")
        self._starts, self._keys = starts, keys


def _expanded(ranges: list[int]) -> list[int]:
    pairs = zip(ranges[::2], ranges[1::2], strict=True)
    return [index for begin, end in pairs for index in range(begin, end)]


def _json(store: Store, name: str) -> dict[str, Any]:
    data = store.read(name)
    if data is None:
        raise UsageError(f"{store.where} is no run folder: it has no {name}.")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UsageError(f"{store.where}/{name} is damaged: it is no JSON object.")
    return found
