"""Drop-in for EDMEulerScheduler, whose pipelines may take a step back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

# diffusers looks for SchedulerMixin in the module of a scheduler that it loads
from diffusers.schedulers.scheduling_utils import SchedulerMixin as SchedulerMixin
from sampler_kernels import settle
from torch import Tensor

from sampler.stock.scheduler import SamplerScheduler
from sampler.types import Prediction


class StepsBack(SamplerScheduler):
    """Steps answer with the sample and x0, each computed when it is read.

    Cosmos' pipelines ask a step of all branches for its x0, take it back by `_step_index -= 1`, and
    step again with the guided x0. The first step has more rows than the state of the run, so its
    sample is computed only where it is read, or where the next step comes.
    """

    def _reset(self) -> None:
        super()._reset()
        self._before: tuple[int | None, Any, Tensor | None] | None = None
        self._unread: Callable[[], Tensor] | None = None

    def _due_index(self, timestep: Any, after: Any) -> int:
        if self._unread is not None:
            self._unread()
        return super()._due_index(timestep, after)

    def _answer(self, index: int, take: Callable[[], Tensor], pred: Prediction) -> Sequence[Tensor]:
        def sample() -> Tensor:
            if self._unread is read:
                self._unread = None
            return take()

        read = cache(sample)
        self._before = self._index, self._state, self._x
        self._index, self._unread = index + 1, read
        return _Answer(read, lambda: settle(pred.x0))

    @property
    def _step_index(self) -> int | None:
        return self._index

    @_step_index.setter
    def _step_index(self, value: int) -> None:
        if self._before is None or self._index is None or value != self._index - 1:
            raise ValueError(
                "This pipeline sets the position of its scheduler, and a drop-in only takes its "
                "last step back; keep the scheduler that the pipeline came with."
            )
        self._index, self._state, self._x = self._before
        self._before = self._unread = None

    def _get_conditioning_c_in(self, sigma: Tensor) -> Tensor:
        """Factor on x at a level before it enters the network, as the stock scheduler has it."""
        data = self.schedule.sigma_data
        return 1 / (sigma * sigma + data * data) ** 0.5


class _Answer(Sequence[Tensor]):
    """Values that are computed when they are read."""

    def __init__(self, *values: Callable[[], Tensor]) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, key: Any) -> Any:
        found = self._values[key]
        return tuple(value() for value in found) if isinstance(found, tuple) else found()
