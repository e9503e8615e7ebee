"""A recipe for every classic class that can be built tiny and offline."""

from __future__ import annotations

from tests.classic import (
    alt,
    audio,
    cascades,
    edits,
    flux,
    glm,
    hunyuan,
    images,
    kandinsky5,
    kandinsky6,
    ltx2,
    motion,
    newer,
    older,
    qwen,
    stable_diffusion,
    stable_diffusion_xl,
    videos,
    wan,
)
from tests.classic.left_out import LEFT_OUT
from tests.classic.recipe import Recipe

TINY: dict[str, Recipe] = {
    name: recipe
    for module in (
        alt,
        audio,
        stable_diffusion,
        stable_diffusion_xl,
        motion,
        newer,
        older,
        qwen,
        cascades,
        edits,
        flux,
        glm,
        hunyuan,
        images,
        kandinsky5,
        kandinsky6,
        ltx2,
        videos,
        wan,
    )
    for name, recipe in module.TINY.items()
}


__all__ = ["LEFT_OUT", "TINY"]
