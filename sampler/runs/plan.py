"""What a run will make, cut into batches: a function of the jobs and the batch size alone.

Jobs are grouped by settings in input order and cut into batches once; a batch is never cut again
over what remains, because a network rounds differently with other neighbours.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from sampler.runs.jobs import Settings

AUTO_PIXELS = 8 * 512 * 512  # per batch: eight images of a first-generation model
AUTO_MOST = 16  # more gains nothing on a CPU: the bundled network is at its best at 16 to 32 rows


@dataclass(frozen=True)
class Batch:
    """Jobs that are computed together, always."""

    id: int
    group: int
    jobs: Sequence[int]


@dataclass
class Plan:
    """What a run will make. jobs: how many; duplicates: (row, index of the job it shares)."""

    batch_size: int | Literal["auto"]
    groups: list[Settings] = field(default_factory=list)
    members: list[array[int]] = field(default_factory=list)
    duplicates: list[tuple[int, int]] = field(default_factory=list)
    jobs: int = 0
    rows: int = 0
    hash: str = ""

    def batches(self) -> list[Batch]:
        """The batches, in the order of their first jobs."""
        cuts = []
        for group, members in enumerate(self.members):
            size = self.size_of(group)
            cuts += [(members[k], group, k, size) for k in range(0, len(members), size)]
        cuts.sort()
        return [
            Batch(number, group, self.members[group][k : k + size])
            for number, (_, group, k, size) in enumerate(cuts)
        ]

    def size_of(self, group: int) -> int:
        """The batch size of a group; "auto" goes by the size of its images alone."""
        if self.batch_size != "auto":
            return self.batch_size
        settings = self.groups[group]
        pixels = (settings.height or 512) * (settings.width or 512)
        return max(1, min(AUTO_MOST, AUTO_PIXELS // pixels))
