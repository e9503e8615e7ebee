"""The points of the guidance study: one rule each, on the bundled model, 20 DDIM steps.

The order is that of importance, so that a study that is cut short has the first ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SCALE = 3.0  # the bundled model's own
CFG: dict[str, Any] = {"name": "cfg", "scale": SCALE}
# The defaults: r of SDXL at 1024², carried over by r/sqrt(n) to this model's 4 x 16 x 16 latents,
# and no momentum (docs/figures/apg_steps.csv).
APG: dict[str, Any] = {"name": "apg", "r_rel": 0.0586, "momentum": 0.0}


@dataclass(frozen=True)
class Point:
    """name: its row in the CSV; study: a, b or c (see docs/guidance_study.md); spec: the rule."""

    name: str
    study: str
    spec: Any


def hold(threshold: float, refresh: int) -> dict[str, Any]:
    return {
        "name": "adaptive",
        "rule": CFG,
        "threshold": threshold,
        "after": "hold",
        "refresh": refresh,
    }


def both(*rules: Any) -> dict[str, Any]:
    return {"name": "sum", "rules": list(rules)}


POINTS = (
    Point("cfg 3", "a", CFG),
    Point("cfg 12", "a", {"name": "cfg", "scale": 12.0}),
    Point("apg 12", "a", {**APG, "scale": 12.0}),
    Point("hold 0.95 /3", "b", hold(0.95, 3)),
    Point("linear_ag", "b", {"name": "linear_ag"}),
    Point("held at the same steps", "b", {"name": "linear_ag", "coefficients": "held"}),
    Point("drop 0.985", "b", {"name": "adaptive", "rule": CFG, "threshold": 0.985}),
    Point("gfcg 2", "c", {"name": "gfcg", "strength": 2.0}),
    Point("hold 0.97 /3", "b", hold(0.97, 3)),
    Point("gfcg 4", "c", {"name": "gfcg", "strength": 4.0}),
    Point("cfg 3, sigma <= 5", "c", {**CFG, "interval": [0.0, 5.0]}),
    Point("drop 0.99", "b", {"name": "adaptive", "rule": CFG, "threshold": 0.99}),
    Point("none", "c", "none"),
    Point("autoguidance 2", "c", {"name": "autoguidance", "scale": 2.0}),
    Point(
        "cfg 2 + autoguidance 1.5",
        "c",
        both({**CFG, "scale": 2.0}, {"name": "autoguidance", "scale": 1.5}),
    ),
    Point("cfg 20", "a", {"name": "cfg", "scale": 20.0}),
    Point("apg 20", "a", {**APG, "scale": 20.0}),
    Point("cfg 2", "a", {"name": "cfg", "scale": 2.0}),
    Point("apg 3", "a", {**APG, "scale": 3.0}),
    Point("cfg 7", "a", {"name": "cfg", "scale": 7.0}),
    Point("apg 7", "a", {**APG, "scale": 7.0}),
    Point(
        "diffusers guider 12",
        "a",
        {
            "name": "apg",
            "scale": 12.0,
            "formulation": "diffusers",
            "space": "native",
            "norm_threshold": 15.0,
            "momentum": 0.0,
            "eta": 1.0,
        },
    ),
    Point("drop 0.97", "b", {"name": "adaptive", "rule": CFG, "threshold": 0.97}),
    Point("hold 0.95 /2", "b", hold(0.95, 2)),
    Point("gfcg weak 2", "c", {"name": "gfcg", "strength": 2.0, "network": "weak"}),
    Point("gfcg 2 + cfg 2", "c", both({"name": "gfcg", "strength": 2.0}, {**CFG, "scale": 2.0})),
    Point("apg 12, momentum -0.5", "a", {**APG, "scale": 12.0, "momentum": -0.5}),
    Point("classifier 1", "c", {"name": "classifier", "strength": 1.0}),
)
