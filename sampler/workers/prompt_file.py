"""Conditions in a memory-mapped file, for more prompts than main memory should hold."""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sampler_kernels import map_tree
from torch import Tensor

from sampler.core.durable import make_folder, storage_error

_ALIGNMENT = 64  # bytes, so that no element lies across two pages


@dataclass(frozen=True)
class _Stored:
    """Place of a tensor in the file."""

    offset: int
    dtype: torch.dtype
    shape: torch.Size


class ConditionFile:
    """An append-only file of condition trees, which one process writes and reads.

    It holds no index and is written anew by every process: nothing in it outlives the weights of
    the text encoder that it came from.
    """

    def __init__(self, path: Path) -> None:
        make_folder(path.parent)
        self.path, self._end = path, 0
        self._file = path.open("w+b")
        self._map: mmap.mmap | None = None

    def add(self, tree: Any) -> Any:
        """Write a tree of tensors and plain values; return what `read` takes for it.

        Raises StorageError where the disk is full.
        """
        try:
            found = map_tree(self._write, tree)
            self._file.flush()
        except OSError as error:
            raise storage_error(error, self.path) from None
        self._map = None  # the next one reaches to the new end
        return found

    def read(self, tree: Any) -> Any:
        """Return a tree whose tensors are pages of the file, read where they are used."""
        return map_tree(self._mapped, tree)

    def remove(self) -> None:
        """Close and delete the file; tensors that were read stay valid."""
        self._map = None
        self._file.close()
        self.path.unlink(missing_ok=True)

    def _write(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        content = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        start = self._end + -self._end % _ALIGNMENT
        self._file.seek(start)
        self._file.write(content.data)
        self._end = start + content.nbytes
        return _Stored(start, leaf.dtype, leaf.shape)

    def _mapped(self, leaf: Any) -> Any:
        if not isinstance(leaf, _Stored):
            return leaf
        if not (count := math.prod(leaf.shape)):
            return torch.empty(leaf.shape, dtype=leaf.dtype)
        if self._map is None:
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
        pages = torch.frombuffer(self._map, dtype=leaf.dtype, count=count, offset=leaf.offset)
        return pages.view(leaf.shape)
