"""Votes of people on the images of a fine-tuning."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from sampler.core.errors import IncompleteError, UsageError
from sampler.registry import register
from sampler.rewards.ballots import VOTES, read_votes, write_ballot
from sampler.rewards.base import RewardBase

if TYPE_CHECKING:
    from torch import Tensor

RIDGE = 0.1
PAUSE = 1.0  # seconds between two checks for votes


@register("reward", "votes")
@dataclass(frozen=True)
class Votes(RewardBase):
    """Votes of people: an update shows its images and waits for what `sampler vote RUN` writes.

        s = argmax Σ log sigmoid(s_better − s_worse) − ridge/2·Σ s²,   ridge = 0.1

    The images of update 12 are in FOLDER/000012/; votes.jsonl beside them ends the wait
    (`sampler.rewards.ballots`). For the trainers nft, awm and dpo. A run that was killed shows the
    same images again and counts the votes that are there. Images without a vote have weight 0.

    folder: None is RUN/votes. form: "binary", the score is the vote itself, 1 good and 0 bad;
        "pair" and "rank", the Bradley-Terry scores above, of comparisons or of orders.
    wait: False ends the run where votes are missing (exit code 3); the same command resumes it.
    """

    folder: str | None = None
    form: Literal["binary", "pair", "rank"] = "binary"
    wait: bool = True

    batched: ClassVar[bool] = True
    reference: ClassVar[str] = (
        "Rank Analysis of Incomplete Block Designs (Bradley & Terry, 1952), for pair and rank"
    )

    @property
    def differentiable(self) -> bool:
        return False

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        raise UsageError(
            "votes: people vote on whole batches of a training; use it as the reward itself of "
            "nft, awm or dpo."
        )

    def judge(
        self, images: Tensor, prompts: Sequence[str], run: Path, update: int, show: bool
    ) -> list[float]:
        """Return the scores of a batch [N, 3, H, W]; NaN for an image without a vote.

        run: the run folder; show: write the images, in one process of several. Raises
        IncompleteError (3) for missing votes without `wait`, UsageError for wrong ones.
        """
        out = Path(self.folder or run / "votes") / f"{update:06d}"
        if show:
            write_ballot(out, self.form, images, prompts)
        if not (out / VOTES).exists():
            if not self.wait:
                raise IncompleteError(
                    f"{out} has no votes yet; vote with `sampler vote` and run the same command."
                )
            if show:
                warnings.warn(f"Waiting for votes in {out}: use `sampler vote`.", stacklevel=2)
        while not (out / VOTES).exists():
            time.sleep(PAUSE)
        votes = list(read_votes(out))
        if self.form == "binary":
            given = {vote["row"]: float(vote["vote"]) for vote in votes}
            return [given.get(row, float("nan")) for row in range(len(prompts))]
        orders = [
            [vote["better"], vote["worse"]] if self.form == "pair" else vote["rank"]
            for vote in votes
        ]
        wins = [(a, b) for order in orders for i, a in enumerate(order) for b in order[i + 1 :]]
        voted = {row for pair in wins for row in pair}
        scores = bradley_terry(wins, len(prompts))
        return [float(s) if row in voted else float("nan") for row, s in enumerate(scores)]


def bradley_terry(wins: Sequence[tuple[int, int]], count: int) -> NDArray[np.float64]:
    """Return the scores [count] of comparisons (better, worse), the maximum of

        Σ log sigmoid(s_better − s_worse) − ridge/2·Σ s²

    by Newton's method; the ridge makes it unique. Groups without a comparison between them do not
    influence each other.
    """
    scores = np.zeros(count)
    better, worse = (np.array([pair[i] for pair in wins], dtype=int) for i in (0, 1))
    for _ in range(100):
        lose = 1 / (1 + np.exp(scores[better] - scores[worse]))  # probability of the contrary
        gradient = -RIDGE * scores
        np.add.at(gradient, better, lose)
        np.add.at(gradient, worse, -lose)
        hessian, curve = RIDGE * np.eye(count), lose * (1 - lose)
        for i, j, sign in ((better, better, 1), (worse, worse, 1), (better, worse, -1)):
            np.add.at(hessian, (i, j), sign * curve)
        np.add.at(hessian, (worse, better), -curve)
        step = np.linalg.solve(hessian, gradient)
        scores = scores + step
        if np.abs(step).max(initial=0) < 1e-12:
            break
    return scores
