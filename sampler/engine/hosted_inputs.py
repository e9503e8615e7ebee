"""Inputs of the images of a hosted engine: one value for all, or one each."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from sampler.core.batch import Sample
from sampler.core.images import strength_of
from sampler.core.inputs import planned
from sampler.pipelines.call_arguments import check_names, check_types, required
from sampler.pipelines.serving import sized_by


def inputs_per_image(
    pipe: Any, given: Mapping[str, Any], prompts: int, n: int = 1
) -> list[dict[str, Any]]:
    """Planned inputs of every image, checked by name; a list of `prompts` items is one each.

    Raises ValueError for unknown and missing names and for other types, UsageError for files.
    """
    cls = type(pipe)
    check_names(cls, given)
    if missing := required(cls, given):
        raise ValueError(f"{cls.__name__} needs the input {missing[0]!r}: give it in inputs.")
    found: list[dict[str, Any]] = [{} for _ in range(prompts)]
    for name, value in given.items():
        plain = planned(name, value)
        check_types(cls, {name: plain})
        one_each = isinstance(plain, list) and len(plain) == prompts
        if one_each and prompts > 1 and _several(pipe, name) == prompts:
            if not isinstance(plain[0], list):
                raise ValueError(
                    f"inputs: {name!r} has {prompts} values for {prompts} prompts and as many "
                    "adapters; give a list with one list per prompt."
                )
        for k, own in enumerate(found):
            own[name] = plain[k] if one_each else plain
    return [own for own in found for _ in range(n)]


def _several(pipe: Any, name: str) -> int:
    """Number of ControlNets or IP-Adapters that an input has one value each for."""
    if name.removeprefix("negative_").startswith("ip_adapter"):
        networks = (getattr(pipe, part, None) for part in ("unet", "transformer"))
        layers = [getattr(network, "encoder_hid_proj", None) for network in networks]
        return max(len(getattr(one, "image_projection_layers", ())) for one in layers)
    if name.startswith("control") or name == sized_by(type(pipe), [name]):
        return len(getattr(getattr(pipe, "controlnet", None), "nets", ()))
    return 0


def batches(
    jobs: Sequence[Sample], inputs: Sequence[Mapping[str, Any]], cut: int
) -> list[list[int]]:
    """Numbers of the jobs of each call: neighbours with the same inputs, at most `cut`."""
    found: list[list[int]] = []

    def alike(k: int) -> Any:
        return bool(jobs[k].negative), _Same(inputs[k])

    for _, group in itertools.groupby(range(len(jobs)), alike):
        rows = list(group)
        found += [rows[k : k + cut] for k in range(0, len(rows), cut)]
    return found


class _Same:
    """Inputs, equal where every value is the same object or equal plain data."""

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        self.inputs = inputs

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Same):
            return False
        pairs = ((self.inputs[k], other.inputs.get(k)) for k in self.inputs)
        plain = (str, int, float, bool, dict, list, type(None))
        return all(a is b or (isinstance(a, plain) and isinstance(b, plain) and a == b)
                   for a, b in pairs)  # fmt: skip

    __hash__ = None  # pyright: ignore


def with_start(
    inputs: Mapping[str, Any] | None, image: Any, strength: float | None
) -> dict[str, Any]:
    """The inputs with an image to start from and its strength."""
    names = inputs if isinstance(inputs, Mapping) else (None,) if inputs is not None else ()
    if not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"inputs = {inputs!r:.60} must be a mapping of names of arguments to their values."
        )
    given, strength = dict(inputs or {}), strength_of(image, strength)
    if image is None:
        return given
    if twice := [name for name in ("image", "strength") if name in given]:
        raise ValueError(f"{twice[0]} is given twice; leave it out of inputs.")
    return {**given, "image": image, "strength": strength}
