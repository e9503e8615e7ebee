"""Guidance rules inside an unmodified diffusers pipeline: `with sampler.guide(pipe, rule):`.

The pipeline keeps its own loop. Calls of its denoising networks and of its scheduler's `step` are
intercepted: at the first step of a run the guidance formula is solved from what the networks
answered and what the scheduler is given (`forms.py`), and from then on the scheduler is given the
rule's result instead. Rows that a rule does not evaluate are cut out of the network calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from sampler import registry
from sampler.core.caches import beside_caches
from sampler.core.errors import ModelError
from sampler.pipelines.call_arguments import scheduler_of
from sampler.stock.first_order import served
from sampler.stock.guided_calls import GuidedCalls
from sampler.stock.interception import intercept
from sampler.stock.negative_calls import NegativeCalls, negative_of
from sampler.stock.stock_calls import denoisers
from sampler.types import Cond

_guided: list[Any] = []  # pipelines inside a context


@contextmanager
def guide(pipe: Any, rule: Any) -> Iterator[GuidedCalls]:
    """Guide every call of `pipe(...)` inside by `rule` instead of the pipeline's own guidance.

    With P_k what the pipeline makes of its networks' answers for the branches of a step (mostly the
    answers themselves, or x0 of them), and M = Σ a_k·P_k what it gives to its scheduler, the
    coefficients a are solved at the first step of every run, where everything is evaluated.
    a = (1 − s, s) is classifier-free guidance; of three branches (perturbed attention, Pix2Pix)
    the extra term of the pipeline stays: M = rule(c, u) + rest. Every later step is checked.

    pipe: any diffusers pipeline with a scheduler, called with its guidance on (guidance_scale > 1,
    or a negative prompt and true_cfg_scale > 1; the value has no effect). It may be offloaded, also
    inside, and may share its network with other pipelines and engines, which are not affected. One
    thread at a time may call it. rule: a name, a mapping or an instance, over the conditional and
    the unconditional prediction. The value has `nfe`, the NFE of each image of the last run, and
    `form`, the solved formula.

    Raises ModelError for a pipeline without a network or a scheduler whose levels are known, and
    ValueError for a rule that needs more than the two predictions, guidance that is off, that
    rescales or that is no sum of the branches, and a step without a network call.
    """
    with guiding(hook_of(pipe, rule)) as hook:
        yield hook


def hook_of(pipe: Any, rule: Any) -> GuidedCalls:
    """The hook of `guide`, which `guiding` puts into its pipeline. Raises what `guide` raises."""
    networks = _networks(pipe)
    built = registry.build("guidance", rule)
    text = negative_of(built)
    if extra := built.needs - {"cond", "uncond"}:
        raise ValueError(
            f"Guidance {built.name!r} needs {min(extra)!r}, which a stock pipeline does not have; "
            "use sampler.load(pipe).generate(...)."
        )
    built = served(built, scheduler_of(pipe))
    built.start(Cond())  # a rule that needs classes or a classifier raises here
    negative = None if text is None else NegativeCalls(pipe, text)
    hook = GuidedCalls(pipe, networks, beside_caches(built, networks), negative)
    if any(pipe is other for other in _guided):
        raise ValueError("This pipeline is guided already; leave the outer sampler.guide first.")
    return hook


@contextmanager
def guiding(hook: GuidedCalls) -> Iterator[GuidedCalls]:
    """Guide every call of the pipeline of a hook inside."""
    pipe = hook.pipe
    _guided.append(pipe)
    try:
        with ExitStack() as stack:
            stack.enter_context(intercept(pipe, hook.pipeline_call))
            for number, network in enumerate(hook.networks):
                stack.enter_context(intercept(network, partial(hook.network_call, number)))
            yield hook
    finally:
        _guided[:] = [other for other in _guided if other is not pipe]


def _networks(pipe: Any) -> list[Any]:
    """The denoising networks of a pipeline; ModelError where it cannot be guided."""
    name = type(pipe).__name__
    if scheduler_of(pipe) is None:
        raise ModelError(
            f"sampler.guide does not serve {name}, which has no scheduler to take steps with."
        )
    if found := denoisers(pipe):
        return found
    absent = [part for part, value in pipe.components.items() if value is None]
    named = next((part for part in absent if part.startswith(("unet", "transformer"))), None)
    raise ModelError(f"This {name} has no {named or 'denoising network'} to guide.")
