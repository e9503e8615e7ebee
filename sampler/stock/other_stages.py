"""Stages of a stock pipeline whose steps are not guided: a prior before, an upscaler after."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

from sampler.pipelines.call_arguments import scheduler_name, scheduler_of

log = logging.getLogger("sampler")


class OtherStages:
    """Schedulers of a pipeline beside the guided one.

    A stage begins where its scheduler is given timesteps, a new tensor each time.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.begin()

    def begin(self) -> None:
        """Begin the pipeline's call or its guided stage."""
        guided, parts = scheduler_of(self.pipe), self.pipe.components
        self._schedulers = {
            name: (part, part.timesteps)
            for name, part in parts.items()
            if part is not guided and name.endswith("scheduler") and hasattr(part, "timesteps")
        }

    def is_running(self) -> bool:
        """Return True in another stage, which is told once."""
        for name, (part, before) in self._schedulers.items():
            if part.timesteps is not before:
                cls = type(self.pipe)
                _tell_of_stage(cls.__name__, scheduler_name(cls), name)
                return True
        return False


@cache
def _tell_of_stage(name: str, guided: str, other: str) -> None:
    log.warning(
        "%s has several stages: sampler and guidance are those of its %s, and the stage of its %s "
        "stays the pipeline's own.",
        name,
        guided,
        other,
    )


@cache
def tell_of_output(name: str) -> None:
    """Warn once of a pipeline that steps a second output of its network."""
    log.warning(
        "%s steps another output of its network too, such as sound, which keeps the pipeline's own "
        "guidance.",
        name,
    )
