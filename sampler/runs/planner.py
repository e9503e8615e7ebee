"""Prompt lines to jobs, one after the other, and to a plan. Imports no torch.

Only the key and the group of each job stay in memory, so that a million lines fit.
"""

from __future__ import annotations

import hashlib
import secrets
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any, Literal

from sampler import registry
from sampler.core.errors import SamplerError, UsageError
from sampler.runs.cells import RANDOM_SEED
from sampler.runs.jobs import Job, JobSettings, Keys, Model, canonical
from sampler.runs.lines import PromptLine, parse_line
from sampler.runs.plan import Cell, Plan, plan_digest
from sampler.runs.readers import RawLine
from sampler.runs.settings import RunDefaults, line_settings
from sampler.runs.template_parser import looks_like_template
from sampler.runs.wildcards import Wildcards
from sampler.types import MAX_SEED

Expand = Literal["none", "random", "all"]


class Planner:
    """Jobs of prompt lines, and their plan.

    dedupe: equal jobs are generated once. on_skip: receives the error of an invalid line, which is
    then left out; None raises it. keep_extra: record unknown columns as `meta_NAME`.
    default_size(inputs): (height, width) of a call with these inputs, None where it takes none;
    raises ValueError for inputs that the pipeline does not take.

    unexpanded: number of lines with template syntax that stays text; extra: columns that were kept;
    unheard: names of rules that leave the negative prompt of a line out; drawn: random number of
    the run, None if no seed needs it.
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
        on_skip: Callable[[SamplerError], None] | None = None,
        keep_extra: bool = False,
        default_size: Callable[[Mapping[str, Any]], tuple[int, int] | None] | None = None,
    ) -> None:
        self.plan = Plan(batch_size, dedupe)
        self.model = model
        self._defaults = defaults
        self._expand, self._wildcards = expand, wildcards or Wildcards()
        self._on_skip = on_skip
        self._default_size = default_size
        self._groups: dict[str, int] = {}
        self._resolved: dict[Any, int] = {}
        self._keys: list[Keys] = []
        self._hears: dict[int, bool] = {}
        self._seen: dict[bytes, int] = {}
        self._replicas: dict[bytes, int] = {}
        self._drawn = 0
        self.unexpanded = 0
        self.unheard: set[str] = set()
        self.drawn = defaults.drawn
        self.extra: set[str] | None = set() if keep_extra else None

    def jobs(self, lines: Iterable[RawLine]) -> Iterator[Job]:
        """Yield the jobs of the lines; `plan` is complete when they are exhausted.

        Raises UsageError for an invalid line, for too many jobs, and for no job at all.
        """
        digest = plan_digest(self.plan.batch_size, self.plan.dedupe)
        number = -1
        for number, raw in enumerate(lines):
            try:
                line = parse_line(raw, self._defaults.limits, self.extra)
                group = self._group(line, raw.where)
                for job in self._jobs_of(line, group, number, raw.axes):
                    digest.update(job.key.encode())
                    yield job
            except SamplerError as error:
                if self._on_skip is None or isinstance(error, TooManyJobs):
                    raise
                self._on_skip(error)
        if not self.plan.jobs:
            raise UsageError("No prompts: give them as arguments or with --prompts FILE.")
        self.plan.lines, self.plan.hash = number + 1, digest.hexdigest()
        self._seen.clear()

    def _group(self, line: PromptLine, where: str) -> int:
        given = (line.steps, line.width, line.height, line.scale)
        own = [line.sampler, line.guidance, line.fields, line.grid]
        if any(value is not None and value != {} for value in own):
            given = (*given, canonical(own))
        if line.inputs:
            given = (*given, _plain_inputs(line.inputs, where))
        if given not in self._resolved:
            try:
                settings = line_settings(line, self._defaults, self._native(line))
            except (ValueError, RecursionError, UsageError) as error:
                raise UsageError(f"{where}: {error}") from None
            self._resolved[given] = self._add_group(settings)
        return self._resolved[given]

    def _native(self, line: PromptLine) -> tuple[int, int] | None:
        """Return the default size of a line, None where the pipeline decides it."""
        if self._default_size is None:
            return self.model.native
        return self._default_size({**self._defaults.settings.inputs, **line.inputs})

    def _add_group(self, settings: JobSettings) -> int:
        text = canonical(asdict(settings))
        if text not in self._groups:
            self._groups[text] = len(self._groups)
            self.plan.groups.append(settings)
            self.plan.members.append(array("I"))
            self._keys.append(Keys(settings, self.model))
        return self._groups[text]

    def _jobs_of(
        self, line: PromptLine, group: int, number: int, axes: Mapping[str, Any]
    ) -> Iterator[Job]:
        defaults, keys = self._defaults, self._keys[group]
        negative = line.negative_prompt
        negative = defaults.negative_prompt if negative is None else negative
        if negative and not self._hears_negative(group):
            self.unheard.add(self.plan.groups[group].guidance["name"])
        given = self._given_seed(line, number)
        prompts = self._prompts(line, line.n or defaults.n, given)
        for place, (copy, prompt) in enumerate(prompts):
            if given is None:
                seed = keys.seed(prompt, negative, copy, defaults.run_seed)
            else:
                seed = given + copy
            if seed > MAX_SEED:
                raise UsageError(f"line {number + 1}: seed: {seed} is more than 2^63 - 1.")
            replica, key = 0, keys.key(prompt, negative, 0, seed)
            first = bytes.fromhex(key)
            if (index := self._seen.get(first)) is not None:
                if self.plan.dedupe:
                    self.plan.duplicates.append((number, index))
                    if axes:
                        self.plan.cells.append(Cell(number, place, index, axes))
                    continue
                replica = self._replicas[first] = self._replicas.get(first, 0) + 1
                key = keys.key(prompt, negative, replica, seed)
            yield Job(
                self._add(key, group),
                key,
                number,
                group,
                prompt,
                negative,
                seed,
                replica,
                line.tag,
                line.meta,
                axes,
            )

    def _hears_negative(self, group: int) -> bool:
        """Return True where the rule of a group evaluates the negative prompt."""
        if group not in self._hears:
            rule = registry.build("guidance", self.plan.groups[group].guidance)
            self._hears[group] = "uncond" in rule.needs
        return self._hears[group]

    def _given_seed(self, line: PromptLine, number: int) -> int | None:
        """Seed of the first image of a line, None to derive it; random ones are drawn once a run.

        All lines share the random seed of a run; that of a line is its own.
        """
        given = self._defaults.seed if line.seed is None else line.seed
        if given is None or (given != "random" and given != RANDOM_SEED):
            return given
        if self.drawn is None:
            self.drawn = secrets.randbelow(2**32)  # as web UIs do
        if given == "random":
            return self.drawn
        digest = hashlib.sha256(f"seed\n{self.drawn}\n{number}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 11  # 53 bits, which floats hold as well

    def _add(self, key: str, group: int) -> int:
        index, limit = self.plan.jobs, self._defaults.limits.max_jobs
        if index >= limit:
            raise TooManyJobs(limit)
        self._seen[bytes.fromhex(key)] = index
        self.plan.members[group].append(index)
        self.plan.jobs += 1
        return index

    def _prompts(self, line: PromptLine, n: int, seed: int | None) -> Iterator[tuple[int, str]]:
        """Yield (number of the copy, prompt) for the images of a line.

        Raises TooManyJobs at once if the line alone exceeds the limit: its images all differ.
        """
        limit = self._defaults.limits.max_jobs
        count = self._wildcards.count(line.prompt) if self._expand == "all" else 1
        if count <= limit < count * n:
            raise TooManyJobs(limit)
        if self._expand == "none":
            self.unexpanded += looks_like_template(line.prompt)
            for copy in range(n):
                yield copy, line.prompt
        elif self._expand == "all":
            for prompt in self._wildcards.all(line.prompt, limit):
                for copy in range(n):
                    yield copy, prompt
        else:
            base = self._defaults.run_seed if seed is None else seed
            for copy in range(n):
                yield copy, self._wildcards.random(line.prompt, base, self._drawn)
                self._drawn += 1


def _plain_inputs(inputs: Mapping[str, Any], where: str) -> str:
    try:
        return canonical(inputs)
    except (TypeError, ValueError):
        raise UsageError(
            f"{where}: inputs: only numbers, texts and files can be recorded in a run folder."
        ) from None


class TooManyJobs(UsageError):
    """More images than limits.max_jobs; never skipped as an invalid line."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"More than {limit:,} images (limits.max_jobs).")
