"""Rules that hold other rules: what they pass on to them."""

from __future__ import annotations

from typing import Any

from sampler.types import Cond, Guidance


def bound(rule: Guidance, request: Any, cond: Cond) -> tuple[Guidance, Cond]:
    """The rule and the conditions to run with; unchanged for a rule without `bind`.

    request: what is to be run, see `sampler.core.binding.Request`.
    """
    bind = getattr(rule, "bind", None)
    return (rule, cond) if bind is None else bind(request, cond)
