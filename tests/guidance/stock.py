"""The seven tiny stock pipelines of the hook's tests, and how each is called."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from tests import tiny

SCALE = 3.0
STEPS = 5  # divides 1000: with other numbers stock DDIM steps to levels off its own grid


@dataclass(frozen=True)
class Stock:
    """`build` makes the pipeline; `call` its arguments; `network` the name of its denoiser."""

    build: Any
    call: dict[str, Any]
    network: str = "transformer"
    scale: str = "guidance_scale"
    kind: str = "eps"
    sequential: bool = False

    def run(self, pipe, scale=SCALE, seeds=(1, 2), **more):
        """The last latents [B, ...]; images where the pipeline gives no latents."""
        given = {"output_type": "latent", **self.call, self.scale: scale, **more}
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        out = pipe(**given, num_inference_steps=STEPS, generator=generators)
        images = out.images
        return images if isinstance(images, torch.Tensor) else torch.as_tensor(images)


PROMPTS = {"prompt": ["a red fox", "two blue cars"], "height": 32, "width": 32}
FLOW = {"base_shift": 0.5, "max_shift": 1.15, "use_dynamic_shifting": True}

STOCK = {
    "sd": Stock(tiny.sd, PROMPTS, "unet"),
    "sd_v": Stock(lambda: tiny.sd("zero_snr"), PROMPTS, "unet", kind="v"),
    "sdxl": Stock(tiny.sdxl, PROMPTS, "unet"),
    "sd3": Stock(tiny.sd3, PROMPTS, kind="velocity"),
    "pixart": Stock(tiny.pixart, {**PROMPTS, "use_resolution_binning": False}),
    "dit": Stock(tiny.dit, {"class_labels": [3, 700], "output_type": "np"}),
    "flux": Stock(
        tiny.flux,
        {**PROMPTS, "negative_prompt": "ugly", "guidance_scale": 1.0},
        scale="true_cfg_scale",
        kind="velocity",
        sequential=True,
    ),
    "qwen": Stock(
        lambda: tiny.qwen(FlowMatchEulerDiscreteScheduler(**FLOW)),
        {**tiny.qwen_inputs(2), "height": 32, "width": 32},
        scale="true_cfg_scale",
        kind="velocity",
        sequential=True,
    ),
}


class Rows:
    """Counts the rows that a module really computes; made before any hook of ours."""

    def __init__(self, module):
        self.rows = []
        forward = module.forward

        def counting(*args, **kwargs):
            sample = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
            self.rows.append(sample.shape[0])
            return forward(*args, **kwargs)

        module.forward = counting
