"""What a trainer is, and what it hands to the loop that runs it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from sampler.training.batches import derived
from sampler.training.settings import Defaults, Settings

if TYPE_CHECKING:
    from torch import Tensor

    from sampler.training.batches import Batch
    from sampler.training.session import Session


@dataclass(frozen=True)
class Update:
    """One micro-batch's share of an optimiser step.

    loss: a scalar, already divided by the number of rows (or actions) of the whole step over all
    processes, so that shares add up to the step's loss; None where this process has no rows.
    metrics: per-row tensors [B] (averaged over all rows) or plain numbers (the last one counts).
    step: whether the optimiser steps after this share. state: what the trainer wants to be given
    next time; that of the last share counts. group: the optimiser steps the parameters whose
    names start so.
    """

    loss: Tensor | None
    metrics: Mapping[str, Any] = field(default_factory=dict[str, Any])
    step: bool = False
    state: Any = None
    group: str = ""


class Trained(Protocol):
    """What a run trains: `parameters` by name, float32; `tensors` are what a checkpoint holds, and
    `load` takes them back. From `disable` to `enable` the engine's network answers as before."""

    @property
    def parameters(self) -> dict[str, Any]: ...
    def tensors(self) -> dict[str, Tensor]: ...
    def load(self, tensors: dict[str, Tensor]) -> None: ...
    def disable(self) -> None: ...
    def enable(self) -> None: ...


class TrainerBase:
    """The defaults of a trainer; a strategy is a frozen dataclass that overrides what differs.

    rewarded: whether it needs a reward.
    """

    name: ClassVar[str] = ""
    reference: ClassVar[str] = ""
    defaults: ClassVar[Defaults]
    rewarded: ClassVar[bool] = True

    @property
    def group(self) -> int:
        """Images per prompt in a batch."""
        return 1

    def tried(self, prompts: int) -> TrainerBase:
        """The trainer of a trial of one update on so many prompts."""
        return self

    def check(self, session: Session) -> None:
        """Raises ValueError, before anything is sampled, for what cannot be trained."""

    def prepare(self, session: Session, prompts: list[str], out: Path, settings: Settings) -> None:
        """Makes files that the run needs, in `out`; the main process is through with it first."""

    def trained(
        self, session: Session, prompts: list[str], out: Path, settings: Settings
    ) -> AbstractContextManager[Trained]:
        """Inside, there is something to train: an adapter on the engine's network."""
        from sampler.models.lora import adapted

        rank, alpha = settings.rank or 1, settings.alpha or 1
        seed = derived(settings.seed, 0, "adapter")
        return adapted(session.engine.pipeline.network, rank, alpha, settings.targets, seed)

    def evaluated(self, session: Session) -> AbstractContextManager[Session]:
        """Inside, what an evaluation samples with."""
        return nullcontext(session)

    def save(self, session: Session, out: Path, manifest: dict[str, Any]) -> Path:
        """Writes the result below `out`; returns its folder."""
        from sampler.models.lora import save_lora

        prefix = session.engine.pipeline.network_name
        return save_lora(session.adapter, prefix, out / "lora", manifest).parent

    def start(self) -> Any:
        """The first state: plain data, saved with the checkpoints."""
        return None

    def updates(self, session: Session, batch: Batch, state: Any) -> Iterator[Update]:
        """The shares of one or more optimiser steps on this batch."""
        raise NotImplementedError
