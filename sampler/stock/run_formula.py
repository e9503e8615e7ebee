"""The guidance formula of a stock pipeline's run: solved at its first step, checked at all."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sampler.stock.forms import Form, Unsolved, tolerance
from sampler.stock.negative_calls import GUIDANCE_ON
from sampler.stock.solving import solve
from sampler.stock.stock_calls import guidance_is_off, guidance_off, refuse_settings
from sampler.types import Guidance

log = logging.getLogger("sampler")


class RunFormula:
    """Formula of the steps of a run, and what a rule has against it.

    against: the rule's negative prompt is in the attention, so the pipeline's guidance must be off.
    form: of the last step, None before the first.
    """

    def __init__(self, pipe: Any, rule: Guidance, against: bool) -> None:
        self.pipe, self.rule, self.against = pipe, rule, against
        self.form: Form | None = None
        self._warned = False

    def check_run(self) -> None:
        """Raise ValueError for what a run would fail on, before its first network call."""
        refuse_settings(self.pipe)
        if guidance_is_off(self.pipe) and self._wants_uncond():
            raise ValueError(guidance_off(self.pipe, self.rule.name))
        if self.against and getattr(self.pipe, "do_classifier_free_guidance", False):
            raise ValueError(GUIDANCE_ON)

    def at(
        self, index: int, output: Tensor, x: Tensor, values: Sequence[Tensor], same: bool
    ) -> Form:
        """The formula of the last step where it still holds at step `index`, else the solved one.

        values: the answers; same: the calls are those of the last step. The check holds for rows
        that were not evaluated too: the pipeline computes with what it was handed. Raises
        ValueError for a formula that cannot be replaced.
        """
        form = self.form if same else None
        if form is not None and form.settled:
            error = form.residual(form.blocks(values, output), output)
            if error <= tolerance(output, *values):
                return form
        name = type(self.pipe).__name__
        try:
            found = solve(output, x, values, name)
        except Unsolved as error:
            raise ValueError(
                f"sampler.guide cannot replace the guidance of {name}: {error}."
            ) from None
        known = form if form is not None and form.settled and found.settled else None
        if known is not None and found.roles != known.roles:
            raise ValueError(
                f"{name} guides by another formula in step {index} than before, with the same "
                "calls; sampler.guide cannot serve it."
            )
        self._look_at(found, index)
        self.form = found
        return found

    def _look_at(self, form: Form, index: int) -> None:
        """Raise ValueError for a formula that the rule does not go with; warn of lost norms."""
        if self.against and "uncond" in form.roles:
            raise ValueError(GUIDANCE_ON)
        if "uncond" not in form.roles and index == 0 and self._wants_uncond():
            raise ValueError(guidance_off(self.pipe, self.rule.name))
        if form.token is not None and not getattr(self.rule, "match_norm", None):
            if not self._warned:
                log.warning(
                    "%s sets the norm of every token after guiding; the rule's result replaces "
                    "that, unless it has match_norm = [-1].",
                    type(self.pipe).__name__,
                )
            self._warned = True

    def _wants_uncond(self) -> bool:
        return bool(self.rule.needs - {"cond"})
