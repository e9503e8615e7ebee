"""Plan of a run: jobs cut into batches, a function of the jobs and the batch size alone.

Jobs are grouped by settings in input order and cut into batches once. The remainder of a batch is
never cut again, because networks round differently with other batch neighbours. Groups that differ
only in the guidance scale share batches if their rule takes a scale per sample.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

from sampler.runs.jobs import JobSettings, canonical

AUTO_PIXELS = 8 * 512 * 512  # per batch: eight images of a first-generation model
AUTO_MAX = 16  # images; more gains nothing on a CPU, where the bundled network peaks at 16 to 32
SCALE_PER_SAMPLE = ("cfg", "apg")  # rules whose scale may differ within a batch


@dataclass(frozen=True)
class PlannedBatch:
    """Jobs that are always computed together. group: that of the first job."""

    id: int
    group: int
    jobs: Sequence[int]


class Cell(NamedTuple):
    """Image number `place` of a line of a sweep, and its values; `job` generates an equal image."""

    line: int
    place: int
    job: int
    axes: Mapping[str, Any]


@dataclass
class Plan:
    """Groups, jobs and batches of a run.

    members: job numbers by group; duplicates: (line, number of the equal job); cells: places of a
    sweep that such a job fills as well; jobs, lines: counts.
    """

    batch_size: int | Literal["auto"]
    dedupe: bool = True
    groups: list[JobSettings] = field(default_factory=list)
    members: list[array[int]] = field(default_factory=list)
    duplicates: list[tuple[int, int]] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list["Cell"])
    jobs: int = 0
    lines: int = 0
    hash: str = ""

    def batches(self) -> list[PlannedBatch]:
        """Batches in the order of their first jobs."""
        by_key: dict[str, list[int]] = {}
        for group, settings in enumerate(self.groups):
            by_key.setdefault(batch_key(settings), []).append(group)
        cuts: list[tuple[int, int, Sequence[int]]] = []
        for groups in by_key.values():
            size, (jobs, owner) = self.size_of(groups[0]), self._merged(groups)
            cuts += [(jobs[k], owner(k), jobs[k : k + size]) for k in range(0, len(jobs), size)]
        cuts.sort(key=lambda cut: cut[0])
        return [PlannedBatch(number, group, jobs) for number, (_, group, jobs) in enumerate(cuts)]

    def _merged(self, groups: Sequence[int]) -> tuple[Sequence[int], Callable[[int], int]]:
        """Jobs of some groups in input order, and a function from position to group."""
        if len(groups) == 1:
            return self.members[groups[0]], lambda k: groups[0]
        count = len(self.groups)
        tagged = sorted(index * count + group for group in groups for index in self.members[group])
        return array("I", (tag // count for tag in tagged)), lambda k: tagged[k] % count

    def size_of(self, group: int) -> int:
        """Batch size of a group; "auto" depends on the image size alone."""
        if self.batch_size != "auto":
            return self.batch_size
        settings = self.groups[group]
        pixels = (settings.height or 512) * (settings.width or 512)
        return max(1, min(AUTO_MAX, AUTO_PIXELS // pixels))


def batch_key(settings: JobSettings) -> str:
    """Key under which groups may share a batch: all settings, or all but the guidance scale.

    Scales 0 and 1 do not mix with others, since they cost one evaluation; neither does a sampler
    with a calibrated number, which depends on the scale.
    """
    plain = asdict(settings)
    scale = settings.guidance.get("scale")
    if (
        settings.guidance["name"] in SCALE_PER_SAMPLE
        and isinstance(scale, (int, float))
        and not (scale == 0 or math.isclose(scale, 1, rel_tol=1e-9))
        and not any(str(value).startswith("calibrated") for value in settings.sampler.values())
    ):
        plain["guidance"] = {**settings.guidance, "scale": None}
    return canonical(plain)


def plan_digest(batch_size: int | Literal["auto"], dedupe: bool) -> Any:
    """SHA-256 of a plan, to be updated with the key of every job in order."""
    return hashlib.sha256(canonical([batch_size, dedupe]).encode())
