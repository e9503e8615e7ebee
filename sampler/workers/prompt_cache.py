"""Cache of encoded prompts.

Every prompt is encoded alone, because text encoders round differently with other batch neighbours:
so the conditions of a sample do not depend on the batch, worker or resumed run that encodes first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from sampler_kernels import leaves, map_tree
from torch import Tensor

from sampler.core.adapter import PipelineAdapter
from sampler.core.locks import exclusive
from sampler.core.stacking import cat_rows
from sampler.types import Cond
from sampler.workers.prompt_file import ConditionFile
from sampler.workers.recovery import free_memory

MAX_BYTES = 64 * 2**20
MAX_PROMPTS = 1024  # equal prompts are close together in a plan: copies, and cells of a sweep

Size = tuple[int, int]


class PromptCache:
    """Conditions of prompts and negative prompts.

    Beyond `limit` bytes, the least recently used are evicted: to the file `spill`, or without one
    forgotten, beyond MAX_PROMPTS as well. With a file, all of them are in main memory instead of
    on the device.
    """

    def __init__(
        self, adapter: PipelineAdapter, limit: int = MAX_BYTES, spill: Path | None = None
    ) -> None:
        self._adapter, self._limit = adapter, limit
        self._known: OrderedDict[Any, Any] = OrderedDict()
        self._bytes = 0
        self._keep_all = False
        self._file = None if spill is None else ConditionFile(spill)
        self._filed: dict[Any, Any] = {}  # places in the file

    def encode(
        self, prompts: Sequence[str], negative: Sequence[str], guided: bool, size: Size
    ) -> Cond:
        """Conditions of B prompts, in one tree."""
        pairs = [self._pair(p, n, guided, size) for p, n in zip(prompts, negative, strict=True)]
        try:
            cond = _joined([cond for cond, _ in pairs])
            return Cond(cond, _joined([uncond for _, uncond in pairs]) if guided else None)
        except (RuntimeError, ValueError):
            # Texts of different lengths, in a family that pads to the longest of the batch.
            return self._adapter.encode(prompts, negative, guided, size)

    def encode_all(self, prompts: Iterable[tuple[str, str, bool, Size]]) -> None:
        """Encode (prompt, negative, guided, size) of a run, then free the text encoders.

        All conditions stay in main memory; the pipeline has no text encoder afterwards.
        """
        self._keep_all = True
        for prompt in prompts:
            self._pair(*prompt)
        pipe = self._adapter.pipe
        for name in [name for name in pipe.components if name.startswith("text_encoder")]:
            setattr(pipe, name, None)
        free_memory()

    def warning(self, prompt: str) -> str | None:
        """Warning for a prompt that the encoder truncates; None if it fits."""
        tokenizer = getattr(self._adapter.pipe, "tokenizer", None)
        limit = getattr(tokenizer, "model_max_length", None)
        if (weights := getattr(self._adapter, "prompt_weights", None)) is not None:
            (prompt,) = weights.plain([prompt])
        if tokenizer is None or not isinstance(limit, int) or limit > 10**6:
            return None
        if len(prompt) <= (limit - 2) // 2:
            return None  # a token is at least half a character
        with exclusive(tokenizer):
            count = len(tokenizer.tokenize(prompt)) + tokenizer.num_special_tokens_to_add()
        return f"{count - limit} tokens of the prompt were dropped" if count > limit else None

    def _pair(self, prompt: str, negative: str, guided: bool, size: Size) -> tuple[Any, Any]:
        """Conditions of a prompt and its negative prompt; cached ones are not encoded again."""
        own, against = ("cond", prompt, size), ("uncond", negative, size)
        both = guided and not self._has(against)
        if both or not self._has(own):
            with torch.no_grad():
                encoded = self._adapter.encode([prompt], [negative], both, size)
            if both:
                self._keep(against, encoded.uncond)
            if not self._has(own):
                self._keep(own, encoded.cond)
        found = self._cached(own), self._cached(against) if guided else None
        self._evict()
        return found

    @property
    def _on_host(self) -> bool:
        return self._keep_all or self._file is not None

    def _has(self, key: Any) -> bool:
        return key in self._known or key in self._filed

    def _keep(self, key: Any, tree: Any) -> None:
        self._known[key] = map_tree(_on_host, tree) if self._on_host else tree
        self._bytes += _bytes(tree)

    def _cached(self, key: Any) -> Any:
        if key in self._known:
            self._known.move_to_end(key)
            tree = self._known[key]
        else:
            tree = self._file.read(self._filed[key]) if self._file else None
        device = self._adapter.device
        return map_tree(lambda leaf: _moved(leaf, device), tree) if self._on_host else tree

    def _evict(self) -> None:
        """Evict the least recently used prompts until the rest is within the limits."""
        while not self._keep_all and self._is_full():
            key, tree = self._known.popitem(last=False)
            self._bytes -= _bytes(tree)
            if self._file is not None:
                self._filed[key] = self._file.add(tree)

    def _is_full(self) -> bool:
        if self._file is not None:
            return bool(self._known) and self._bytes > self._limit
        many = len(self._known) > MAX_PROMPTS or self._bytes > self._limit
        return len(self._known) > 2 and many

    def close(self) -> None:
        """Forget everything, and remove the file."""
        self._known.clear()
        self._filed.clear()
        if self._file is not None:
            self._file.remove()


def _joined(trees: Sequence[Any]) -> Any:
    return trees[0] if len(trees) == 1 else map_tree(_join, *trees)


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
