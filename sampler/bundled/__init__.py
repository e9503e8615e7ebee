"""The bundled demo model: its files, vocabulary and evaluation prompts.

This module imports neither torch nor diffusers, so that `--help` and `list` stay fast.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
"""The folder that holds `pipeline/`, `weak/`, `classifier/` and the reference statistics."""

BUNDLED, BUNDLED_LCM, BUNDLED_STUDENT = "bundled", "bundled-lcm", "bundled-student"
BUNDLED_FLOW = "bundled-flow"  # the bundled model on the levels of flow matching
BUNDLED_SD3 = "bundled-sd3"  # a small Stable Diffusion 3 of the same images
BUNDLED_PARTS = {
    BUNDLED: ("pipeline", "weak", "classifier"),
    BUNDLED_FLOW: ("pipeline", "weak", "classifier"),
    BUNDLED_SD3: ("sd3", "classifier"),
    BUNDLED_LCM: ("pipeline", "lcm", "classifier"),
    BUNDLED_STUDENT: ("pipeline", "student", "classifier"),
}
"""Names of the bundled models, and the folders with their networks and those of their rules.

The first folder is a pipeline in the diffusers layout.
"""

BUNDLED_SCALE = 3.0
"""Scale of best prompt accuracy and Fréchet distance in the model card."""

_BACKGROUND_STRIDE = 5
"""Coprime with the 12 colours: consecutive prompts differ in background as well."""


def bundled_folder(name: str | None) -> Path:
    """The pipeline folder of a bundled model; None is the default one."""
    return FOLDER / BUNDLED_PARTS[name or BUNDLED][0]


@dataclass(frozen=True)
class EvaluationPrompt:
    """One caption with the class indices that a correct picture of it has."""

    text: str
    concept: int
    background: int
    style: int | None = None


@cache
def _vocabulary(folder: Path) -> dict[str, tuple[str, ...]]:
    config = json.loads((folder / "classifier" / "config.json").read_text(encoding="utf-8"))
    return {key: tuple(config[key]) for key in ("concepts", "styles", "backgrounds")}


def concepts(folder: Path = FOLDER) -> tuple[str, ...]:
    """The 128 concept names; the position is the class index of the classifier's concept head."""
    return _vocabulary(folder)["concepts"]


def styles(folder: Path = FOLDER) -> tuple[str, ...]:
    """The drawing styles (glossy, flat, classic, blob) in class order."""
    return _vocabulary(folder)["styles"]


def backgrounds(folder: Path = FOLDER) -> tuple[str, ...]:
    """The 12 background colour names in class order."""
    return _vocabulary(folder)["backgrounds"]


def prompts(
    count: int, start: int = 0, styled: bool = False, folder: Path = FOLDER
) -> list[EvaluationPrompt]:
    """The prompts "a {concept} on a {background} background" number start, start + 1, ...

    Prompt i has concept i mod 128; its background moves on by five colours per prompt and by one
    more per pass through the concepts, so 12 passes pair every concept with every colour.

    count: how many. styled: the prompt also names a style ("a glossy dog on ..."), i mod 4, moving
    on by one per pass. folder: of another bundle than the shipped one.
    """
    names, colours, looks = concepts(folder), backgrounds(folder), styles(folder)
    listed = []
    for i in range(start, start + count):
        concept = i % len(names)
        background = (_BACKGROUND_STRIDE * concept + i // len(names)) % len(colours)
        style = (i + i // len(names)) % len(looks) if styled else None
        look = "" if style is None else f"{looks[style]} "
        text = f"a {look}{names[concept]} on a {colours[background]} background"
        listed.append(EvaluationPrompt(text, concept, background, style))
    return listed
