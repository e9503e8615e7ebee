"""Snapshots on disk: one safetensors file with the structure as JSON in its header; no pickle."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sampler.core.durable import write_file
from sampler.core.errors import UsageError
from sampler.types import Snapshot

FORMAT = 1


def save_snapshot(snapshot: Snapshot, path: str | Path) -> None:
    """Write a snapshot durably and atomically.

    Strategy states may hold tensors, numbers, strings, booleans, None, lists, tuples,
    NamedTuples and dicts with string keys. Raises TypeError for anything else, and
    StorageError.
    """
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    tree = _encode(tuple(snapshot), tensors)
    header = {"format": str(FORMAT), "snapshot": json.dumps(tree)}
    data = save({k: v.detach().clone().contiguous() for k, v in tensors.items()}, header)
    write_file(path, data)


def load_snapshot(path: str | Path) -> Snapshot:
    """Read a snapshot onto the CPU; the strategies of the run must have been imported.

    Raises UsageError for a file that is missing or not a snapshot.
    """
    try:
        reader: Any = safe_open(str(path), "pt")
        with reader as file:
            header: dict[str, str] = file.metadata() or {}
            tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if header.get("format") != str(FORMAT):
            raise KeyError("format")
        return Snapshot(*_decode(json.loads(header["snapshot"]), tensors))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise UsageError(f"{path} is not a readable snapshot: {error}.") from error


def _encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[f"t{len(tensors)}"] = value
        return {"tensor": f"t{len(tensors) - 1}"}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    if isinstance(value, dict):
        entries = cast("dict[Any, Any]", value)
        return {"dict": {str(k): _encode(v, tensors) for k, v in entries.items()}}
    if isinstance(value, (list, tuple)):
        items = [_encode(v, tensors) for v in cast("Sequence[Any]", value)]
        kind = cast(Any, type(cast(Any, value)))
        if is_named_tuple(kind):
            return {"named": f"{kind.__module__}:{kind.__qualname__}", "items": items}
        return {"list" if kind is list else "tuple": items}
    raise TypeError(f"A strategy's state cannot be saved: it holds {type(value).__name__}.")


def _decode(tree: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    if "tensor" in tree:
        return tensors[tree["tensor"]]
    if "value" in tree:
        return tree["value"]
    if "dict" in tree:
        return {k: _decode(v, tensors) for k, v in tree["dict"].items()}
    if "named" in tree:
        return _named(tree["named"])(*(_decode(v, tensors) for v in tree["items"]))
    kind: Any = list if "list" in tree else tuple
    return kind(_decode(v, tensors) for v in tree[kind.__name__])


def is_named_tuple(kind: Any) -> bool:
    """Return True for a class of NamedTuples."""
    is_tuple = isinstance(kind, type) and issubclass(kind, tuple)
    return is_tuple and hasattr(cast(Any, kind), "_fields")


def _named(path: str) -> Any:
    """Find a state's NamedTuple among the imported modules; a file must not import code."""
    module, name = path.split(":")
    found = getattr(sys.modules.get(module), name, None)
    if not is_named_tuple(found):
        raise ValueError(f"unknown state type {path}; import its strategy first")
    return found
