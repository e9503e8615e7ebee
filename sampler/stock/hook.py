"""Guidance rules inside an unmodified diffusers pipeline: `with sampler.guide(pipe, rule):`.

The pipeline keeps its own loop and its own guidance formula. Calls of its network are intercepted,
and the guided output g is returned in such a way that the pipeline's formula gives g again:

    batched      one call on [uncond, cond] or [cond, uncond] returns [g, g], and
                 u + s·(c − u) = g + s·0 = g
    sequential   a call for cond, then one for uncond; the second writes g into the tensor that the
                 first one returned, and returns g

Rows that a rule does not evaluate are cut out of the call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from sampler import registry
from sampler.core.caches import beside_caches
from sampler.core.errors import ModelError
from sampler.stock.guided_calls import (
    BatchedCalls,
    GuidedCalls,
    Layout,
    SequentialCalls,
)
from sampler.stock.interception import intercept
from sampler.types import Cond

_guided: list[Any] = []  # pipelines inside a context
_UNET, _DIT = Layout("unet", "uncond first"), Layout("transformer", "uncond first")
_TRUE_CFG = Layout(
    "transformer", "sequential", 1 / 1000, switch="a negative prompt and true_cfg_scale > 1"
)
LAYOUTS: Mapping[str, Layout] = {
    "StableDiffusionPipeline": _UNET,
    "StableDiffusionImg2ImgPipeline": _UNET,
    "StableDiffusionXLPipeline": _UNET,
    "StableDiffusionXLImg2ImgPipeline": _UNET,
    "KolorsPipeline": _UNET,
    "StableDiffusion3Pipeline": _DIT,
    "StableDiffusion3Img2ImgPipeline": _DIT,
    "PixArtAlphaPipeline": _DIT,
    "PixArtSigmaPipeline": _DIT,
    "HunyuanDiTPipeline": _DIT,
    "SanaPipeline": _DIT,
    "AuraFlowPipeline": Layout("transformer", "uncond first", 1 / 1000),
    "DiTPipeline": Layout("transformer", "cond first"),
    "ZImagePipeline": Layout("transformer", "cond first", 1 / 1000, backwards=True),
    "FluxPipeline": _TRUE_CFG,
    "QwenImagePipeline": _TRUE_CFG,
    "Flux2KleinPipeline": Layout("transformer", "sequential", 1 / 1000),
    "Lumina2Pipeline": Layout("transformer", "sequential", 1 / 1000, backwards=True),
    "WanPipeline": Layout("transformer", "sequential", second="transformer_2"),
}
_NO_BRANCH = "it has no unconditional branch"
_REASONS = {
    "ControlNet": "guess mode changes what is in its batches",
    "PAG": "its batches hold a third, perturbed branch",
    "Pix2Pix": "its batches hold three branches",
    "Inpaint": "its network input may hold a mask and an image",
    "LatentConsistency": f"{_NO_BRANCH}, its scale is an input of the network",
    "Flux2Pipeline": f"{_NO_BRANCH}, its scale is an input of the network",
    "ConsistencyModel": _NO_BRANCH,
    "DDPM": _NO_BRANCH,
    "DDIM": _NO_BRANCH,
}


@contextmanager
def guide(pipe: Any, rule: Any) -> Iterator[GuidedCalls]:
    """Guide every call of `pipe(...)` inside by `rule` instead of the pipeline's own CFG.

    pipe: one of the classes in `LAYOUTS`, called with its guidance on (guidance_scale > 1, or a
    negative prompt and true_cfg_scale > 1; the value has no effect). It may be offloaded, also
    inside, and may share its network with other pipelines and engines, which are not affected. One
    thread at a time may call it. rule: a name, a mapping or an instance, over the conditional and
    the unconditional prediction. The value has `nfe`, the NFE of each image of the last call.

    Raises ModelError for another pipeline class or scheduler, and ValueError for a rule that needs
    more than the two predictions, for options of the pipeline that use them again, and for a step
    whose network call was not guided.
    """
    layout = _layout(pipe)
    built = registry.build("guidance", rule)
    if extra := built.needs - {"cond", "uncond"}:
        raise ValueError(
            f"Guidance {built.name!r} needs {min(extra)!r}, which a stock pipeline does not have; "
            "use sampler.load(pipe).generate(...)."
        )
    if getattr(built, "sets_direction", False):
        raise ValueError(
            f"Guidance {built.name!r} keeps a direction apart from its target, and a stock "
            "scheduler reads one output; use sampler.load(pipe).generate(...)."
        )
    built.start(Cond())  # a rule that needs classes or a classifier raises here
    names = [name for name in (layout.network, layout.second) if name is not None]
    built = beside_caches(built, [getattr(pipe, name) for name in names])
    hook = (SequentialCalls if layout.order == "sequential" else BatchedCalls)(pipe, layout, built)
    if any(pipe is other for other in _guided):
        raise ValueError("This pipeline is guided already; leave the outer sampler.guide first.")
    _guided.append(pipe)
    try:
        with ExitStack() as stack:
            stack.enter_context(intercept(pipe, hook.pipeline_call))
            for network in hook.networks:
                stack.enter_context(intercept(network, hook.network_call))
            yield hook
    finally:
        _guided[:] = [other for other in _guided if other is not pipe]


def _layout(pipe: Any) -> Layout:
    name = type(pipe).__name__
    if name in LAYOUTS:
        return LAYOUTS[name]
    reason = next((why for part, why in _REASONS.items() if part in name), None)
    raise ModelError(
        f"sampler.guide does not serve {name}{': ' + reason if reason else ''}; it serves "
        f"{', '.join(sorted(LAYOUTS))}.",
    )
