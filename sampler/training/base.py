"""Interface between a trainer and the loop that runs it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sampler.core.errors import UsageError
from sampler.training.batches import derived
from sampler.training.settings import Defaults, Settings

if TYPE_CHECKING:
    from torch import Tensor

    from sampler.models.trainable_lora import TrainableLoRA
    from sampler.models.trainable_network import WholeNetwork
    from sampler.training.averages import Averaged
    from sampler.training.batches import Batch
    from sampler.training.session import Session, Trainable


@dataclass(frozen=True)
class MicroBatchLoss:
    """The loss of one micro-batch, to be accumulated into an optimiser step.

    loss: a scalar, already divided by the number of samples (or actions) of the whole step over
        all processes, so that micro-batch losses add up to the step's loss; None where this
        process has no samples.
    metrics: tensors [B] with one value per sample (averaged over all samples), or numbers (the
        last one is logged).
    step: whether the optimiser steps after this micro-batch.
    state: the trainer's state for the next update; the last one that is not None is kept.
    prefix: the optimiser steps the parameters whose names start with it.
    lr: factor of the run's learning rate in this step.
    """

    loss: Tensor | None
    metrics: Mapping[str, Tensor | float] = field(default_factory=dict[str, Any])
    step: bool = False
    state: Any = None
    prefix: str = ""
    lr: float = 1.0


class TrainerBase:
    """Defaults of a trainer; a strategy is a frozen dataclass that overrides what differs."""

    name: ClassVar[str] = ""
    reference: ClassVar[str] = ""
    defaults: ClassVar[Defaults]

    @property
    def averages(self) -> tuple[str, ...]:
        """Names of the averages of the trained weights that the trainer keeps."""
        return ()

    @property
    def scheduled(self) -> bool:
        """True where an update depends on the length of the run, which then cannot change."""
        return False

    @property
    def needs_reward(self) -> bool:
        """True where a run without a reward is refused."""
        return True

    @property
    def judges_batches(self) -> bool:
        """True for a trainer that takes rewards of whole batches, such as votes."""
        return False

    @property
    def differentiates_decoder(self) -> bool:
        """True where the gradient of the reward goes through the decoder."""
        return False

    @property
    def images_per_prompt(self) -> int:
        """Number of images of each prompt in a batch."""
        return 1

    def texts(self, given: list[str]) -> list[str]:
        """Return the prompts to train on; `given` are those of the run. UsageError for none."""
        if not given:
            raise UsageError("No prompts: give a list of texts, or a prompt file (--prompts FILE).")
        return given

    def images(self, prompts: list[str]) -> list[Path]:
        """Return the files that the updates read: with other contents it is another run."""
        return []

    def choose(
        self, prompts: list[str], count: int, seed: int, update: int, state: Any
    ) -> list[int] | None:
        """Return the places of an update's `count` prompts, None for all of them in turn."""
        return None

    def for_dry_run(self, prompts: int) -> TrainerBase:
        """Return the trainer of a dry run: one update on this number of prompts."""
        return self

    @property
    def unused(self) -> dict[str, str]:
        """Names of the fields that have no effect, with the setting under which they have none."""
        return {}

    def check(self, session: Session) -> None:
        """Raise ValueError, before anything is sampled, for a run that cannot be trained."""

    def prepare(self, session: Session, prompts: list[str], out: Path, settings: Settings) -> None:
        """Write the files that the run needs into `out`; the main process calls it first."""

    def check_batch(self, images: int) -> None:
        """Raise ValueError for a number of images per process and update that is too small."""

    def check_settings(self, settings: Settings) -> None:
        """Raise ValueError for settings that are given and that this trainer does not use."""

    def trainable(
        self, session: Session, prompts: list[str], out: Path, settings: Settings
    ) -> AbstractContextManager[Trainable]:
        """Install the trained weights for the time of a context, with their averages."""
        return self.averaged(session, settings)

    @contextmanager
    def averaged(self, session: Session, settings: Settings) -> Iterator[Averaged]:
        """Make weights trainable for the time of a context, with the averages of the settings."""
        from sampler.training.averages import Average, Averaged

        names = (*self.averages, *(("ema",) if settings.ema else ()))
        with self.weights(session, settings) as adapter:
            averages = {name: Average.of(adapter.parameters) for name in names}
            yield Averaged(adapter, averages)

    def weights(
        self, session: Session, settings: Settings
    ) -> AbstractContextManager[TrainableLoRA | WholeNetwork]:
        """Make a LoRA or the network itself trainable for the time of a context."""
        from sampler.models.lora_files import lora_pairs
        from sampler.models.start_lora import read_factors
        from sampler.models.trainable_lora import adapted
        from sampler.models.trainable_network import unfrozen

        if settings.adapter == "full":
            return unfrozen(session.pipeline.network)
        rank, alpha, targets = settings.rank or 1, settings.alpha or 1.0, settings.targets or ()
        seed, network = derived(settings.seed, 0, "adapter"), session.pipeline.network
        start = None
        if settings.init_lora is not None:
            start = read_factors(session.pipeline.pipe, network, lora_pairs(settings.init_lora))
        return adapted(network, rank, alpha, targets, seed, start)

    def evaluation_session(self, session: Session) -> AbstractContextManager[Session]:
        """Give the session that an evaluation samples with: under the average "ema", if any."""
        return session.trainable.evaluated(session)

    def save(self, session: Session, out: Path, manifest: dict[str, Any]) -> Path:
        """Write the result below `out` and return its folder.

        With an average it is that one, and the last weights are beside it in lora_last/.
        """
        trained = session.trainable
        if "ema" in trained.averages:
            self.save_weights(session, out / "lora_last", manifest)
        with trained.evaluated(session):
            return self.save_weights(session, out / "lora", manifest)

    def save_weights(self, session: Session, folder: Path, manifest: dict[str, Any]) -> Path:
        """Write the trained weights as they are into a folder and return it.

        Those of a whole network are a stock pipeline in model/ instead of lora/.
        """
        from sampler.models.trainable_lora import save_lora
        from sampler.models.trainable_network import WholeNetwork, save_pipeline

        adapter, pipeline = session.trainable.adapter, session.pipeline
        if isinstance(adapter, WholeNetwork):
            place = folder.with_name(folder.name.replace("lora", "model"))
            return save_pipeline(adapter, pipeline.pipe, place, manifest)
        return save_lora(adapter, pipeline.network_name, folder, manifest).parent

    def start(self) -> Any:
        """Return the first state: plain data, saved with the checkpoints."""
        return None

    def updates(self, session: Session, batch: Batch, state: Any) -> Iterator[MicroBatchLoss]:
        """Yield the micro-batch losses of one or more optimiser steps on this batch."""
        raise NotImplementedError
