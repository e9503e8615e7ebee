"""The tokenizer of the bundled model: every caption word is one token."""

from __future__ import annotations

import string
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

from scripts.bundled.emoji_data import EmojiData

TEXT_LENGTH = 16
"""Positions of the text encoder, begin and end tokens included."""


def learned_merges(words: list[str]) -> list[tuple[str, str]]:
    """Return byte-pair merges, most frequent pair first, until every word is one token.

    Written out because the tokenizers library breaks ties differently from run to run.
    """
    rows = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while counts := Counter(pair for row in rows for pair in pairwise(row)):
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        for row in rows:
            for place in range(len(row) - 1):
                if tuple(row[place : place + 2]) == best:
                    row[place : place + 2] = ["".join(best)]
    return merges


def tokenizer_for(data: EmojiData, source: Path) -> CLIPTokenizer:
    """Return the source's tokenizer if every caption word is one token to it, else a new one.

    The new one knows all printable lower-case ASCII, so that any prompt can be tokenised.
    """
    known = CLIPTokenizer.from_pretrained(source)
    phrases = ["a", "on", "background", *data.concepts, *data.styles, *data.backgrounds]
    words = sorted({word for phrase in phrases for word in phrase.split()})
    if all(len(known.tokenize(word)) == 1 for word in words):
        return known
    merges = learned_merges(words)
    characters = sorted(set(string.printable.lower()) - set(string.whitespace))
    tokens = [*characters, *(c + "</w>" for c in characters), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    pairs: Any = merges
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=TEXT_LENGTH)
