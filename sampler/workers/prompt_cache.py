"""Prompts as conditions: every distinct text is encoded once, as long as it is kept, and alone.

Alone, because a text encoder rounds differently with other neighbours: so the conditions of a row
do not depend on which batch, worker or resumed run meets its prompt first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from sampler_kernels import leaves, map_tree
from torch import Tensor

from sampler.core.adapter import PipelineAdapter
from sampler.core.denoisers import cat_rows
from sampler.core.locks import exclusive
from sampler.types import Cond
from sampler.workers.recovery import free_memory

MAX_BYTES = 64 * 2**20
MAX_TEXTS = 1024  # equal texts lie close together in a plan: copies, and the cells of a sweep

Size = tuple[int, int]


class PromptCache:
    """The conditions of prompts and of negative prompts, the latest of them kept."""

    def __init__(self, adapter: PipelineAdapter) -> None:
        self._adapter = adapter
        self._known: OrderedDict[Any, Any] = OrderedDict()
        self._bytes = 0
        self._all_kept = False

    def encode(
        self, prompts: Sequence[str], negative: Sequence[str], guided: bool, size: Size
    ) -> Cond:
        """The conditions of B rows, in one tree."""
        rows = [self._row(p, n, guided, size) for p, n in zip(prompts, negative, strict=True)]
        try:
            cond = _joined([cond for cond, _ in rows])
            return Cond(cond, _joined([uncond for _, uncond in rows]) if guided else None)
        except (RuntimeError, ValueError):
            # Texts of different lengths, in a family that pads to the longest of the batch.
            return self._adapter.encode(prompts, negative, guided, size)

    def encode_all(self, rows: Iterable[tuple[str, str, bool, Size]]) -> None:
        """Encodes (prompt, negative, guided, size) of a whole run, and gives the encoders up.

        The conditions wait in main memory, all of them; the pipeline has no text encoder then.
        """
        self._all_kept = True
        for row in rows:
            self._row(*row)
        pipe = self._adapter.pipe
        for name in [name for name in pipe.components if name.startswith("text_encoder")]:
            setattr(pipe, name, None)
        free_memory()

    def warning(self, prompt: str) -> str | None:
        """What is said of a prompt that is longer than the encoder reads; None where it fits."""
        tokenizer = getattr(self._adapter.pipe, "tokenizer", None)
        limit = getattr(tokenizer, "model_max_length", None)
        if tokenizer is None or not isinstance(limit, int) or limit > 10**6:
            return None
        if len(prompt) <= (limit - 2) // 2:
            return None  # a token has at most a few bytes, never less than half a character here
        with exclusive(tokenizer):
            count = len(tokenizer.tokenize(prompt)) + tokenizer.num_special_tokens_to_add()
        return f"{count - limit} tokens of the prompt were dropped" if count > limit else None

    def _row(self, prompt: str, negative: str, guided: bool, size: Size) -> tuple[Any, Any]:
        """The two conditions of a row; a text that is known on its side is not encoded again."""
        own, against = ("cond", prompt, size), ("uncond", negative, size)
        pair = guided and against not in self._known
        if pair or own not in self._known:
            with torch.no_grad():
                encoded = self._adapter.encode([prompt], [negative], pair, size)
            if pair:
                self._keep(against, encoded.uncond)
            if own not in self._known:
                self._keep(own, encoded.cond)
        found = self._recalled(own), self._recalled(against) if guided else None
        self._forget()
        return found

    def _keep(self, key: Any, tree: Any) -> None:
        self._known[key] = map_tree(_on_host, tree) if self._all_kept else tree
        self._bytes += _bytes(tree)

    def _recalled(self, key: Any) -> Any:
        self._known.move_to_end(key)
        tree, device = self._known[key], self._adapter.device
        return map_tree(lambda leaf: _moved(leaf, device), tree) if self._all_kept else tree

    def _forget(self) -> None:
        """The texts that were used longest ago, until the rest is within the limits."""
        while not self._all_kept and len(self._known) > 2 and (
            len(self._known) > MAX_TEXTS or self._bytes > MAX_BYTES
        ):  # fmt: skip
            self._bytes -= _bytes(self._known.popitem(last=False)[1])


def _joined(rows: Sequence[Any]) -> Any:
    return rows[0] if len(rows) == 1 else map_tree(_join, *rows)


def _join(*parts: Any) -> Any:
    if isinstance(parts[0], Tensor):
        return cat_rows(parts)
    if any(part != parts[0] for part in parts):
        raise ValueError("conditions differ")
    return parts[0]


def _on_host(leaf: Any) -> Any:
    return leaf.cpu() if isinstance(leaf, Tensor) else leaf


def _moved(leaf: Any, device: Any) -> Any:
    return leaf.to(device) if isinstance(leaf, Tensor) else leaf


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in leaves(tree) if isinstance(leaf, Tensor))
