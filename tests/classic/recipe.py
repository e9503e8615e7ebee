"""Recipe of a tiny random pipeline of a classic class of diffusers, and how it is called.

`table.TINY` holds one for every class that can be built; the same recipe serves all classes of a
family, each taking the parts that its signature names.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import torch

from sampler.pipelines.call_arguments import arguments, embeds_scale, reserved
from tests.classic.parts import randomised
from tests.classic.stand_ins import stand_ins
from tests.guidance.stock_hosted import half_mask, picture

FREE = {"safety_checker", "feature_extractor", "image_encoder", "watermarker",
        "caption_generator", "caption_processor"}  # None will do  # fmt: skip
IMAGES = {"image", "control_image", "image_2", "original_image", "input_image", "adapter_image",
          "image_reference", "control_images"}  # fmt: skip
MASKS = {"mask_image", "mask", "control_mask"}
VIDEOS = {"video", "conditioning_frames", "control_video", "original_video"}
NETWORKS = ("transformer", "unet", "controlnet", "prior", "adapter", "decoder")


@dataclass(frozen=True)
class Recipe:
    """Parts by the names of the class's signature, and arguments of its call that differ.

    parts: builds them; call: arguments beside the usual ones, `...` to leave one out; drawn:
    whether weights of the networks are drawn anew (see `randomised`); constants: attributes that
    the class sets to the sizes of its published models.
    """

    parts: Callable[[], dict[str, Any]]
    call: dict[str, Any] = field(default_factory=dict)
    drawn: bool = True
    constants: dict[str, Any] = field(default_factory=dict)

    def build(self, name: str, seed: int = 0) -> Any:
        """A fresh pipeline of a class."""
        cls = getattr(diffusers, name)
        wanted = {n: p for n, p in inspect.signature(cls.__init__).parameters.items()}
        del wanted["self"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            parts = self.parts()
            own = {name: parts[name] for name in wanted if name in parts}
            if self.drawn:
                for part in (own.get(one) for one in NETWORKS):
                    if isinstance(part, torch.nn.Module):
                        randomised(part)
        needed = {n for n, p in wanted.items() if n not in own and p.default is p.empty}
        own |= dict.fromkeys(needed & FREE)
        for off in ("requires_safety_checker", "add_watermarker"):
            if off in wanted:
                own[off] = False
        pipe = cls(**own)
        vars(pipe).update(self.constants)
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval().requires_grad_(False)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def settings(self, cls: type) -> dict[str, Any]:
        """Arguments of a plain call beside the images."""
        known = arguments(cls)
        usual: dict[str, Any] = {
            **{"prompt": "a red fox", "negative_prompt": "ugly", "height": 32, "width": 32},
            **{"num_inference_steps": 3, "num_frames": 5, "class_labels": [3]},
            **{"output_type": "pt", "use_resolution_binning": False, "clean_caption": False},
            "true_cfg_scale": 3.0,
        }
        if not embeds_scale(cls):
            usual["guidance_scale"] = 3.0
        usual |= {name: value for name, value in self.call.items() if name not in self.inputs(cls)}
        return {n: v for n, v in usual.items() if n in known and v is not ...}

    def inputs(self, cls: type) -> dict[str, Any]:
        """Arguments of the call that the prompt and the seed do not give."""
        found: dict[str, Any] = {}
        set_by_engine = reserved(cls)
        for name in arguments(cls):
            if name in set_by_engine:
                continue
            if name in self.call:
                found[name] = self.call[name]
            elif name in IMAGES:
                found[name] = picture(1)
            elif name in MASKS:
                found[name] = half_mask()
            elif name in VIDEOS:
                found[name] = [picture(k) for k in range(5)]
            elif name == "strength":
                found[name] = 0.7
        return {name: value for name, value in found.items() if value is not ...}

    def called(self, pipe: Any, **more: Any) -> torch.Tensor:
        """Result of one call, the same at every time."""
        cls = type(pipe)
        given = {**self.settings(cls), **self.inputs(cls), **more}
        if "generator" in arguments(cls):
            given["generator"] = torch.Generator().manual_seed(3)
        torch.manual_seed(0)
        with stand_ins(cls):
            value = pipe(**given)
        value = value[0] if isinstance(value, tuple) else value.to_tuple()[0]
        return as_tensor(value)


def drawn(*shape: int, seed: int = 1) -> torch.Tensor:
    """Normal numbers, for embeddings and latents that a call takes."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def as_tensor(value: Any) -> torch.Tensor:
    """Images, frames or sounds of any form as float64."""
    if isinstance(value, torch.Tensor):
        return value.double()
    if isinstance(value, (list, tuple)):
        return torch.stack([as_tensor(one) for one in value])
    return torch.as_tensor(np.asarray(value)).double()
