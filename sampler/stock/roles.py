"""Roles of the branches of a formula, by its weights; see docs/howto/stock_pipelines.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sampler.stock.forms import Form, Role, Unsolved

# Roles of three blocks where the coefficients do not tell, by a part of the class name.
THREE: dict[str, tuple[Role, Role, Role]] = {
    "PAG": ("uncond", "cond", "extra"),
    "Pix2Pix": ("cond", "uncond", "extra"),
    "DreamLite": ("extra", "uncond", "cond"),
    "SAG": ("uncond", "cond", "extra"),
}
ON_UNCOND = ("Pix2Pix", "SAG")  # whose extra term weighs uncond and the third branch, not cond
SLACK = 100  # of sums of weights, times the bar of residuals


def sums_to_one(weights: Sequence[float], bar: float) -> bool:
    """Return True where weights sum to 1 or −1."""
    return abs(abs(sum(weights)) - 1) <= SLACK * bar


def named(form: Form, bar: float, name: str) -> Form:
    """Sign and roles of a formula that fits; name: of the pipeline class.

    Raises Unsolved for weights that do not sum to 1 or −1, and for an order that is not known.
    """
    total, slack = sum(form.weights), SLACK * bar
    if not sums_to_one(form.weights, bar):
        raise Unsolved(
            f"the weights of its branches sum to {total:.4g} instead of 1, so it rescales the "
            "guided output; switch that off (guidance_rescale=0) and set 'rescale' or "
            "'match_norm' in the rule"
        )
    sign = 1.0 if total > 0 else -1.0
    weights = tuple(w / total for w in form.weights)
    try:
        roles = roles_of(weights, form.settled, slack, name)
    except Unsolved:
        used = tuple(w for w in weights if w)
        if len(used) == len(weights):
            raise
        found = iter(roles_of(used, True, slack, name))
        roles = tuple(next(found) if w else "idle" for w in weights)
    on_uncond = "extra" in roles and any(part in name for part in ON_UNCOND)
    return replace(form, weights=weights, sign=sign, roles=roles, on_uncond=on_uncond)


def roles_of(
    weights: tuple[float, ...], settled: bool, slack: float, name: str
) -> tuple[Role, ...]:
    """Roles of branches whose weights sum to 1.

    settled: False where branches are equal. Raises Unsolved for weights that are no guidance.
    """
    if len(weights) == 1:
        return ("cond",)
    if len(weights) == 2:
        if not settled:
            return ("uncond", "cond")
        first = weights[0] > weights[1]
        if max(weights) < 1 - slack:
            raise Unsolved(
                f"it weighs its two branches by {weights[0]:.3g} and {weights[1]:.3g}, which is a "
                "guidance scale below 1; give it one above 1"
            )
        if "PAG" in name:
            raise Unsolved(
                "it has no unconditional branch, only a perturbed one; call it with "
                "guidance_scale > 1"
            )
        return ("cond", "uncond") if first else ("uncond", "cond")
    if len(weights) == 3:
        for part, roles in THREE.items():
            if part in name:
                return roles
    raise Unsolved(
        f"it has {len(weights)} branches, weighed by "
        f"{', '.join(f'{w:.3g}' for w in weights)}, and which one is unconditional is not known "
        "for this class"
    )
