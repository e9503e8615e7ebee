"""Steps of the frames of a video one by one, after one evaluation of all (diffusion forcing).

The pipeline evaluates its network on a video x [B, C, F, h, w] with a timestep for every frame, and
steps frame after frame, each with a copy of its scheduler. Frames that are not stepped, such as
those of a video that is continued, have other timesteps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sampler.stock.forms import Given
from sampler.stock.run_levels import number
from sampler.stock.stock_calls import TIME

DIM = 2  # of the frames


@dataclass
class FrameSteps:
    """Frames of one evaluation that are stepped.

    places: their indices; whole: the step of all of them, of which `output` has the shape only;
    guided: the rule's result for them [B, C, F, h, w], None before the first step; taken: the
    frames after their steps.
    """

    places: list[int]
    whole: Given
    guided: Tensor | None = None
    taken: list[Tensor] = field(default_factory=list[Tensor])

    @property
    def next(self) -> int:
        """Position in `places` of the frame that is due."""
        return len(self.taken)

    def is_due(self, sample: Tensor) -> bool:
        """Return True if a step's sample is the frame that is due."""
        if self.next >= len(self.places):
            return False
        frame = self.whole.x.select(DIM, self.next)
        return sample.shape == frame.shape and torch.equal(sample.to(frame.dtype), frame)

    def one(self, given: Given) -> Given:
        """The step of one frame with its answers."""
        answers = [answer.select(DIM, self.next) for answer in self.whole.answers]
        return given._replace(answers=answers)


def frame_steps(
    given: Given, timestep: Any, sample: Any, kwargs: Mapping[str, Any]
) -> FrameSteps | None:
    """Steps of single frames that begin with a step, None for a step of a whole sample.

    sample, kwargs: of the last network call.
    """
    if not isinstance(sample, Tensor) or sample.ndim != 5 or given.x.ndim != 4:
        return None
    times = next((v for k, v in kwargs.items() if k in TIME and isinstance(v, Tensor)), None)
    frames = sample.shape[DIM]
    videos = all(a.ndim == 5 and a.shape[DIM] == frames for a in given.answers)
    if times is None or times.ndim != 2 or times.shape[1] != frames or not videos:
        return None
    apart = (times.double().cpu() - number(timestep)).abs().amax(0)
    places = (apart <= 1e-3 * max(1.0, abs(number(timestep)))).nonzero()[:, 0].tolist()
    x, *answers = (_chosen(v, places) for v in (sample, *given.answers))
    return FrameSteps(places, given._replace(output=x, x=x, answers=answers))


def _chosen(video: Tensor, places: Sequence[int]) -> Tensor:
    return video[:, :, torch.tensor(places, dtype=torch.long, device=video.device)]
