"""Block caches of diffusers inside a network, and rules that skip calls or samples.

A block cache (FirstBlockCache, TaylorSeer, MagCache, FasterCache, PAB) counts the network's calls
and keeps residuals of the last batch: a skipped call puts it one step behind, and a batch of other
rows is refused or, where it broadcasts, gets the rows of the old one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from sampler.types import Guidance

log = logging.getLogger("sampler")


def beside_caches(rule: Guidance, networks: Iterable[Any]) -> Guidance:
    """The rule adapted to networks: with compact = "batch" where a block cache is enabled.

    Raises ValueError for a rule that leaves out calls, or single samples without such a setting.
    """
    cache = next((found for network in networks if (found := cache_of(network))), "")
    return _whole_batches(rule, cache) if cache else rule


def cache_of(network: Any) -> str:
    """The name of the cache that is enabled on a network, "" for none."""
    if getattr(network, "is_cache_enabled", False):
        return type(getattr(network, "_cache_config", None)).__name__
    return "cache-dit" if getattr(network, "_is_cached", False) else ""


def _whole_batches(rule: Any, cache: str) -> Any:
    name: str = rule.name
    if name in ("forecast", "gfcg"):
        raise ValueError(
            f"{name}: a cache is enabled on this network ({cache}); it counts calls and keeps "
            f"residuals of whole batches. Call disable_cache() on the network, or leave {name} out."
        )
    inner = getattr(rule, "rule", None)
    if inner is not None and (found := _whole_batches(inner, cache)) is not inner:
        rule = replace(rule, rule=found)
    rules = getattr(rule, "rules", None)
    if rules:
        rule = replace(rule, rules=tuple(_whole_batches(each, cache) for each in rules))
    if getattr(rule, "compact", "batch") == "rows":
        log.info("%s: compact = 'batch', since a cache is enabled (%s)", name, cache)
        rule = replace(rule, compact="batch")
    return rule
