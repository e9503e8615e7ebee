"""The guidance formula of a stock pipeline's run: solved at its first step, checked at all."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from sampler.stock.forms import Form, Given, Unsolved, tolerance
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
        self._rest: Tensor | None = None
        self._warned = False

    def check_run(self) -> None:
        """Raise ValueError for what a run would fail on, before its first network call."""
        refuse_settings(self.pipe)
        if guidance_is_off(self.pipe) and self._wants_uncond():
            raise ValueError(guidance_off(self.pipe, self.rule.name))
        if self.against and getattr(self.pipe, "do_classifier_free_guidance", False):
            raise ValueError(GUIDANCE_ON)

    def begin(self) -> None:
        """Begin a run."""
        self.form, self._rest = None, None

    def at(self, index: int, given: Given, same: bool, last: bool) -> tuple[Form, list[Tensor]]:
        """The formula of the last step where it still holds at step `index`, else the solved one;
        and its branches.

        same: the calls are those of the last step; last: whether the run ends with this step. The
        check holds for rows that were not evaluated too: the pipeline computes with what it was
        handed. Raises ValueError for a formula that cannot be replaced.
        """
        form = self.form if same else None
        name = type(self.pipe).__name__
        bar = tolerance(given.output, *given.answers)
        branches = [] if form is None else form.branches(given)
        if form is None or not form.settled or not form.residual(given, branches) <= bar:
            try:
                found = solve(given, name)
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
            self.form = form = found
            branches = form.branches(given)
        if form.given_rest:
            self.check_rest(form.x0_of_rest(given), given, bar, last)
        return form, branches

    def check_rest(self, x0: Tensor, given: Given, bar: float, last: bool) -> None:
        """Raise ValueError where the part that a formula leaves out is not one fixed x0."""
        known, self._rest = self._rest, x0
        if known is not None and known.shape == x0.shape:
            rounding = 1e-7 * given.sigma * x0.numel() ** 0.5
            if (x0 - known).norm() <= 10 * bar * known.norm() + rounding:
                return
        elif not last:
            return
        raise ValueError(
            f"sampler.guide cannot replace the guidance of {type(self.pipe).__name__}: its formula "
            "is a sum of the branches in a part of the sample only, and the rest is not known to "
            "be given."
        )

    def _look_at(self, form: Form, index: int) -> None:
        """Raise ValueError for a formula that the rule does not go with; warn of lost norms."""
        if self.against and "uncond" in form.roles:
            raise ValueError(GUIDANCE_ON)
        if "uncond" not in form.roles and index == 0 and self._wants_uncond():
            raise ValueError(guidance_off(self.pipe, self.rule.name))
        if form.match_norm is not None and not getattr(self.rule, "match_norm", None):
            if not self._warned:
                log.warning(
                    "%s sets norms after guiding; the rule's result replaces that, unless it has "
                    "match_norm = %s.",
                    type(self.pipe).__name__,
                    form.match_norm,
                )
            self._warned = True

    def _wants_uncond(self) -> bool:
        return bool(self.rule.needs - {"cond"})
