"""Network evaluations of a stock call, counted at its networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any


@contextmanager
def counted_rows(networks: Sequence[Any], on_call: Callable[[], None]) -> Iterator[list[int]]:
    """Collect the number of samples in every call of the networks.

    on_call: called before each; what it raises ends the stock call.
    """
    rows: list[int] = []

    def count(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        on_call()
        values = (*args, *(kwargs.get(name) for name in ("sample", "hidden_states", "x")))
        rows.append(len(next(value for value in values if value is not None)))

    with ExitStack() as stack:
        for network in networks:
            handle = network.register_forward_pre_hook(count, with_kwargs=True)
            stack.callback(handle.remove)
        yield rows
