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
from sampler.errors import ModelError
from sampler.pipelines.base import processes
from sampler.stock.guided_calls import (
    AlsoCalls,
    BatchedCalls,
    GuidedCalls,
    Layout,
    SequentialCalls,
)
from sampler.types import Cond

NAME = "sampler_guidance"
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
    _refuse_levels(pipe, hook.schedule.process)
    names = [name for name in (layout.network, layout.second) if name is not None]
    networks = [network for name in names if (network := getattr(pipe, name)) is not None]
    registries = [HookRegistry.check_if_exists_or_initialize(network) for network in networks]
    if any(hooks.get_hook(NAME) is not None for hooks in registries):
        raise ValueError("This pipeline is guided already; leave the outer sampler.guide first.")
    for number, hooks in enumerate(registries):
        hooks.register_hook(hook if number == 0 else AlsoCalls(hook), NAME)
    try:
        yield hook
        hook.finish()
    finally:
        for hooks in registries:
            hooks.remove_hook(NAME, recurse=False)


def _refuse_levels(pipe: Any, process: str) -> None:
    """A velocity read as noise, or the reverse, would give an image without any error."""
    trained = processes(type(pipe).__name__.replace("Img2Img", ""))
    if process not in trained:
        raise ModelError(
            f"{type(pipe).__name__} is trained with {' or '.join(trained)} levels, and its "
            f"scheduler, {type(pipe.scheduler).__name__}, gives {process} ones.",
        )


def _layout(pipe: Any) -> Layout:
    name = type(pipe).__name__
    if name in LAYOUTS:
        return LAYOUTS[name]
    reason = next((why for part, why in _REASONS.items() if part in name), None)
    raise ModelError(
        f"sampler.guide does not serve {name}{': ' + reason if reason else ''}; it serves "
        f"{', '.join(sorted(LAYOUTS))}.",
    )
