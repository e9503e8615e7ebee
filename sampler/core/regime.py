"""Inner rules of a rule: their names, and the branches that their outputs are made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sampler.types import Cond, Span


class _AnyConditions(dict[str, Any]):
    """Conditions of every name, for a plan of which the names of the branches are read alone."""

    def __missing__(self, name: str) -> Any:
        def absent(*_: Any) -> None:
            return None

        return absent


UNKNOWN = Cond(extra=_AnyConditions())


def inner_rules(rule: Any) -> Iterator[str]:
    """The names of a rule and of all rules inside it."""
    yield rule.name
    for inner in (getattr(rule, "rule", None), *(getattr(rule, "rules", None) or ())):
        if inner is not None:
            yield from inner_rules(inner)


def regime(rule: Any, x: Any, span: Span, state: Any) -> dict[str, Any]:
    """The branches that a rule's output is made of at a step: bool [B] on the CPU, None for all.

    Where it changes the output jumps. By default they are the planned branches; a rule that
    replaces a branch without a jump, or ignores one that it evaluates, has a method `regime`.
    """
    own = getattr(rule, "regime", None)
    if own is not None:
        return own(x, span, state)
    return {name: branch.rows for name, branch in rule.plan(x, span, UNKNOWN, state).items()}


def differing(before: dict[str, Any], after: dict[str, Any]) -> Any:
    """The samples whose branches differ: bool [B], or True or False for all of them."""
    if before.keys() != after.keys():
        return True
    found: Any = False
    for name, rows in before.items():
        if rows is None and after[name] is None:
            continue
        other = after[name]
        change = ~other if rows is None else ~rows if other is None else rows ^ other
        found = change if found is False else found | change
    if found is False or not found.any():
        return False
    return True if found.all() else found
