"""A distilled student: one evaluation, guidance inside the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from sampler.core.adapter import PipelineAdapter
from sampler.core.binding import GuidanceContext
from sampler.registry import register
from sampler.types import Branch, Cond, GuidanceBase, Span


@register("guidance", "student")
@dataclass(frozen=True)
class Student(GuidanceBase):
    """Conditional prediction of a distilled student, whose weights contain the guidance.

        g = c_student

    One evaluation per step, of the model "student" of `sampler.load(student=DIR)`. With the sampler
    "consistency" the run uses the times that the student was trained at. Negative prompts and other
    scales are refused: their effect is in the weights, at the scale in the student's manifest.
    """

    reference: ClassVar[str] = (
        "One-step Diffusion Models with f-Divergence Distribution Matching (Xu et al., 2025), "
        "arXiv:2502.15681; improved distribution matching: Yin et al. (2024), arXiv:2405.14867"
    )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"cond", "student"})

    def check(self, adapter: PipelineAdapter) -> None:
        if adapter.student is None:
            raise ValueError(
                "student: no student is loaded; make one with `sampler finetune --trainer "
                "f_distill`, then give its folder: --student DIR, sampler.load(student=DIR)."
            )

    def bind(self, context: GuidanceContext, cond: Cond) -> tuple[Student, Cond]:
        """Raises ValueError without a student, for a negative prompt, and for an untrained time."""
        self.check(context.adapter)
        manifest = context.adapter.student or {}
        if any(context.negative):
            rule = manifest["baked_guidance"]
            scale = f" at scale {rule['scale']:g}" if "scale" in rule else ""
            raise ValueError(
                "student: a negative prompt has no effect, guidance is inside the weights: "
                f"{rule['name']}{scale}. Leave the negative prompt out."
            )
        known = manifest["timesteps"]
        times = ", ".join(f"{t:g}" for t in known)
        if other := [level.t for level in context.levels if level.t not in known]:
            raise ValueError(
                f"student: it was trained at t = {times}, not at {other[0]:g}; use the sampler "
                f"'consistency' with at most {len(known)} steps."
            )
        return self, cond

    def plan(self, x: Any, span: Span, cond: Cond, state: Any) -> Mapping[str, Branch]:
        return {"cond": Branch(cond.cond, model="student")}
