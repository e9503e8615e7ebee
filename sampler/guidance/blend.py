"""Blending with a reference: the model inside a mask, a given image outside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from sampler.core.adapter import PipelineAdapter
from sampler.core.binding import GuidanceContext
from sampler.guidance.blend_parts import WORD, Parts, check_word, checked, read, sized
from sampler.guidance.gates import Interval, Window, active
from sampler.guidance.spaces import in_space
from sampler.registry import build, register
from sampler.types import Branch, Cond, GuidanceBase, Lin, Prediction, Span, Watch

if TYPE_CHECKING:
    from torch import Tensor


@register("guidance", "blend")
@dataclass(frozen=True)
class Blend(GuidanceBase):
    """Blend: the inner rule's prediction inside a mask, a given image outside it.

        x0' = M·x0 + (1 − M)·x0_image

    at every step of the window: samplers whose last move has no noise end at the image where M = 0,
    and follow the inner rule bit for bit where M = 1. No evaluation beyond the inner rule's.

    image: an image file; or a tensor [B or 1, ...], latents or images (see space).
    mask: M in 0..1: a file, white (> 0.5) is 1; a tensor [h, w] or [B or 1, 1 or C, h, w]; or
        {word: apple, map: attention, threshold: 0}: where the sample attended to a word of its
        prompt at the step before, above mean + threshold·std of the map, and 1 at the first step.
        map: grad weighs the attention with the gradient of ½‖c − u‖² (Grad-SAM): one backward pass
        per step, and an inner rule with an unconditional branch.
    rule: the rule inside.
    space: of tensors: "model", as the network takes them; "image", in [0, 1]: the image is encoded,
        a mask averaged over the pixels of each latent.
    interval, window: as for `cfg`; outside, the inner rule runs alone.

    Deviations: blends x0 at every step, where the paper blends the noised samples; the mask is not
    dilated.
    """

    image: Any
    mask: Any
    rule: Any = field(default="none", metadata={"kind": "guidance"})
    space: Literal["model", "image"] = "model"
    interval: Interval | None = None
    window: Window | None = None

    reference: ClassVar[str] = (
        "Blended Latent Diffusion (Avrahami et al., 2023), arXiv:2206.02779, algorithm 1"
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "rule", build("guidance", self.rule))
        if isinstance(self.mask, Mapping):
            check_word(cast("Mapping[str, Any]", self.mask))

    @property
    def needs(self) -> frozenset[str]:
        own = {"cond", "uncond"} if self._word.get("map") == "grad" else {"cond"}
        return self.rule.needs | frozenset(own)

    @property
    def graph_refusal(self) -> str:
        """Reason that runs cannot be CUDA graphs."""
        recorded = "the rule 'blend' records the network's attention" if self._word else ""
        return recorded or self.rule.graph_refusal

    @property
    def sets_direction(self) -> bool:
        """Return True if the inner rule keeps a direction apart from its target."""
        return self.rule.sets_direction

    def check(self, adapter: PipelineAdapter) -> None:
        self.rule.check(adapter)

    def bind(self, context: GuidanceContext, cond: Cond) -> tuple[Blend, Cond]:
        """The rule inside bound to the run, the image encoded, the word's tokens found.

        Raises ValueError for an image or mask of another size than the run, a word that is not in
        a prompt, and for videos.
        """
        adapter = context.adapter
        if adapter.frames is not None:
            raise ValueError("blend: it blends images, and this pipeline generates videos.")
        rule, cond = self.rule.bind(context, cond)
        shape = adapter.latent_shape(*context.size)
        image: Any = self.image
        if self._is_image(image):
            image = adapter.latents_of(sized(read(image), context.size, "image"))
        columns: list[list[int]] = []
        mask = None
        if self._word:
            columns = adapter.word_tokens(context.prompts, self._word["word"])
        else:
            mask = self._latent_mask(shape, context.size).to(adapter.device)
        bound = replace(self, rule=rule)
        parts = Parts(image.to(adapter.device), mask, columns)
        object.__setattr__(bound, "_bound", checked(parts, shape, len(context.prompts)))
        return bound, cond

    def start(self, cond: Cond) -> Any:
        if self._parts is None and (self._is_image(self.image) or self._word):
            raise ValueError(
                "blend: files, images and words need generate(); give run() tensors of latents."
            )
        return self.rule.start(cond), None

    def plan(self, x: Any, span: Span, cond: Cond, state: Any) -> Mapping[str, Branch]:
        branches = dict(self.rule.plan(x, span, cond, state[0]))
        if not self._word or not active(self.interval, self.window, span):
            return branches
        graded = self._word["map"] == "grad"
        asked = ("cond", "uncond") if graded else ("cond",)
        if all(name in branches and branches[name].rows is None for name in asked):
            from sampler.core.word_maps import half_squared_gap

            watch = Watch(half_squared_gap if graded else None)
            branches["cond"] = replace(branches["cond"], watch=watch)
        return branches

    def combine(
        self, x: Any, preds: Mapping[str, Prediction], span: Span, state: Any
    ) -> tuple[Prediction, Any]:
        inner, known = state
        pred, inner = self.rule.combine(x, preds, span, inner)
        seen = preds["cond"].seen if "cond" in preds else None
        mask, after = self._mask(known, x), known
        if seen is not None:
            after = self._map(seen, x)
        if mask is None or not active(self.interval, self.window, span):
            return pred, (inner, after)
        image, _, _ = self._ready(x)
        given = Prediction.from_x0(x, image.to(x).expand(x.shape), span.now)
        out = _mix(mask, pred.out, in_space(given, pred.kind))
        blended = pred.like(out)
        if pred.direction is not None:
            blended = replace(blended, direction=_mix(mask, pred.direction, given.eps))
        return blended, (inner, after)

    def _mask(self, known: Any, x: Tensor) -> Tensor | None:
        """M at this step [B or 1, ...]; None where the word's map is not there yet."""
        if not self._word:
            mask = self._ready(x).mask
            return None if mask is None else mask.to(x)
        if known is None:
            return None
        mean, std = known.mean((-2, -1), keepdim=True), known.std((-2, -1), keepdim=True)
        return (known > mean + self._word["threshold"] * std).to(x)

    def _map(self, seen: Any, x: Tensor) -> Tensor:
        """Map of the word [B, 1, h, w]."""
        from sampler.core.word_maps import word_maps

        words = [[columns] for columns in self._ready(x).columns]
        return word_maps(seen, words, (x.shape[-2], x.shape[-1])).to(x)

    def _ready(self, x: Tensor) -> Parts:
        if self._parts is not None:
            return self._parts
        mask = self.mask if self.mask.ndim != 2 else self.mask[None, None]
        return checked(Parts(self.image, mask), tuple(x.shape[1:]), x.shape[0])

    def _is_image(self, value: Any) -> bool:
        return isinstance(value, (str, Path)) or self.space == "image"

    def _latent_mask(self, shape: Sequence[int], size: tuple[int, int]) -> Tensor:
        """The mask [B or 1, 1 or C, h, w] over latents."""
        import torch.nn.functional as F

        from sampler.core.images import read_mask

        mask: Any = self.mask
        file = isinstance(mask, (str, Path))
        if file:
            mask = read_mask(mask)
        mask = mask[None, None] if mask.ndim == 2 else mask
        if file or self.space == "image":
            mask = F.adaptive_avg_pool2d(sized(mask.float(), size, "mask"), (shape[-2], shape[-1]))
        return mask

    @property
    def _word(self) -> dict[str, Any]:
        """The settings of a mask by a word; empty for other masks."""
        mask: Any = self.mask
        return {**WORD, **mask} if isinstance(mask, Mapping) else {}

    @property
    def _parts(self) -> Parts | None:
        return self.__dict__.get("_bound")


def _mix(mask: Tensor, inside: Lin, outside: Lin) -> Lin:
    return Lin.of(mask * inside.tensor() + (1 - mask) * outside.tensor())
