"""A distilled student: one evaluation, guidance inside the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from sampler.core.adapter import PipelineAdapter
from sampler.core.binding import GuidanceContext
from sampler.guidance.gates import is_one
from sampler.registry import register
from sampler.types import Branch, Cond, GuidanceBase, Prediction, Span


@register("guidance", "student")
@dataclass(frozen=True)
class Student(GuidanceBase):
    """The student's conditional prediction, unchanged: guidance was baked in when it was trained.

        g = c_student

    One row per image and evaluation, on the model "student" of `sampler.load(student=DIR)`. With
    the sampler "consistency" the run is at the times that the student was trained at.

    scale: 1, the only allowed value. Any other is refused, as is a negative prompt: their effect
        is in the weights, at the scale in the student's manifest.
    """

    scale: float = 1.0

    reference: ClassVar[str] = (
        "One-step Diffusion Models with f-Divergence Distribution Matching (Xu et al., 2025), "
        "arXiv:2502.15681; improved distribution matching: Yin et al. (2024), arXiv:2405.14867"
    )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"cond", "student"})

    def bind(self, context: GuidanceContext, cond: Cond) -> tuple[Student, Cond]:
        """Refuse settings that a student does not support; see `sampler.core.binding`.

        Raises ValueError as `check` does, for a negative prompt, and for a time that the student
        was not trained at.
        """
        baked = self._baked(context.adapter)
        if any(context.negative):
            raise ValueError(
                f"student: a negative prompt has no effect, guidance is inside the weights: {baked}"
                ". Leave the negative prompt out, or wrap it: {'name': 'nag', 'rule': 'student'}."
            )
        manifest = context.adapter.student or {}
        known = manifest["timesteps"]
        times = ", ".join(f"{t:g}" for t in known)
        own = manifest.get("trajectory") == "own"
        use = f"use the sampler 'consistency' with {'' if own else 'at most '}{len(known)} steps."
        run = [level.t for level in context.levels]
        if other := [t for t in run if t not in known]:
            raise ValueError(f"student: it was trained at t = {times}, not at {other[0]:g}; {use}")
        if own and run and (run != list(known) or context.sampler["name"] != "consistency"):
            raise ValueError(
                f"student: it was trained on its own deterministic trajectory, t = {times}; {use}"
            )
        return self, cond

    def check(self, adapter: PipelineAdapter) -> None:
        """Raises ValueError without a student or with a scale, before a run is begun."""
        self._baked(adapter)

    def _baked(self, adapter: PipelineAdapter) -> str:
        """Return the baked-in guidance; ValueError as of `check`."""
        manifest = adapter.student
        if manifest is None:
            raise ValueError(
                "student: no student is loaded; make one with `sampler finetune --trainer "
                "f_distill`, then give its folder: --student DIR, sampler.load(student=DIR)."
            )
        rule = manifest["baked_guidance"]
        baked = rule["name"] + (f" at scale {rule['scale']:g}" if "scale" in rule else "")
        if not is_one(self.scale):
            raise ValueError(
                f"student: scale = {self.scale:g} has no effect, guidance is inside the weights: "
                f"{baked}. Leave scale out."
            )
        return baked

    def start(self, cond: Cond) -> Any:
        if not is_one(self.scale):
            raise ValueError(
                f"student: scale = {self.scale:g} has no effect, guidance is inside the weights."
            )
        return ()

    def plan(self, x: Any, span: Span, cond: Cond, state: Any) -> Mapping[str, Branch]:
        return {"cond": Branch(cond.cond, model="student")}

    def combine(
        self, x: Any, preds: Mapping[str, Prediction], span: Span, state: Any
    ) -> tuple[Prediction, Any]:
        return preds["cond"], state
