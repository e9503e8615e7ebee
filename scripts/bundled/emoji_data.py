"""Captioned training images from compact sprites: batch i is a pure function of (seed, i).

The sprite file is an ``npz`` with ``sprites`` uint8 [concepts, styles, side, side, 4] (RGBA,
premultiplied alpha), ``names``, ``cats``, ``codepoints`` (one each per concept) and ``styles``;
``scripts/bundled/prepare_emoji.py`` builds it. Tests use the drawn shapes of :func:`draw_sprites`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sampler.rewards.simple import COLOURS

LETTERED = frozenset({"sleeping face", "bus", "taxi", "police car", "ambulance", "book"})
"""Concepts some of whose sprites carry letters; they are not mirrored."""


@dataclass(frozen=True)
class Batch:
    """Images [B, 3, size, size] in [-1, 1], class indices [B], and B captions."""

    images: Tensor
    concept: Tensor
    style: Tensor
    background: Tensor
    captions: list[str]


def generator(*key: int) -> torch.Generator:
    """Return a CPU generator whose stream is a function of the whole key (seed, stage, index)."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


class EmojiData:
    """Sprites with their names, composited on random backgrounds on the fly."""

    def __init__(
        self, path: Path | str, size: int = 64, device: str | torch.device = "cpu"
    ) -> None:
        with np.load(path, allow_pickle=False) as stored:
            sprites = torch.from_numpy(stored["sprites"])
            self.concepts = [str(name) for name in stored["names"]]
            self.styles = [str(name) for name in stored["styles"]]
        self.backgrounds = list(COLOURS)
        self.size = size
        self.sprites = (sprites.permute(0, 1, 4, 2, 3).float() / 255).contiguous().to(device)
        self.colours = torch.tensor(list(COLOURS.values()), device=device) / 255
        self.mirrored = torch.tensor([name not in LETTERED for name in self.concepts])

    def batch(self, count: int, *key: int) -> Batch:
        """Return ``count`` images that depend on the data and the key (seed, index) only."""
        draw = generator(*key)
        sizes = (len(self.concepts), len(self.styles), len(self.backgrounds))
        concept, style, background = (
            torch.randint(size, (count,), generator=draw) for size in sizes
        )
        uniform = torch.rand(count, 7, generator=draw)
        jitter = 0.05 * torch.randn(count, 3, generator=draw)
        words = torch.rand(count, 5, generator=draw).tolist()
        canvas = self._canvas(background, uniform, jitter)
        sprite = self._placed(concept, style, uniform)
        images = sprite[:, :3] + canvas * (1 - sprite[:, 3:])
        captions = [
            self.caption(c, s, b, w)
            for c, s, b, w in zip(
                concept.tolist(), style.tolist(), background.tolist(), words, strict=True
            )
        ]
        device = images.device
        concept, style, background = (label.to(device) for label in (concept, style, background))
        return Batch(images.clamp(0, 1) * 2 - 1, concept, style, background, captions)

    def _canvas(self, background: Tensor, uniform: Tensor, jitter: Tensor) -> Tensor:
        """Jittered colour times a linear gradient of random direction and strength 0 to 0.12."""
        device = self.colours.device
        colour = self.colours[background.to(device)] + jitter.to(device)
        axis = torch.linspace(-1, 1, self.size, device=device)
        angle = (2 * torch.pi * uniform[:, 0]).to(device)[:, None, None]
        ramp = torch.cos(angle) * axis[None, None, :] + torch.sin(angle) * axis[None, :, None]
        gradient = 1 + (0.12 * uniform[:, 1]).to(device)[:, None, None] * ramp
        return (colour[:, :, None, None] * gradient[:, None]).clamp(0, 1)

    def _placed(self, concept: Tensor, style: Tensor, uniform: Tensor) -> Tensor:
        """Sprites [B, 4, size, size] after random scale, shift, rotation and mirroring."""
        side = 0.62 + 0.30 * uniform[:, 2]
        shift = (2 * uniform[:, 3:5] - 1) * (0.8 * (1 - side))[:, None]
        angle = 0.17 * (2 * uniform[:, 5] - 1)
        mirror = torch.where((uniform[:, 6] < 0.5) & self.mirrored[concept], -1.0, 1.0)
        cos, sin = torch.cos(angle) / side, torch.sin(angle) / side
        # Output to input coordinates: undo the shift, rotate and scale, then mirror the input's x.
        linear = torch.stack(
            [torch.stack([cos * mirror, sin * mirror], 1), torch.stack([-sin, cos], 1)], 1
        )
        theta = torch.cat([linear, -linear @ shift[:, :, None]], 2)
        device = self.sprites.device
        chosen = self.sprites[concept.to(device), style.to(device)]
        grid = F.affine_grid(
            theta.to(device), [len(concept), 4, self.size, self.size], align_corners=False
        )
        return F.grid_sample(chosen, grid, align_corners=False).clamp(0, 1)

    def caption(self, concept: int, style: int, background: int, words: list[float]) -> str:
        """Return "" (12 %), else "[a ][style ]name[ on a colour background| on colour]"."""
        if words[0] < 0.12:
            return ""
        article = "a " if words[1] < 0.70 else ""
        look = f"{self.styles[style]} " if words[2] < 0.50 else ""
        colour = self.backgrounds[background]
        place = "" if words[3] >= 0.75 else f" on {colour}"
        if place and words[4] < 0.60:
            place = f" on a {colour} background"
        return f"{article}{look}{self.concepts[concept]}{place}"


def _distances(x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    """Signed distance (negative inside) of simple shapes on the square [-1, 1]^2."""
    radius, angle = np.hypot(x, y), np.arctan2(x, -y)
    spike = np.abs((angle * 5 / (2 * np.pi)) % 1 - 0.5) * 2
    lift = 0.25 - y - np.sqrt(np.abs(x)) * 0.75
    return {
        "circle": radius - 0.8,
        "square": np.maximum(np.abs(x), np.abs(y)) - 0.7,
        "triangle": np.maximum(np.abs(x) * 0.87 + (-y) * 0.5, y) - 0.5,
        "star": radius - (0.4 + 0.5 * spike),
        "heart": np.hypot(x, lift) - 0.7,
        "ring": np.abs(radius - 0.6) - 0.2,
        "cross": np.minimum(
            np.maximum(np.abs(x) - 0.8, np.abs(y) - 0.25),
            np.maximum(np.abs(x) - 0.25, np.abs(y) - 0.8),
        ),
        "moon": np.maximum(radius - 0.8, 0.6 - np.hypot(x - 0.4, y)),
    }


_SHADES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "glossy": lambda x, y: 0.75 - 0.25 * y,
    "flat": lambda x, y: np.full_like(x, 0.9),
    "classic": lambda x, y: 0.6 + 0.3 * (np.abs(x) < 0.4),
    "blob": lambda x, y: 0.9 - 0.4 * np.hypot(x, y),
}


def draw_sprites(path: Path | str, side: int = 72) -> Path:
    """Write a sprite file of eight drawn shapes in four shadings, for tests of the trainer."""
    y, x = np.meshgrid(*[np.linspace(-1, 1, side)] * 2, indexing="ij")
    shapes = _distances(x, y)
    colours = np.array(list(COLOURS.values()))[2 : 2 + len(shapes)] / 255
    sprites = np.zeros((len(shapes), len(_SHADES), side, side, 4))
    for row, distance in enumerate(shapes.values()):
        alpha = np.clip(0.5 - distance * side / 2, 0, 1)
        for column, shade in enumerate(_SHADES.values()):
            rgb = colours[row] * shade(x, y)[..., None]
            sprites[row, column] = np.concatenate([rgb, np.ones_like(rgb[..., :1])], -1)
            sprites[row, column] *= alpha[..., None]
    path = Path(path)
    np.savez_compressed(
        path,
        sprites=(np.clip(sprites, 0, 1) * 255).round().astype(np.uint8),
        names=np.array(list(shapes)),
        cats=np.array(["object"] * len(shapes)),
        codepoints=np.array([f"{0x25A0 + i:x}" for i in range(len(shapes))]),
        styles=np.array(list(_SHADES)),
    )
    return path
