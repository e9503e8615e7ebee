"""Prompts as conditions: every distinct text is encoded once, as long as it is kept, and alone.

Alone, because a text encoder rounds differently with other neighbours: so the conditions of a row
do not depend on which batch, worker or resumed run meets its prompt first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from sampler_kernels import leaves, map_tree
from torch import Tensor

from sampler.types import Cond

MAX_BYTES = 64 * 2**20
MAX_TEXTS = 512  # equal texts lie close together in a plan: copies, and the cells of a sweep


class Texts:
    """The conditions of prompts, the latest of them kept on their device."""

    def __init__(self, adapter: Any) -> None:
        self._adapter = adapter
        self._known: OrderedDict[Any, Cond] = OrderedDict()
        self._bytes = 0

    def encode(
        self, prompts: Sequence[str], negative: Sequence[str], guided: bool, size: tuple[int, int]
    ) -> Cond:
        """The conditions of B rows, in one tree."""
        rows = [self._one(p, n, guided, size) for p, n in zip(prompts, negative, strict=True)]
        if len(rows) == 1:
            return rows[0]
        try:
            return Cond(
                map_tree(_join, *(row.cond for row in rows)),
                map_tree(_join, *(row.uncond for row in rows)),
            )
        except (RuntimeError, ValueError):
            # Texts of different lengths, in a family that pads to the longest of the batch.
            return self._adapter.encode(prompts, negative, guided, size)

    def warning(self, prompt: str) -> str | None:
        """What is said of a prompt that is longer than the encoder reads; None where it fits."""
        tokenizer = getattr(self._adapter.pipe, "tokenizer", None)
        limit = getattr(tokenizer, "model_max_length", None)
        if tokenizer is None or not isinstance(limit, int) or limit > 10**6:
            return None
        if len(prompt) <= (limit - 2) // 2:
            return None  # a token has at most a few bytes, never less than half a character here
        count = len(tokenizer.tokenize(prompt)) + tokenizer.num_special_tokens_to_add()
        return f"{count - limit} tokens of the prompt were dropped" if count > limit else None

    def _one(self, prompt: str, negative: str, guided: bool, size: tuple[int, int]) -> Cond:
        key = (prompt, negative if guided else None, guided, size)
        if key not in self._known:
            with torch.no_grad():
                cond = self._adapter.encode([prompt], [negative], guided, size)
            self._known[key] = cond
            self._bytes += _bytes(cond)
            while len(self._known) > MAX_TEXTS or (
                self._bytes > MAX_BYTES and len(self._known) > 1
            ):
                _, old = self._known.popitem(last=False)
                self._bytes -= _bytes(old)
        self._known.move_to_end(key)
        return self._known[key]


def _join(*parts: Any) -> Any:
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    if any(part != parts[0] for part in parts):
        raise ValueError("conditions differ")
    return parts[0]


def _bytes(cond: Cond) -> int:
    return sum(leaf.nbytes for leaf in leaves((cond.cond, cond.uncond)) if isinstance(leaf, Tensor))
