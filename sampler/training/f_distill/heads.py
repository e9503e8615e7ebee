"""The discriminator: convolutional heads on features of the teacher."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sampler.types import Level


class ProbeInput(NamedTuple):
    """Input of one network evaluation: x [B, ...], level, condition."""

    x: Tensor
    level: Level
    cond: Any


class FeatureReader:
    """Reads the outputs of some of the teacher's modules as images [B, C, h, w].

    The evaluation ends at the last module that is read. Gradients reach x, not the teacher.
    """

    def __init__(self, networks: Any, names: tuple[str, ...]) -> None:
        self.networks, self.names = networks, names
        known = dict(networks.network.named_modules())
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"f_distill: the teacher has no module {unknown[0]!r:.60}.")

    def __call__(self, x: Tensor, level: Level, cond: Any) -> list[Tensor]:
        found: dict[str, Any] = {}

        def hook_for(name: str) -> Any:
            def hook(module: Any, inputs: Any, output: Any) -> None:
                found[name] = output
                if len(found) == len(self.names):
                    raise _StopForward

            return hook

        network = self.networks.network
        hooks = [network.get_submodule(n).register_forward_hook(hook_for(n)) for n in self.names]
        try:
            self.networks.forward(x, level, cond, "main")
        except _StopForward:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return [self._as_image(name, found[name], x) for name in self.names]

    def _as_image(self, name: str, output: Any, x: Tensor) -> Tensor:
        """Return a module's output as an image: a UNet's, or the image tokens [B, N, C] as a grid.

        Raises ValueError for an output without image tokens of their own.
        """
        parts = output if isinstance(output, tuple) else (output,)
        tensors = [part for part in parts if isinstance(part, Tensor)]
        if tensors and tensors[0].ndim == 4:
            return tensors[0]
        high, wide = token_grid(self.networks.network, x)
        tokens = [t for t in tensors if t.ndim == 3 and t.shape[1] == high * wide]
        if not tokens:
            shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
            raise ValueError(
                f"f_distill: the module {name!r} returns {shapes}, not the {high * wide} tokens of "
                "the image alone; name another one in features."
            )
        # The blocks of two-stream transformers return the text's tokens first.
        return tokens[-1].transpose(1, 2).unflatten(2, (high, wide))


def token_grid(network: Any, x: Tensor) -> tuple[int, int]:
    """Return (rows, columns) of a transformer's image tokens for latents x [B, C, ...].

    A token is a patch of p x p latent pixels: p is the network's patch size, or, where latents are
    packed before the network (Flux, Qwen-Image), the root of its input channels over C.
    """
    config = network.config
    spatial = x.shape[2:]
    high, wide = math.prod(spatial[: len(spatial) // 2]), math.prod(spatial[len(spatial) // 2 :])
    packed = int(config.get("in_channels") or 0) // x.shape[1]
    patch = config.get("patch_size") or config.get("all_patch_size") or 1
    side = math.isqrt(packed) if packed > 1 else patch if isinstance(patch, int) else patch[0]
    return high // side, wide // side


class _StopForward(Exception):
    """Raised by a hook once all features are read, to skip the rest of the network."""


def default_features(network: Any) -> tuple[str, ...]:
    """Return the name of a UNet's bottleneck, or of the middle block of a transformer.

    Raises ValueError for a network with neither, and for one all of whose blocks join the tokens of
    text and image.
    """
    if getattr(network, "mid_block", None) is not None:
        return ("mid_block",)
    for name in ("transformer_blocks", "joint_transformer_blocks", "blocks"):
        if len(blocks := getattr(network, name, ())):
            return (f"{name}.{len(blocks) // 2}",)
    raise ValueError(
        f"f_distill: {type(network).__name__} has no block that returns the tokens of the image "
        "alone in a usual place; name modules that do, features = [...]."
    )


class Heads(nn.Module):
    """One convolutional head per feature: logits [B, K], positive on real samples."""

    def __init__(self, read: FeatureReader, probe: ProbeInput, seed: int) -> None:
        super().__init__()
        self.read = read
        with torch.no_grad():
            shapes = [value.shape for value in read(*probe)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.ModuleList(_head(*shape[1:]) for shape in shapes)

    def forward(self, x: Tensor, level: Level, cond: Any) -> Tensor:
        values = self.read(x, level, cond)
        logits = [head(v.float()) for head, v in zip(self.layers, values, strict=True)]
        return torch.cat([logit.flatten(1).mean(1, keepdim=True) for logit in logits], 1)


def _head(channels: int, high: int, wide: int) -> nn.Module:
    """4x4 convolutions of stride 2 down to at most 4x4, then one over the remaining area."""
    layers: list[nn.Module] = []
    while min(high, wide) > 4:
        layers += [
            nn.Conv2d(channels, channels, 4, 2, 1),
            nn.GroupNorm(_groups(channels), channels),
            nn.SiLU(),
        ]
        high, wide = high // 2, wide // 2
    return nn.Sequential(*layers, nn.Conv2d(channels, 1, (high, wide)))


def _groups(channels: int) -> int:
    return next(n for n in range(min(32, channels), 0, -1) if channels % n == 0)
