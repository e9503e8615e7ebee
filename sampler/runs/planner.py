"""Rows become jobs, one after the other, and a plan on the way. No torch.

Of each job only its key and its group stay in memory, so that a million rows fit.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import Any, Literal

from sampler.errors import SamplerError, UsageError
from sampler.runs.jobs import Job, JobSettings, Keys, Model, canonical
from sampler.runs.lines import PromptLine, parse_line
from sampler.runs.plan import Plan
from sampler.runs.settings import RunDefaults, resolve
from sampler.runs.tables import Line
from sampler.runs.wildcards import Wildcards
from sampler.types import MAX_SEED

Expand = Literal["none", "random", "all"]
Skipped = Callable[[SamplerError], None]


class Planner:
    """Makes jobs of rows, and the plan of them on the way.

    dedupe: equal jobs are made once. on_bad_row "skip" hands a wrong row to `skipped`.
    """

    def __init__(
        self,
        model: Model,
        defaults: RunDefaults,
        batch_size: int | Literal["auto"] = "auto",
        *,
        dedupe: bool = True,
        expand: Expand = "none",
        wildcards: Wildcards | None = None,
        skipped: Skipped | None = None,
    ) -> None:
        self.plan = Plan(batch_size)
        self._model, self._defaults, self._dedupe = model, defaults, dedupe
        self._expand, self._wildcards = expand, wildcards or Wildcards()
        self._skipped = skipped
        self._groups: dict[str, int] = {}
        self._resolved: dict[Any, int] = {}
        self._keys: list[Keys] = []
        self._seen: dict[bytes, int] = {}
        self._replicas: dict[bytes, int] = {}
        self._drawn = 0

    def jobs(self, rows: Iterable[Line], text: bool) -> Iterator[Job]:
        """The jobs of rows; `plan` is complete when they are exhausted.

        text: the cells are all text. Raises SamplerError (2) for a wrong row, for too many jobs,
        and where there is none.
        """
        digest = hashlib.sha256(canonical([self.plan.batch_size, self._dedupe]).encode())
        number = -1
        for number, (where, cells) in enumerate(rows):
            try:
                row, group = self._row(cells, where, text)
                made = self._of_row(row, group, number, cells)
                for job in made:
                    digest.update(job.key.encode())
                    yield job
            except SamplerError as error:
                if self._skipped is None or isinstance(error, TooManyJobs):
                    raise
                self._skipped(error)
        if not self.plan.jobs:
            raise UsageError("There is no prompt; give them as arguments or with --prompts FILE.")
        self.plan.rows, self.plan.hash = number + 1, digest.hexdigest()
        self._seen.clear()

    def _row(self, cells: Any, where: str, text: bool) -> tuple[PromptLine, int]:
        if isinstance(cells, SamplerError):
            raise cells
        if "axes" in cells:
            cells = {name: value for name, value in cells.items() if name != "axes"}
        row = parse_line(cells, where, self._defaults.limits, text)
        return row, self._group(row, where)

    def _group(self, row: PromptLine, where: str) -> int:
        said = (row.steps, row.width, row.height, row.scale)
        if row.sampler is not None or row.guidance is not None or row.fields:
            said = (*said, canonical([row.sampler, row.guidance, row.fields]))
        if said not in self._resolved:
            try:
                settings = resolve(row, self._defaults, self._model.native)
            except (ValueError, RecursionError) as error:
                raise UsageError(f"{where}: {error}") from None
            self._resolved[said] = self._known(settings)
        return self._resolved[said]

    def _known(self, settings: JobSettings) -> int:
        text = canonical(asdict(settings))
        if text not in self._groups:
            self._groups[text] = len(self._groups)
            self.plan.groups.append(settings)
            self.plan.members.append(array("I"))
            self._keys.append(Keys(settings, self._model))
        return self._groups[text]

    def _of_row(self, row: PromptLine, group: int, number: int, cells: Any) -> Iterator[Job]:
        defaults, keys = self._defaults, self._keys[group]
        negative = defaults.negative_prompt if row.negative_prompt is None else row.negative_prompt
        given = row.seed if row.seed is not None else defaults.seed
        axes = cells.get("axes", {})
        for copy, prompt in self._prompts(row, row.n or defaults.n, given):
            if given is None:
                seed = keys.seed(prompt, negative, copy, defaults.run_seed)
            else:
                seed = given + copy
            if seed > MAX_SEED:
                raise UsageError(f"row {number + 1}: seed: {seed} is more than 2^63 - 1.")
            replica = 0
            key = keys.key(prompt, negative, 0, seed)
            index = self._seen.get(bytes.fromhex(key))
            if index is not None and self._dedupe:
                self.plan.duplicates.append((number, index))
                continue
            if index is not None:
                first = bytes.fromhex(key)
                replica = self._replicas[first] = self._replicas.get(first, 0) + 1
                key = keys.key(prompt, negative, replica, seed)
            index = self._add(key, group)
            yield Job(
                index, key, number, group, prompt, negative, seed, replica, row.tag, row.meta, axes
            )

    def _add(self, key: str, group: int) -> int:
        index = self.plan.jobs
        if index >= self._defaults.limits.max_jobs:
            raise TooManyJobs(
                f"More than {self._defaults.limits.max_jobs:,} images (limits.max_jobs)."
            )
        self._seen[bytes.fromhex(key)] = index
        self.plan.members[group].append(index)
        self.plan.jobs += 1
        return index

    def _prompts(self, row: PromptLine, n: int, seed: int | None) -> Iterator[tuple[int, str]]:
        """(number of the copy, prompt) of a row's images.

        Raises TooManyJobs at once for a row that is too many by itself: its images all differ.
        """
        limit = self._defaults.limits.max_jobs
        count = self._wildcards.count(row.prompt) if self._expand == "all" else 1
        if count <= limit < count * n:
            raise TooManyJobs(f"More than {limit:,} images (limits.max_jobs).")
        if self._expand == "none":
            for copy in range(n):
                yield copy, row.prompt
        elif self._expand == "all":
            for prompt in self._wildcards.all(row.prompt, limit):
                for copy in range(n):
                    yield copy, prompt
        else:
            base = self._defaults.run_seed if seed is None else seed
            for copy in range(n):
                yield copy, self._wildcards.random(row.prompt, base, self._drawn)
                self._drawn += 1


class TooManyJobs(UsageError):
    """The limit on images is reached; never skipped as a wrong row."""
