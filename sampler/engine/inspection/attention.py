"""Word maps: attention of an image to the words of its prompt during generation."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sampler.core.adapter import PipelineAdapter
from sampler.core.batch import DEFAULT_BATCH, Sample, expand
from sampler.core.binding import SamplerContext, bind_sampler
from sampler.core.loop import Loop
from sampler.core.trajectory import begin
from sampler.core.word_maps import half_squared_gap, word_maps
from sampler.engine.inspection.features import check_adapter
from sampler.registry import spec_of
from sampler.registry.constraints import as_int
from sampler.types import Branch, Cond, GuidanceBase, Prediction, Span, Watch

Score = Callable[[Mapping[str, Prediction]], Tensor]
_WORD = re.compile(r"[^\W_](?:[\w'’-]*[^\W_])?")


@dataclass(frozen=True)
class Attention:
    """Images and the maps of their words.

    images [B, 3, H, W] in [0, 1]; maps: for each image {word: [h, w]} over the latents, 1 on
    average, where larger is more attention; seeds; nfe: network evaluations, counted.
    """

    images: Tensor
    maps: list[dict[str, Tensor]]
    seeds: list[int]
    nfe: list[int]


def words_of(prompt: str) -> list[str]:
    """The words of a prompt, each once, in their order."""
    return list(dict.fromkeys(_WORD.findall(prompt)))


def region(values: Tensor, threshold: float = 0.0) -> Tensor:
    """The part of a map above its mean + threshold·(standard deviation), bool [..., h, w]."""
    mean = values.mean((-2, -1), keepdim=True)
    return values > mean + threshold * values.std((-2, -1), keepdim=True)


def table_of(found: Attention, prompts: Sequence[str]) -> list[dict[str, Any]]:
    """A row per word and image: the area of its region, its share of the map, and the peak.

    prompts: one per image.
    """
    table: list[dict[str, Any]] = []
    for i, maps in enumerate(found.maps):
        for name, values in maps.items():
            inside = region(values)
            share = float(values[inside].sum() / values.sum().clamp(min=1e-12))
            table.append({
                "image": i, "seed": found.seeds[i], "prompt": prompts[i], "word": name,
                "area": round(float(inside.float().mean()), 4), "share": round(share, 4),
                "peak": round(float(values.max()), 3),
            })  # fmt: skip
    return table


@dataclass(frozen=True)
class Watched(GuidanceBase):
    """Any rule, with the maps of words summed over the steps that evaluate every image.

    words: the columns of each image's words; size: of the latents. score: "" for the attention
    alone, "guidance", or a function for `Watch`.
    """

    rule: Any
    words: Any
    size: tuple[int, int]
    score: Any = ""
    name = "watched"

    @property
    def needs(self) -> frozenset[str]:
        return self.rule.needs

    @property
    def sets_direction(self) -> bool:
        return self.rule.sets_direction

    def bind(self, context: Any, cond: Cond) -> tuple[Watched, Cond]:
        rule, cond = self.rule.bind(context, cond)
        return replace(self, rule=rule), cond

    def start(self, cond: Cond) -> Any:
        return self.rule.start(cond), None

    def plan(self, x: Any, span: Span, cond: Cond, state: Any) -> Mapping[str, Branch]:
        branches = dict(self.rule.plan(x, span, cond, state[0]))
        asked = ("cond", "uncond") if self.score == "guidance" else ("cond",)
        if all(name in branches and branches[name].rows is None for name in asked):
            score = half_squared_gap if self.score == "guidance" else self.score or None
            branches["cond"] = replace(branches["cond"], watch=Watch(score))
        return branches

    def combine(
        self, x: Any, preds: Mapping[str, Prediction], span: Span, state: Any
    ) -> tuple[Prediction, Any]:
        inner, total = state
        pred, inner = self.rule.combine(x, preds, span, inner)
        seen = preds["cond"].seen if "cond" in preds else None
        if seen is not None:
            found = word_maps(seen, self.words, self.size)
            total = found if total is None else total + found
        return pred, (inner, total)


@torch.no_grad()
def attention(
    engine: Loop,
    prompts: str | Sequence[str],
    words: Any = None,
    *,
    score: Any = None,
    negative: str | Sequence[str] | None = None,
    seeds: int | Sequence[int] | None = None,
    n: int = 1,
    steps: int = 20,
    height: int | None = None,
    width: int | None = None,
    sampler: Any = None,
    guidance: Any = None,
    batch_size: int | None = None,
) -> Attention:
    """Generate images with the maps of their words; see `Engine.attention`."""
    adapter = check_adapter(engine, "attention")
    jobs = expand(prompts, negative, seeds, n)
    wanted = _wanted(jobs, words, n)
    size = adapter.size(height, width)
    method, rule = engine.build_sampler(sampler), engine.build_guidance(guidance)
    levels = adapter.grid(as_int(steps, "steps"), size)
    method = bind_sampler(method, SamplerContext(adapter, levels, spec_of(rule), size))
    cut = DEFAULT_BATCH if batch_size is None else as_int(batch_size, "batch_size")
    if cut < 1:
        raise ValueError(f"batch_size = {batch_size} must be at least 1.")
    latent = tuple(adapter.latent_shape(*size)[-2:])
    images: list[Tensor] = []
    maps: list[dict[str, Tensor]] = []
    nfe: list[int] = []
    for first in range(0, len(jobs), cut):
        part, own = jobs[first : first + cut], wanted[first : first + cut]
        texts = [job.prompt for job in part]
        columns = [
            [adapter.word_tokens([text], word)[0] for word in listed]
            for text, listed in zip(texts, own, strict=True)
        ]
        scored = _scored(adapter, score, texts)
        watched: Any = Watched(rule, columns, (latent[0], latent[1]), scored)
        negatives, own_seeds = [job.negative for job in part], [job.seed for job in part]
        run = begin(engine, texts, negatives, own_seeds, steps, size, method, watched)
        with adapter.exclusive():
            x, last = engine.run_to_end(*run)
            images.append(adapter.decode(x).cpu())
        maps += _named(last.guidance[1], own, rule.name)
        nfe += last.nfe
    return Attention(torch.cat(images), maps, [job.seed for job in jobs], nfe)


def _named(total: Any, words: Sequence[Sequence[str]], rule: str) -> list[dict[str, Tensor]]:
    """The maps of each image by word, 1 on average where they are not 0."""
    if total is None:
        raise ValueError(
            f"attention: the rule {rule!r} evaluates no step of all images with the branches that "
            "the score needs; use guidance 'cfg'."
        )
    mean = total.mean((-2, -1), keepdim=True)
    total = (total / torch.where(mean > 0, mean, torch.ones_like(mean))).cpu()
    return [dict(zip(own, row, strict=False)) for own, row in zip(words, total, strict=True)]


def _wanted(jobs: Sequence[Sample], words: Any, n: int) -> list[list[str]]:
    """The words of each image: all of its prompt, the same for all, or a list per prompt."""
    if words is None:
        return [words_of(job.prompt) for job in jobs]
    if isinstance(words, str):
        return [[words] for _ in jobs]
    listed = [list(word) if not isinstance(word, str) else word for word in words]
    if all(isinstance(word, str) for word in listed):
        return [list(map(str, listed)) for _ in jobs]
    if len(listed) * n != len(jobs):
        raise ValueError(
            f"words: {len(listed)} lists for {len(jobs) // n} prompts; give one list per prompt, "
            "or words for all of them."
        )
    return [list(listed[i // n]) for i in range(len(jobs))]


def _scored(adapter: PipelineAdapter, score: Any, prompts: Sequence[str]) -> Any:
    """The score of a `Watched`: "", "guidance", or a function from a reward of the decoded x0."""
    if score in (None, "", "attention"):
        return ""
    if score == "guidance":
        return score
    from sampler.registry import build

    reward = score if callable(score) and not isinstance(score, str) else build("reward", score)
    if not getattr(reward, "differentiable", True):
        raise ValueError("attention: score needs a differentiable reward; this one is not.")

    def of(preds: Mapping[str, Prediction]) -> Any:
        return reward(adapter.decode(preds["cond"].x0.tensor()), prompts)

    return of
