"""Locks for objects of other libraries that are not thread-safe."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

_locks: WeakKeyDictionary[Any, threading.RLock] = WeakKeyDictionary()
_registry = threading.Lock()


@contextmanager
def exclusive(*objects: Any) -> Generator[None, None, None]:
    """Hold a lock per object; it is the same for everyone in this process who uses the object.

    Locks are taken in a fixed order and are re-entrant; None is skipped.
    """
    with _registry:
        distinct = {id(one): one for one in objects if one is not None}
        locks = [_locks.setdefault(one, threading.RLock()) for _, one in sorted(distinct.items())]
    with ExitStack() as stack:
        for lock in locks:
            stack.enter_context(lock)
        yield
