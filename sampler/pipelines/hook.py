"""Any guidance rule inside an unmodified diffusers pipeline: `with sampler.guide(pipe, rule):`.

The pipeline keeps its own loop and its own guidance formula; a hook on its network computes the
guided output g and hands it over in such a way that the pipeline's formula gives g again:

    batched      one call on [uncond, cond] or [cond, uncond]; the hook returns [g, g], and
                 u + s·(c − u) = g + s·0 = g
    sequential   a call for cond, then one for uncond; at the second the hook writes g into the
                 tensor that the first one returned, and returns g

Rows that a rule does not ask for are cut out of the call, so they are not paid for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from diffusers.hooks.hooks import HookRegistry

from sampler import registry
from sampler.pipelines.guided_calls import BatchedCalls, GuidedCalls, Layout, SequentialCalls
from sampler.types import Cond, SamplerError

NAME = "sampler_guidance"
_UNET, _DIT = Layout("unet", "uncond first"), Layout("transformer", "uncond first")
_TRUE_CFG = Layout("transformer", "sequential", 1 / 1000)
LAYOUTS: Mapping[str, Layout] = {
    "StableDiffusionPipeline": _UNET,
    "StableDiffusionImg2ImgPipeline": _UNET,
    "StableDiffusionXLPipeline": _UNET,
    "StableDiffusionXLImg2ImgPipeline": _UNET,
    "StableDiffusion3Pipeline": _DIT,
    "StableDiffusion3Img2ImgPipeline": _DIT,
    "PixArtAlphaPipeline": _DIT,
    "PixArtSigmaPipeline": _DIT,
    "DiTPipeline": Layout("transformer", "cond first"),
    "FluxPipeline": _TRUE_CFG,
    "QwenImagePipeline": _TRUE_CFG,
}
_REASONS = {
    "ControlNet": "guess mode changes what is in its batches",
    "PAG": "its batches hold a third, perturbed branch",
    "Pix2Pix": "its batches hold three branches",
    "Inpaint": "its network input may hold a mask and an image",
    "LatentConsistency": "it has no unconditional branch, its scale is an input of the network",
}


@contextmanager
def guide(pipe: Any, rule: Any) -> Iterator[GuidedCalls]:
    """Inside, every call of `pipe(...)` is guided by `rule` instead of the pipeline's own CFG.

    pipe: one of the classes in `LAYOUTS`, called with its guidance on (guidance_scale > 1, or a
    negative prompt and true_cfg_scale > 1; the value has no effect). rule: a name, a mapping or an
    instance, over the conditional and the unconditional prediction. The value has `nfe`: the rows
    evaluated for each image of the last call.

    Raises SamplerError (6) for another pipeline class, and ValueError for a rule that needs more
    than the two predictions, and for options of the pipeline that use them once more.
    """
    layout = _layout(pipe)
    built = registry.build("guidance", rule)
    if extra := built.needs - {"cond", "uncond"}:
        raise ValueError(
            f"Guidance {built.name!r} needs {min(extra)!r}, which a stock pipeline does not have; "
            "use sampler.load(pipe).generate(...)."
        )
    built.start(Cond())  # a rule that needs classes or a classifier refuses here
    hook = (SequentialCalls if layout.order == "sequential" else BatchedCalls)(pipe, layout, built)
    hooks = HookRegistry.check_if_exists_or_initialize(getattr(pipe, layout.network))
    if hooks.get_hook(NAME) is not None:
        raise ValueError("This pipeline is guided already; leave the outer sampler.guide first.")
    hooks.register_hook(hook, NAME)
    try:
        yield hook
        hook.finish()
    finally:
        hooks.remove_hook(NAME, recurse=False)


def _layout(pipe: Any) -> Layout:
    name = type(pipe).__name__
    if name in LAYOUTS:
        return LAYOUTS[name]
    reason = next((why for part, why in _REASONS.items() if part in name), None)
    raise SamplerError(
        f"sampler.guide does not serve {name}{': ' + reason if reason else ''}; it serves "
        f"{', '.join(sorted(LAYOUTS))}.",
        6,
    )
