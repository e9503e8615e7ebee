"""Best-of-N generation: cheap drafts, scored by a reward, and full runs of the best."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sampler.core.batch import Result, Sample, expand
from sampler.core.image_files import as_rgb
from sampler.core.images import as_images
from sampler.registry.constraints import as_int
from sampler.rewards.base import Prompt, RewardBase
from sampler.rewards.python import reward_from
from sampler.rewards.scoring import score

META = "best_of"
DRAFTS = "drafts"  # run folder of the drafts, inside of that of the images
KEYS = ("steps", "size", "sampler", "guidance")
FEWEST = 4  # steps of a draft: three keep a third of the gain (docs/howto/best_of.md)


@dataclass(frozen=True)
class DraftChoice:
    """Candidates of one prompt, in the order of generation, and those that were chosen.

    seeds, scores: of the drafts; nfe: network evaluations of all drafts; chosen: positions of the
    best ones, best first, ties by seed; final_scores, final_nfe: of the full runs, in that order.
    """

    prompt: str
    seeds: tuple[int, ...]
    scores: tuple[float, ...]
    nfe: int
    chosen: tuple[int, ...]
    final_scores: tuple[float, ...] = ()
    final_nfe: int = 0

    @property
    def order_held(self) -> bool:
        """Compare full runs with the order of their drafts; True where it held."""
        return all(a >= b for a, b in zip(self.final_scores, self.final_scores[1:], strict=False))

    def meta(self) -> dict[str, Any]:
        """Return the selection's entry in an image's record."""
        return {"seeds": self.seeds, "scores": self.scores, "draft_nfe": self.nfe}

    def plain(self) -> dict[str, Any]:
        """Return plain data, with the outcome of the full runs."""
        return {
            "prompt": self.prompt,
            **self.meta(),
            "chosen": [self.seeds[k] for k in self.chosen],
            "final_scores": self.final_scores,
            "final_nfe": self.final_nfe,
            "order_held": self.order_held if self.final_scores else None,
        }


def choose(
    prompt: str, seeds: Sequence[int], scores: Sequence[float], nfe: Sequence[int], n: int
) -> DraftChoice:
    """Choose the n best of the drafts of one prompt; the smaller seed wins a tie."""
    order = sorted(range(len(seeds)), key=lambda k: (-scores[k], seeds[k]))
    return DraftChoice(prompt, tuple(seeds), tuple(scores), sum(nfe), tuple(order[:n]))


def scores_of(reward: RewardBase, images: Any, prompts: Sequence[str]) -> list[float]:
    """Score images as their files hold them, with 8 bits a value.

    images: a tensor [B, 3, H, W] in [0, 1], or PIL images. Raises NonFiniteScore.
    """
    if not isinstance(images, Tensor):
        images = torch.cat([as_images(as_rgb(image, on_white=True)) for image in images])
    with torch.no_grad():
        return score(reward, (images.float() * 255).round() / 255, prompts).tolist()


def check_best_of(reward: Any, drafts: Any) -> None:
    """Raise ValueError for arguments that have no effect without best_of."""
    if reward is not None or drafts is not None:
        raise ValueError("reward and drafts choose among candidates: give best_of as well.")


def generate_best(
    generate: Callable[..., Result],
    prompts: Any,
    negative: Any,
    seeds: Any,
    n: int,
    best_of: int,
    reward: Any,
    drafts: Mapping[str, Any] | None,
    classes: bool,
    settings: Mapping[str, Any],
) -> Result:
    """Generate n of best_of images per prompt; see `Engine.generate`.

    generate: the engine's; settings: its other arguments. Raises ValueError for arguments that do
    not fit, before anything is generated.
    """
    if reward is None:
        raise ValueError("best_of needs a reward that chooses among the drafts.")
    if not 1 <= as_int(n, "n") <= as_int(best_of, "best_of"):
        raise ValueError(f"n = {n} must lie in 1..best_of = {best_of}.")
    if settings.get("inputs") is not None:
        raise ValueError("best_of has no inputs=; generate the candidates and score them.")
    judge = reward_from(reward)
    if judge.batched:
        raise ValueError(
            f"best_of needs a reward of single images, and {judge.name!r} judges whole batches."
        )
    own = draft_settings(drafts, settings)
    judge.check()
    samples = expand(prompts, negative, seeds, best_of, classes)
    out = settings.get("out")
    draft = _run(generate, samples, {**own, "out": out and f"{out}/{DRAFTS}"}, None)
    choices = []
    for first in range(0, len(samples), best_of):
        part = slice(first, first + best_of)
        texts = [sample.prompt for sample in samples[part]]
        found = scores_of(judge, draft.images[part], texts)
        choices.append(choose(str(texts[0]), draft.seeds[part], found, draft.nfe[part], n))
    kept = [
        (samples[best_of * k + row], {"rank": rank, **choice.meta(), "reward": judge.name})
        for k, choice in enumerate(choices)
        for rank, row in enumerate(choice.chosen)
    ]
    result = _run(generate, [sample for sample, _ in kept], settings, [meta for _, meta in kept])
    return replace(result, best_of=_finished(choices, result, judge, n))


def _finished(choices: list[DraftChoice], result: Result, reward: RewardBase, n: int) -> list[Any]:
    """Records of all choices, with the scores of the full runs where they are images."""
    records = []
    for k, choice in enumerate(choices):
        part = slice(n * k, n * (k + 1))
        images = None if result.images is None else result.images[part]
        found = () if images is None else scores_of(reward, images, [choice.prompt] * n)
        done = replace(choice, final_scores=tuple(found), final_nfe=sum(result.nfe[part]))
        records.append(done.plain())
    return records


def draft_settings(drafts: Mapping[str, Any] | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the drafts over those of the images; by default a third of the steps, from 4.

    Raises ValueError for unknown keys.
    """
    given = dict(drafts or {})
    if wrong := [key for key in given if key not in KEYS]:
        raise ValueError(f"drafts: {wrong[0]!r:.40} is not one of {', '.join(KEYS)}.")
    steps = as_int(given.pop("steps", default_steps(settings["steps"])), "drafts: steps")
    size = given.pop("size", None)
    if size is not None:
        height, width = (size, size) if np.isscalar(size) else size
        given |= {"height": height, "width": width}
    listed = isinstance(settings.get("grid"), (list, tuple))  # a list has its own number of steps
    grid = {"grid": None} if listed else {}
    return {**settings, "output": "pil", "progress": None, "steps": steps, **grid, **given}


def default_steps(steps: int) -> int:
    """Number of steps of a draft of a run of `steps`."""
    return min(steps, max(FEWEST, -(-steps // 3)))


def _run(
    generate: Callable[..., Result],
    samples: Sequence[Sample],
    settings: Mapping[str, Any],
    meta: Sequence[Mapping[str, Any]] | None,
) -> Result:
    """One call of `generate` with a prompt, a negative prompt and a seed per image."""
    texts: list[Any] = [sample.prompt for sample in samples]
    if meta is not None and settings.get("out") is not None:
        texts = [Prompt(text, {META: own}) for text, own in zip(texts, meta, strict=True)]
    negative = [sample.negative for sample in samples]
    return generate(
        texts,
        negative=negative if any(negative) else None,
        seeds=[sample.seed for sample in samples],
        **settings,
    )
