"""Prompt weights in the syntax of web UIs: `(x:1.2)`, `(x)` for 1.1 and `[x]` for 1 / 1.1.

Brackets nest and multiply; `\\(`, `\\)`, `\\[` and `\\]` are plain text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

UP = 1.1
UNREAD = "weights such as (x:1.2) were read as text; prompt_weights reads them"
_NUMBER = r":\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)"
_TOKEN = re.compile(rf"\\[()\[\]\\]|[(\[\])]|{_NUMBER}|[^\\()\[\]:]+|[\\:]")
_EXPLICIT = re.compile(rf"(?<!\\)\([^()]*{_NUMBER}")


def has_weights(texts: Sequence[str]) -> bool:
    """Check for explicit weights, `(x:1.2)`; brackets alone are common in plain text."""
    return any(":" in text and _EXPLICIT.search(text) for text in texts)


def weighted(text: str) -> list[tuple[str, float]]:
    """Split a prompt into its pieces of text and their weights, in order.

    A bracket that is never closed reaches to the end; one that was never opened is plain text.
    """
    pieces: list[tuple[str, float]] = []
    opened: list[tuple[str, int]] = []  # bracket, number of pieces before it

    def multiply(first: int, factor: float) -> None:
        pieces[first:] = [(piece, weight * factor) for piece, weight in pieces[first:]]

    for token in _TOKEN.finditer(text):
        part, number = token[0], token[1]
        if part in ("(", "["):
            opened.append((part, len(pieces)))
        elif number is not None and opened and opened[-1][0] == "(":
            multiply(opened.pop()[1], float(number))
        elif part == ")" and opened and opened[-1][0] == "(":
            multiply(opened.pop()[1], UP)
        elif part == "]" and opened and opened[-1][0] == "[":
            multiply(opened.pop()[1], 1 / UP)
        else:
            pieces.append((part[1:] if part[0] == "\\" and part[1:] else part, 1.0))
    for bracket, first in reversed(opened):
        multiply(first, UP if bracket == "(" else 1 / UP)
    return _merged(pieces) or [("", 1.0)]


def _merged(pieces: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Join neighbours of the same weight."""
    merged: list[tuple[str, float]] = []
    for piece, weight in pieces:
        if merged and merged[-1][1] == weight:
            merged[-1] = merged[-1][0] + piece, weight
        else:
            merged.append((piece, weight))
    return merged
