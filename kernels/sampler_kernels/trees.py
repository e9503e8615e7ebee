"""Trees of values: dicts, lists, tuples and NamedTuples, with anything else as a leaf.

Small on purpose: `torch.utils._pytree` is private and imports torch, which strategies must not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def map_tree(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """The tree of `fn(leaf, *leaves of rest)`, of the shape of `tree`; None stays None.

    Raises ValueError where a tree of `rest` has another shape than `tree`.
    """
    if not rest:
        return _map(fn, tree)
    if tree is None:
        return None
    if isinstance(tree, dict):
        for other in rest:
            if not isinstance(other, dict) or other.keys() != tree.keys():
                raise ValueError(f"Trees differ: {sorted(tree)} against {other!r:.80}.")
        return {k: map_tree(fn, v, *(other[k] for other in rest)) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        for other in rest:
            if not isinstance(other, (list, tuple)) or len(other) != len(tree):
                raise ValueError(f"Trees differ: {len(tree)} items against {other!r:.80}.")
        items = [map_tree(fn, *branch) for branch in zip(tree, *rest, strict=True)]
        if hasattr(tree, "_fields"):
            return type(tree)(*items)
        return type(tree)(items)
    return fn(tree, *rest)


def _map(fn: Callable[[Any], Any], tree: Any) -> Any:
    """`map_tree` over one tree: once or more per step."""
    if isinstance(tree, (list, tuple)):
        items = [_map(fn, branch) for branch in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if isinstance(tree, dict):
        return {key: _map(fn, branch) for key, branch in tree.items()}
    return None if tree is None else fn(tree)


def leaves(tree: Any) -> list[Any]:
    """The leaves of a tree, depth first, without the Nones."""
    found: list[Any] = []
    _collect(tree, found)
    return found


def _collect(tree: Any, found: list[Any]) -> None:
    if isinstance(tree, (list, tuple)):
        for value in tree:
            _collect(value, found)
    elif isinstance(tree, dict):
        for value in tree.values():
            _collect(value, found)
    elif tree is not None:
        found.append(tree)
