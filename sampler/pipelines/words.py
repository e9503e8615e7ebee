"""Tokens of a word in a prompt."""

from __future__ import annotations

import re
from typing import Any


def tokens_of(tokenizer: Any, text: str, word: str) -> list[int]:
    """Numbers of the tokens that hold a word or phrase, as a text encoder receives them.

    All occurrences as whole words, without regard to case; empty where it is not in the text, or
    beyond the tokenizer's maximum length. Raises ValueError for an empty word, and for a tokenizer
    that does not report the positions of its tokens.
    """
    if not word.strip():
        raise ValueError("A word of the prompt is needed, not an empty text.")
    pattern = rf"(?<!\w){re.escape(word.strip())}(?!\w)"
    spans = [match.span() for match in re.finditer(pattern, text, re.IGNORECASE)]
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} does not report the positions of its tokens; use its fast "
            "version."
        )
    encoded = tokenizer(
        text, truncation=True, max_length=tokenizer.model_max_length, return_offsets_mapping=True
    )
    return [
        number
        for number, (first, stop) in enumerate(encoded["offset_mapping"])
        if any(first < end and begin < stop for begin, end in spans)
    ]
