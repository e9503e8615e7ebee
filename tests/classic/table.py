"""A recipe for every classic class that can be built tiny and offline."""

from __future__ import annotations

from tests.classic import cascades, flux, images, motion, stable_diffusion, stable_diffusion_xl, videos, wan
from tests.classic.recipe import Recipe

TINY: dict[str, Recipe] = {
    name: recipe
    for module in (stable_diffusion, stable_diffusion_xl, motion, cascades, flux, images, videos, wan)
    for name, recipe in module.TINY.items()
}

LEFT_OUT: dict[str, str] = {}
