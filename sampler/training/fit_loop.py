"""Loop of a fine-tuning run: updates, evaluations, checkpoints, resume."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sampler.core.errors import IncompleteError
from sampler.registry import spec_of
from sampler.rewards.scoring import NonFiniteScore
from sampler.training import batches, checkpoint, evaluate
from sampler.training.averages import warm_decay
from sampler.training.base import TrainerBase
from sampler.training.journal import Journal
from sampler.training.optimise import NonFinite, Optimiser, run_update
from sampler.training.session import Session
from sampler.training.settings import Settings
from sampler.training.stopping import stop_reason

if TYPE_CHECKING:
    from accelerate import Accelerator

Progress = Callable[[dict[str, Any]], None]


class FitLoop:
    """Mutable state of one call of `fit`.

    done, skips: updates done, and skipped in a row; images, nfe: totals so far; saved: number of
    updates in the newest checkpoint; state: the trainer's; result: folder of the result.
    """

    def __init__(
        self,
        session: Session,
        trainer: TrainerBase,
        prompts: list[str],
        out: Path,
        settings: Settings,
        accelerator: Accelerator,
        progress: Progress | None,
    ) -> None:
        self.session, self.trainer, self.prompts = session, trainer, prompts
        self.out, self.settings, self.accelerator = out, settings, accelerator
        self.trainable: Any = session.trainable
        self.progress, self.main = progress, accelerator.is_main_process
        adam = torch.optim.AdamW(
            self.trainable.parameters.values(),
            lr=settings.lr or 0.0,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay or 0.0,
        )
        self.optimiser = Optimiser(self.trainable, adam, settings.clip or 0.0, accelerator)
        self.state, self.done, self.saved, self.skips = trainer.start(), 0, -1, 0
        self.images = self.nfe = 0
        found = checkpoint.load_newest(out / "checkpoints") if self.main else None
        accelerator.wait_for_everyone()  # the main process has removed partial checkpoints
        found = found or checkpoint.load_newest(out / "checkpoints")
        if found is not None:
            if self.main:  # those that a kill has spared
                checkpoint.remove_old(out / "checkpoints", found.update, settings.keep)
            self.trainable.load(found.adapter)
            checkpoint.restore_optimizer(adam, found.optimizer)
            self.state, self.done, self.saved = found.state["trainer"], found.update, found.update
            self.skips = found.state["skips"]
            self.images, self.nfe = found.state["images"], found.state["nfe"]
        if self.main and self.done > settings.updates:
            warnings.warn(
                f"{out} has {self.done} updates already, more than fit.updates = "
                f"{settings.updates}; nothing is trained.",
                stacklevel=2,
            )
        self.journal = Journal(out, self.done, self.main)
        self.base: evaluate.RewardEvaluation | None = None
        self.result = out

    def run(self) -> str:
        """Perform the remaining updates; return the reason to stop early, or ""."""
        stopped = self._evaluate()
        try:
            while self.done < self.settings.updates and not stopped:
                self._update()
                stopped = self._evaluate()
                if self.done % self.settings.checkpoint_every == 0:
                    self._save()
        except BaseException:
            # Unless weights have changed within the update, it can be repeated from here.
            if not self.optimiser.stepped:
                self._save()
            raise
        self._save()
        if self.main:
            manifest = {"updates": self.done, "trainer": spec_of(self.trainer)}
            manifest["fit"] = self.settings.record()
            self.result = self.trainer.save(self.session, self.out, manifest)
        return stopped

    def _update(self) -> None:
        settings, wall, cpu = self.settings, time.perf_counter(), time.process_time()
        progress = self.done / max(settings.updates, 1)
        lr_end = 1.0 if settings.lr_end is None else settings.lr_end
        rate = (settings.lr or 0.0) * (1 + (lr_end - 1) * progress)
        for group in self.optimiser.adam.param_groups:
            group["lr"] = rate
        size = self.trainer.images_per_prompt
        count = settings.batch_of(size)
        batch = batches.batch(
            self.prompts,
            count,
            self.done,
            settings.seed,
            size,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            progress,
            self.trainer.choose(self.prompts, count // size, settings.seed, self.done, self.state),
        )
        record: dict[str, Any] = {"kind": "update", "update": self.done + 1, "lr": rate}
        try:
            metrics, self.state = run_update(
                self.trainer,
                self.session,
                batch,
                self.state,
                self.optimiser,
                settings.mixed_precision,
            )
            record |= metrics
            self.skips = 0
            if settings.ema:
                self.trainable.averages["ema"].follow(warm_decay(settings.ema, self.done))
        except (NonFinite, NonFiniteScore) as error:
            record["skipped"] = str(error)
            if self.optimiser.stepped:
                record["skipped"] += " The optimiser steps of the update before it were made."
            self.skips += 1
        self.optimiser.stepped = True  # until its record is written, an update is not complete
        self.done += 1
        self.images += count
        self.nfe += int(record.pop("nfe", 0))
        record |= {"images": self.images, "nfe": self.nfe}
        record |= {"seconds": time.perf_counter() - wall}
        record |= {"cpu_seconds": time.process_time() - cpu}
        self._log(record)
        self.optimiser.stepped = False
        if self.skips >= settings.max_skips:
            raise IncompleteError(
                f"{self.skips} updates in a row were not finite, the last with: "
                f"{record['skipped']} The adapter before them is in {self.out / 'checkpoints'}.",
            )

    def _evaluate(self) -> str:
        """Evaluate where that is due and not logged yet; return the reason to stop, or ""."""
        every = self.settings.eval_every
        due = every and (self.done % every == 0 or self.done == self.settings.updates)
        if not due:
            return ""
        logged = [e["update"] for e in self.journal.evaluations()]
        if self.done not in logged:
            prompts = self._evaluation_prompts()
            if self.base is None:
                with self.session.reference():
                    self.base = evaluate.evaluate(self.session, prompts, rewarded=False)
            with self.trainer.evaluation_session(self.session) as session:
                found = evaluate.evaluate(session, prompts)
            if self.main:
                evaluate.save_sheet(found.images, self.out / "eval" / f"{self.done:06d}.png")
            self._log({"kind": "eval", "update": self.done, **found.record(self.base)})
        return stop_reason(self.settings, self.journal.evaluations())

    def _evaluation_prompts(self) -> list[str]:
        """Return the prompts of evaluations, with the metadata of training prompts of that text."""
        given = list(self.settings.eval_prompts or ())
        own = self.prompts[: len(given)]
        known = {prompt: prompt for prompt in reversed(self.prompts)}
        return own if given == own else [known.get(prompt, prompt) for prompt in given]

    def _log(self, record: dict[str, Any]) -> None:
        record = self.journal.add(record)
        if self.settings.log_with:
            kind = record["kind"]
            shown = {k: v for k, v in record.items() if isinstance(v, (int, float))}
            numbers = {f"{kind}/{k}": v for k, v in shown.items() if k != "update"}
            self.accelerator.log(numbers, step=record["update"])
        if self.main and self.progress is not None:
            self.progress(record)

    def _save(self) -> None:
        if not self.main or self.saved == self.done:
            return
        self.journal.sync()
        state = {"trainer": self.state, "skips": self.skips}
        state |= {"images": self.images, "nfe": self.nfe}
        tensors = checkpoint.optimizer_tensors(self.optimiser.adam)
        current = checkpoint.Checkpoint(self.done, self.trainable.tensors(), tensors, state)
        checkpoint.save_checkpoint(self.out / "checkpoints", current, self.settings.keep)
        self.saved = self.done
