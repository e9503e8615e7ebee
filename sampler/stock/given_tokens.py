"""Tokens that a pipeline holds at given ones, which it tells its network by timesteps of their own.

A network of tokens is given the timesteps (1 − m)·t. With v the guided velocity, k the given tokens
and m their strength, 0 to 1, the pipeline gives its scheduler (LTX-2 with conditions)

    M = (1 − m)·v + m·(x − k)/sigma
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sampler.stock.forms import Form, Given, Unsolved
from sampler.stock.preconditioning import estimated_x0
from sampler.stock.run_levels import number
from sampler.stock.solving import solve
from sampler.stock.stock_calls import TIME

STRENGTH = 1e-5  # below which a token is not held


@dataclass(frozen=True)
class GivenTokens:
    """Tokens of a step. whole: the step of all; share: 1 − m of each [T]."""

    whole: Given
    share: Tensor

    @property
    def free(self) -> Given:
        """The step of the tokens that are not held."""
        return self._chosen(self.share > 1 - STRENGTH)

    @property
    def moving(self) -> Given:
        """The step of all tokens but those with a strength of 1."""
        return self._chosen(self._moves)

    @property
    def _moves(self) -> Tensor:
        return self.share > STRENGTH

    def put(self, guided: Tensor, form: Form) -> Tensor:
        """M with the rule's result for the moving tokens in the place of the pipeline's."""
        output, moves = self.whole.output, self._moves
        own = _own(form, self.moving)
        change = self._factor(moves, output) * (guided.double() - own)
        found = output.double()
        found[:, moves.to(output.device)] += change
        return found.to(output.dtype)

    def held(self, form: Form) -> Tensor:
        """m·k of the tokens that are held."""
        held = self.share <= 1 - STRENGTH
        step = self._chosen(held)
        made, own = (
            estimated_x0(step.kind, m.double(), step.x.double(), step.sigma)
            for m in (step.output, _own(form, step))
        )
        return made - self._factor(held, made) * own

    def check(self, form: Form, stochastic: bool, name: str) -> None:
        """Raise ValueError for what a rule or a sampler cannot do beside held tokens.

        stochastic: whether the sampler adds noise; name: of the pipeline class.
        """
        if form.token is not None or form.region is not None:
            raise ValueError(
                f"sampler.guide cannot replace the guidance of {name}: it sets norms beside the "
                "tokens that it is given."
            )
        if stochastic and bool((self._moves & (self.share <= 1 - STRENGTH)).any()):
            raise ValueError(
                "A condition with a strength below 1 is denoised from a level of its own, and this "
                "sampler adds the noise of another; use strength 1, or a sampler without noise "
                "such as 'ddim'."
            )

    def keep(self, after: Tensor) -> None:
        """Set tokens with a strength of 1 that the noise of a step has moved back, in place."""
        still = (~self._moves).to(after.device)
        at_rest = self.whole.output[:, still] == 0
        after[:, still] = torch.where(at_rest, self.whole.x[:, still].to(after), after[:, still])

    def _factor(self, chosen: Tensor, like: Tensor) -> Tensor:
        return self.share[chosen].to(like.device)[None, :, None]

    def _chosen(self, chosen: Tensor) -> Given:
        x, *others = (
            value[:, chosen.to(value.device)]
            for value in (self.whole.x, self.whole.output, *self.whole.answers)
        )
        return self.whole._replace(output=others[0], x=x, answers=others[1:])


def given_tokens(
    given: Given, timestep: Any, kwargs: Mapping[str, Any], name: str, before: bool
) -> GivenTokens | None:
    """Tokens of a step of which some are held, None where its formula holds for all of them.

    kwargs: of the last network call; name: of the pipeline class; before: whether the last step
    had such tokens.
    """
    tensors = [v for k, v in kwargs.items() if k in TIME and isinstance(v, Tensor)]
    times = next((v.double().cpu() for v in tensors if v.ndim == 2), None)
    count = given.x.shape[1] if given.x.ndim == 3 else 0
    if times is None or times.shape[1] != count or given.kind != "velocity" or given.sigma <= 0:
        return None
    share = times[0] / number(timestep)
    free = share > 1 - STRENGTH
    alike = all(answer.ndim == 3 and answer.shape[1] == count for answer in given.answers)
    if not alike or free.all() or not free.any() or (times != times[0]).any():
        return None
    if not before:
        try:
            solve(given, name)
        except Unsolved:
            before = True
    return GivenTokens(given, share.clamp(0, 1)) if before else None


def _own(form: Form, given: Given) -> Tensor:
    """The pipeline's own sum of the branches."""
    blocks = form.branches(given)
    return sum((w * b.double() for w, b in zip(form.weights, blocks, strict=True)), 0 * blocks[0])
