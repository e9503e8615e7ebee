"""The discriminator: convolutional heads on features of the teacher."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sampler.types import Level


class Probe(NamedTuple):
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
        found: dict[str, Tensor] = {}

        def hook_for(name: str) -> Any:
            def hook(module: Any, inputs: Any, output: Any) -> None:
                found[name] = output[0] if isinstance(output, tuple) else output
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
        return [self._as_image(found[name], x) for name in self.names]

    def _as_image(self, value: Tensor, x: Tensor) -> Tensor:
        """Arrange tokens [B, N, C] as an image; text tokens come first and are dropped."""
        if value.ndim == 4:
            return value
        patch = int(self.networks.network.config.get("patch_size") or 1)
        high, wide = x.shape[-2] // patch, x.shape[-1] // patch
        return value[:, -high * wide :].transpose(1, 2).unflatten(2, (high, wide))


class _StopForward(Exception):
    """Raised by a hook once all features are read, to skip the rest of the network."""


def default_features(network: Any) -> tuple[str, ...]:
    """Return the name of a UNet's bottleneck, or of the middle block of a transformer.

    Raises ValueError for a network with neither.
    """
    if getattr(network, "mid_block", None) is not None:
        return ("mid_block",)
    blocks = getattr(network, "transformer_blocks", ())
    if not len(blocks):
        raise ValueError("f_distill: name the teacher's modules to read, features = [...].")
    return (f"transformer_blocks.{len(blocks) // 2}",)


class Heads(nn.Module):
    """One convolutional head per feature: logits [B, K], positive on real samples."""

    def __init__(self, read: FeatureReader, probe: Probe, seed: int) -> None:
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
