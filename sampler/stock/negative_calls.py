"""Negative prompt of the rule `nag` in the network calls of a stock pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from sampler_kernels import map_tree
from torch import Tensor

from sampler.core.stacking import cat_rows
from sampler.pipelines.families import adapt
from sampler.pipelines.layouts import layout_of
from sampler.pipelines.negative import mixed
from sampler.stock.interception import Call
from sampler.stock.readings import replaced, tensor_of
from sampler.stock.stock_calls import sample_of
from sampler.types import Guidance

GUIDANCE_ON = (
    "nag: inside sampler.guide the pipeline's own guidance must be off, since the negative prompt "
    "is in the attention: call it with guidance_scale = 1 and without a negative prompt."
)


class NegativeCalls:
    """One negative text for all samples, encoded by the pipeline's own encoders.

    Raises ModelError for a pipeline without an adapter, and ValueError for one whose network's
    attention is not known.
    """

    def __init__(self, pipe: Any, text: str) -> None:
        adapter = adapt(pipe)
        adapter.check_mixed()
        with torch.no_grad():
            encoded = adapter.encode([""], [text], True, adapter.size(None, None))
        self.texts = adapter.stock_texts(encoded.uncond)
        self.states = adapter.text_states(encoded.uncond, "main")

    def rows(self, network: Any) -> int:
        """Rows of the network per sample."""
        return layout_of(network).rows

    def call(self, network: Any, mixing: Any, call: Call, args: Any, kwargs: Any) -> Any:
        """Call the network with the negative prompt in its attention; the output has its rows."""
        count = len(sample_of(args, kwargs))
        if self.rows(network) == 1:
            states = self.states
            states = None if states is None else states.expand(count, -1, -1)
            with mixed(network, mixing, states):
                return call(*args, **kwargs)
        given = inspect.signature(type(network).forward).bind(network, *args, **kwargs).arguments
        given = {**given, **given.pop("kwargs", {})}
        given.pop("self")
        twice = {name: self._twice(name, value, count) for name, value in given.items()}
        with mixed(network, mixing):
            raw = call(**twice)
        value = tensor_of(raw)
        assert value is not None
        return replaced(raw, value[:count])

    def _twice(self, name: str, value: Any, count: int) -> Any:
        """An input of `count` rows for [positive; negative] rows."""
        own = self.texts.get(name)
        if isinstance(value, list) and len(value) == count:  # of samples
            rest = list(value) if own is None else [own[0]] * count
            return [*value, *rest]

        def joined(leaf: Any) -> Any:
            if not (isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == count):
                return leaf
            if own is None or isinstance(own, Mapping):
                return torch.cat([leaf, leaf])
            other = own.to(leaf).expand(count, *own.shape[1:])
            return cat_rows([leaf, other])

        return map_tree(joined, value)


def negative_of(rule: Guidance) -> str | None:
    """The text of the rule `nag` that is this rule or inside it; None for none.

    Raises ValueError for one without a text, and for one around a rule with two branches.
    """
    inner: Any = rule
    while inner is not None:
        if type(inner).name == "nag" and not inner.off:
            if inner.negative is None:
                raise ValueError(
                    "nag: inside sampler.guide the negative prompt belongs to the rule: "
                    "{'name': 'nag', 'negative': 'blurry'}."
                )
            if inner.rule.needs != {"cond"}:
                raise ValueError(GUIDANCE_ON)
            return inner.negative
        inner = getattr(inner, "rule", None)
    return None
