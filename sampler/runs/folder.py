"""A run folder: its plan, results and missing images.

run.json      facts about the run, written last: a folder without it is planned again
plan.json     settings and batches
jobs.jsonl    all jobs, one per line
journal.jsonl results, appended (journal-<n>.jsonl of further workers)
images/ failed/ grids/ gallery.html .lock
"""

from __future__ import annotations

import hashlib
import itertools
import json
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from sampler.config.options import ImageFormat, VideoFormat
from sampler.core.errors import RunFolderError, UsageError
from sampler.runs import journal, names
from sampler.runs.encodings import FPS, QUALITY, Encoding
from sampler.runs.jobs import Job, JobSettings, Model
from sampler.runs.metadata import Metadata
from sampler.runs.plan import Cell, PlannedBatch
from sampler.runs.store import Store

FORMAT = 2  # 1: before lines and NFE were called so
RUN, PLAN, JOBS = "run.json", "plan.json", "jobs.jsonl"
Check = Literal["size", "hash"]


@dataclass(frozen=True)
class OutputOptions:
    """Output settings of a run. flagged: policy for images that a safety checker flags.

    format, quality: of the files; no part of an image's key.
    """

    metadata: Metadata = "full"
    template: str | None = None
    flagged: Literal["keep", "blur", "drop"] = "keep"
    format: ImageFormat = "png"
    quality: int = QUALITY
    video: VideoFormat = "webp"
    fps: int = FPS

    @property
    def encoding(self) -> Encoding:
        """Encoding of the files."""
        return Encoding(self.format, self.quality, self.video, self.fps)


class RunFolder:
    """A planned run in a store.

    Raises UsageError for a store without one, RunFolderError for another format.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        run, plan = _json(store, RUN), _json(store, PLAN)
        try:
            if run["v"] != FORMAT:
                raise RunFolderError(
                    f"{store.where} is a run folder of format {run['v']}, of another version; "
                    f"this one reads format {FORMAT}, so choose a new folder with -o."
                )
            native = run["model"].get("native")
            self.model = Model(**{**run["model"], "native": tuple(native) if native else None})
            self.output = OutputOptions(**run["output"])
            self.config: dict[str, Any] = run["config"]
            self.origin: dict[str, str] = run.get("origin", {})
            self.hash: str = plan["hash"]
            self.total: int = plan["jobs"]
            self.lines: int = plan["lines"]
            self.groups = [JobSettings(**group) for group in plan["groups"]]
            self.duplicates: list[tuple[int, int]] = [(a, b) for a, b in plan["duplicates"]]
            self.cells = [Cell(*cell) for cell in plan.get("cells", ())]
            self.batches = [
                PlannedBatch(number, group, _expanded(ranges))
                for number, (group, ranges) in enumerate(plan["batches"])
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{store.where}: run.json or plan.json is damaged: {error}.") from None
        self._path = store.local(JOBS)
        self._offsets = array("Q")
        self._keys = bytearray()

    def jobs(self) -> Iterator[Job]:
        """Yield all jobs, in order."""
        with open(self._path, "rb") as stream:
            for line in itertools.islice(stream, self.total):
                yield Job.parse(line)

    def job(self, index: int) -> Job:
        """Read one job."""
        return self.jobs_of([index])[0]

    def jobs_of(self, indices: Iterable[int]) -> list[Job]:
        """Read some jobs, such as those of a batch."""
        self._index()
        found = []
        with open(self._path, "rb") as stream:
            for index in indices:
                stream.seek(self._offsets[index])
                found.append(Job.parse(stream.readline()))
        return found

    def key(self, index: int) -> str:
        """Key of a job, from memory."""
        self._index()
        return self._keys[20 * index : 20 * index + 20].decode()

    def name(self, job: Job, made: Any) -> str:
        """File name of a job's result, an image, a video or a sound, relative to the folder."""
        group, output = self.groups[job.group], self.output
        suffix = output.encoding.suffix_of(made)
        return names.image_name(job, group, self.total, output.template, suffix)

    def results(self) -> journal.JournalResults:
        """Read the journals."""
        return journal.read(self.store.journals())

    def missing(
        self,
        results: journal.JournalResults | None = None,
        *,
        retry_errors: bool = False,
        check: Check = "size",
        batches: Iterable[PlannedBatch] | None = None,
    ) -> dict[int, list[int]]:
        """Missing images: {batch number: jobs}.

        An image is done when its last record is "ok" and its file has the recorded size
        (check="hash": and SHA-256). Failed and dropped images are not missing, unless errors are
        retried.
        """
        results = results or self.results()
        sizes = self.store.sizes()
        self._index()
        left: dict[int, list[int]] = {}
        for batch in self.batches if batches is None else batches:
            todo = [
                index
                for index in batch.jobs
                if not self._is_done(
                    results.entries.get(self.key(index)), sizes, retry_errors, check
                )
            ]
            if todo:
                left[batch.id] = todo
        return left

    def _is_done(
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
        """SHA-256 of a file of the run; None if it does not exist."""
        data = self.store.read(name)
        return None if data is None else hashlib.sha256(data).hexdigest()

    def _index(self) -> None:
        """Read the offset and the key of every line of jobs.jsonl, once.

        Lines behind the planned ones are left by an extension that did not end.
        """
        if len(self._offsets) == self.total:
            return
        offsets, keys, position = array("Q"), bytearray(), 0
        with open(self._path, "rb") as stream:
            for line in itertools.islice(stream, self.total):
                offsets.append(position)
                keys += line[KEY]
                position += len(line)
        if len(offsets) != self.total:
            raise UsageError(f"{self._path} holds {len(offsets)} jobs, not {self.total}.")
        self._offsets, self._keys = offsets, keys


KEY = slice(8, 28)  # of a line of jobs.jsonl, which begins with {"key":"


def key_in(line: bytes) -> str:
    """Key in a line of jobs.jsonl, without parsing the line."""
    return line[KEY].decode()


def _expanded(ranges: list[int]) -> list[int]:
    pairs = zip(ranges[::2], ranges[1::2], strict=True)
    return [index for begin, end in pairs for index in range(begin, end)]


def _json(store: Store, name: str) -> dict[str, Any]:
    data = store.read(name)
    if data is None:
        raise UsageError(f"{store.where} is not a run folder: it has no {name}.")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UsageError(f"{store.where}/{name} is damaged: it is not a JSON object.")
    return found
