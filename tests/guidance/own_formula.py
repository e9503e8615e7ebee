"""Stable Diffusion with a loop of its own, whose guidance a test chooses."""

import torch
from diffusers import StableDiffusionPipeline

from tests import tiny

STEPS = 5


class Pipe(StableDiffusionPipeline):
    """Stable Diffusion with a loop of its own: `formula(self, u, c, x, i)` is its guidance."""

    formula = None
    calls = "uncond first"

    def evaluated(self, x, t, cond, uncond):
        if self.calls == "sequential":
            c, u = (self.unet(x, t, encoder_hidden_states=e).sample for e in (cond, uncond))
            return u, c
        pair = [uncond, cond] if self.calls == "uncond first" else [cond, uncond]
        twice = torch.cat([x, x])
        out = self.unet(twice, t, encoder_hidden_states=torch.cat(pair), return_dict=False)[0]
        first, second = out.chunk(2)
        return (first, second) if self.calls == "uncond first" else (second, first)

    @torch.no_grad()
    def __call__(self):
        prompts, negative = ["a fox", "a blue door"], ["ugly", "dark"]
        cond, uncond = self.encode_prompt(prompts, "cpu", 1, True, negative)
        self.scheduler.set_timesteps(STEPS)
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4))
        x = x * self.scheduler.init_noise_sigma
        self.last = 0.0
        for i, t in enumerate(self.scheduler.timesteps):
            z = self.scheduler.scale_model_input(x, t)
            u, c = self.evaluated(z, t, cond, uncond)
            x = self.scheduler.step(type(self).formula(self, u, c, x, i), t, x).prev_sample
        return x


def built(formula, calls="uncond first", scheduler=None):
    class Changed(Pipe):
        pass

    Changed.formula, Changed.calls = formula, calls
    parts = {**tiny.sd().components, **({"scheduler": scheduler} if scheduler else {})}
    pipe = Changed(**parts, requires_safety_checker=False)
    pipe.unet.conv_out.weight.mul_(3)
    return pipe
