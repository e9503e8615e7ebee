"""The points of the guidance study: one rule each, on the bundled model, 20 DDIM steps.

The order is that of importance, so that a study that is cut short has the first ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SCALE = 3.0  # the bundled model's own
CFG: dict[str, Any] = {"name": "cfg", "scale": SCALE}
# r of SDXL at 1024², carried over by r/sqrt(n) to this model's 4 x 16 x 16 latents
APG: dict[str, Any] = {"name": "apg", "r_rel": 0.0586}


@dataclass(frozen=True)
class Point:
    """name: its row in the CSV; study: a, b or c (see docs/guidance.md); spec: the rule."""

    name: str
    study: str
    spec: Any


def policy(*steps: int) -> list[int]:
    """A LinearAG policy of 20 steps from the steps whose unconditional pass is evaluated."""
    return [int(t in steps) for t in range(20)]


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


SAME_STEPS = policy(0, 1, 2, 3, 6, 9, 12, 15, 18)

POINTS = (
    Point("cfg 3", "a", CFG),
    Point("cfg 12", "a", {"name": "cfg", "scale": 12.0}),
    Point("apg 12", "a", {**APG, "scale": 12.0}),
    Point("drop 0.99", "b", {"name": "adaptive", "rule": CFG, "threshold": 0.99}),
    Point("hold 0.95 /3", "b", hold(0.95, 3)),
    Point("linear_ag 8", "b", {"name": "linear_ag", "policy": policy(0, 1, 2, 3, 6, 9, 12, 15)}),
    Point("linear_ag 9", "b", {"name": "linear_ag", "policy": SAME_STEPS}),
    Point("none", "c", "none"),
    Point("gfcg 2", "c", {"name": "gfcg", "strength": 2.0}),
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
    Point("classifier 1", "c", {"name": "classifier", "strength": 1.0}),
)
