"""The guidance scale as an input of the network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from sampler.core.adapter import PipelineAdapter
from sampler.core.binding import GuidanceContext
from sampler.registry import register
from sampler.registry.constraints import Nonnegative
from sampler.types import Cond, GuidanceBase


@register("guidance", "embedded")
@dataclass(frozen=True)
class Embedded(GuidanceBase):
    """Guidance scale as an input of the network: g = c(w). One evaluation per step.

    For networks distilled with the scale as an input, such as latent consistency models; they
    imitate classifier-free guidance of that scale with the empty negative prompt.

    scale: w >= 0, of the range that the network was distilled for; 8.5 is the default of diffusers'
        LCM pipeline. Under other rules the network receives its pipeline's default.
    """

    scale: Nonnegative = 8.5

    reference: ClassVar[str] = (
        "On Distillation of Guided Diffusion Models (Meng et al., 2022), arXiv:2210.03142; Latent "
        "Consistency Models (Luo et al., 2023), arXiv:2310.04378, section 4.3"
    )

    def check(self, adapter: PipelineAdapter) -> None:
        """Raise ValueError, before the run starts, for a network without a scale input."""
        if adapter.default_guidance["name"] != "embedded":
            raise ValueError(
                "embedded: this model does not take the guidance scale as an input; use 'cfg'."
            )

    def bind(self, context: GuidanceContext, cond: Cond) -> tuple[Embedded, Cond]:
        """Add the scale to the conditions; see `sampler.core.binding`.

        Raises ValueError for a network without such an input, and for a negative prompt.
        """
        if any(context.negative):
            raise ValueError(
                "embedded: the network was distilled with the empty negative prompt; leave the "
                "negative prompt out, or wrap it: {'name': 'nag', 'rule': 'embedded'}."
            )
        return self, context.adapter.with_guidance_scale(cond, self.scale)

    def start(self, cond: Cond) -> Any:
        given: Any = cond.cond
        told = cast("Mapping[str, Any]", given if isinstance(given, Mapping) else {})
        if not {"timestep_cond", "guidance"} & told.keys():
            raise ValueError(
                "embedded: the conditions carry no scale; this rule works in `generate`, on models "
                "that take the guidance scale as an input."
            )
        return ()
