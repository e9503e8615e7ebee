"""Trees of values: dicts, lists, tuples and NamedTuples, with anything else as a leaf.

Small on purpose: `torch.utils._pytree` is private and imports torch, which strategies must not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Annotated, so that a test of a tree against them leaves its branches of type Any.
_ITEMS: tuple[type[Any], ...] = (list, tuple)
_TUPLE: type[Any] = tuple
_NAMED: type[Any] = dict


def map_tree(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """The tree of `fn(leaf, *leaves of rest)`, of the shape of `tree`; None stays None.

    Raises ValueError where a tree of `rest` has another shape than `tree`.
    """
    if not rest:
        return _map(fn, tree)
    if tree is None:
        return None
    if isinstance(tree, _NAMED):
        for other in rest:
            if not isinstance(other, _NAMED) or other.keys() != tree.keys():
                raise ValueError(f"Trees differ: {sorted(tree)} against {other!r:.80}.")
        return {k: map_tree(fn, v, *(other[k] for other in rest)) for k, v in tree.items()}
    if isinstance(tree, _ITEMS):
        for other in rest:
            if not isinstance(other, _ITEMS) or len(other) != len(tree):
                raise ValueError(f"Trees differ: {len(tree)} items against {other!r:.80}.")
        done = [map_tree(fn, *branch) for branch in zip(tree, *rest, strict=True)]
        return _like(tree, done)
    return fn(tree, *rest)


def _map(fn: Callable[[Any], Any], tree: Any) -> Any:
    """`map_tree` over one tree: once or more per step."""
    if type(tree) is _TUPLE:
        return tuple([_map(fn, branch) for branch in tree]) if tree else tree
    if isinstance(tree, _ITEMS):
        return _like(tree, [_map(fn, branch) for branch in tree])
    if isinstance(tree, _NAMED):
        return {key: _map(fn, branch) for key, branch in tree.items()}
    return None if tree is None else fn(tree)


def _like(items: Any, done: list[Any]) -> Any:
    """A list, tuple or NamedTuple of other items."""
    return items._make(done) if hasattr(items, "_make") else type(items)(done)


def leaves(tree: Any) -> list[Any]:
    """The leaves of a tree, depth first, without the Nones."""
    found: list[Any] = []
    _collect(tree, found)
    return found


def _collect(tree: Any, found: list[Any]) -> None:
    if isinstance(tree, _ITEMS):
        for value in tree:
            _collect(value, found)
    elif isinstance(tree, _NAMED):
        for value in tree.values():
            _collect(value, found)
    elif tree is not None:
        found.append(tree)
