"""What a run will make, cut into batches: a function of the jobs and the batch size alone.

Jobs are grouped by settings in input order and cut into batches once; a batch is never cut again
over what remains, because a network rounds differently with other neighbours. Groups that differ
in the guidance scale alone share batches, where the rule takes a scale per row.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

from sampler.runs.jobs import JobSettings, canonical

AUTO_PIXELS = 8 * 512 * 512  # per batch: eight images of a first-generation model
AUTO_MOST = 16  # more gains nothing on a CPU: the bundled network is at its best at 16 to 32 rows


PER_ROW = ("cfg", "apg")  # rules whose scale may differ from row to row


@dataclass(frozen=True)
class Batch:
    """Jobs that are computed together, always. group: that of the first of them."""

    id: int
    group: int
    jobs: Sequence[int]


@dataclass
class Plan:
    """What a run will make. jobs: how many; duplicates: (row, index of the job it shares)."""

    batch_size: int | Literal["auto"]
    groups: list[JobSettings] = field(default_factory=list)
    members: list[array[int]] = field(default_factory=list)
    duplicates: list[tuple[int, int]] = field(default_factory=list)
    jobs: int = 0
    rows: int = 0
    hash: str = ""

    def batches(self) -> list[Batch]:
        """The batches, in the order of their first jobs."""
        companies: dict[str, list[int]] = {}
        for group, settings in enumerate(self.groups):
            companies.setdefault(batch_key(settings), []).append(group)
        cuts: list[tuple[int, int, Sequence[int]]] = []
        for groups in companies.values():
            size, (jobs, owner) = self.size_of(groups[0]), self._joined(groups)
            cuts += [(jobs[k], owner(k), jobs[k : k + size]) for k in range(0, len(jobs), size)]
        cuts.sort(key=lambda cut: cut[0])
        return [Batch(number, group, jobs) for number, (_, group, jobs) in enumerate(cuts)]

    def _joined(self, groups: Sequence[int]) -> tuple[Sequence[int], Callable[[int], int]]:
        """The jobs of some groups in input order, and which group the k-th of them is of."""
        if len(groups) == 1:
            return self.members[groups[0]], lambda k: groups[0]
        count = len(self.groups)
        tagged = sorted(index * count + group for group in groups for index in self.members[group])
        return array("I", (tag // count for tag in tagged)), lambda k: tagged[k] % count

    def size_of(self, group: int) -> int:
        """The batch size of a group; "auto" goes by the size of its images alone."""
        if self.batch_size != "auto":
            return self.batch_size
        settings = self.groups[group]
        pixels = (settings.height or 512) * (settings.width or 512)
        return max(1, min(AUTO_MOST, AUTO_PIXELS // pixels))


def batch_key(settings: JobSettings) -> str:
    """What groups that share batches have in common: everything, or all but the guidance scale.

    Scales 0 and 1 stay among themselves, since they cost one evaluation; and so does a sampler with
    a calibrated number, which depends on the scale.
    """
    plain = asdict(settings)
    scale = settings.guidance.get("scale")
    if (
        settings.guidance["name"] in PER_ROW
        and isinstance(scale, (int, float))
        and not (scale == 0 or math.isclose(scale, 1, rel_tol=1e-9))
        and not any(str(value).startswith("calibrated") for value in settings.sampler.values())
    ):
        plain["guidance"] = {**settings.guidance, "scale": None}
    return canonical(plain)
