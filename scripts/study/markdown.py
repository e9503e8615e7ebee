"""Tables of Markdown from the rows of a study's CSV file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

Row = dict[str, str]
Table = Callable[[list[Row]], list[str]]


def grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    body = [f"| {' | '.join(row)} |" for row in rows]
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *body]
