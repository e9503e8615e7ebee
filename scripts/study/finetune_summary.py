"""Sample efficiency, time and over-optimisation, from the tables of `study/finetune.py`.

Per reward and seed, where DDPO ended is the mark:

    images, CPU seconds and drift at which AlignProp's curve crosses DDPO's final reward
    CPU seconds at which RLCM has gained over its own start what DDPO gained over its own

The crossing is interpolated linearly between two evaluations; empty where it is never reached, and
where DDPO has gained nothing, so that there is nothing to reach. The Fréchet distances at equal
reward come from the sweep of adapter weights, seed 0.
"""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]
FIELDS = (
    "reward", "seed", "ddpo_gain", "ddpo_images", "ddpo_cpu_seconds", "ddpo_drift",
    "alignprop_images", "alignprop_cpu_seconds", "alignprop_drift", "rlcm_cpu_seconds",
    "images_share", "cpu_share_alignprop", "cpu_share_rlcm", "ddpo_frechet", "alignprop_frechet",
)  # fmt: skip


def summary(curves: list[Row], mix: list[Row]) -> list[Row]:
    """One line per reward and seed that DDPO has finished."""
    found = []
    for reward in dict.fromkeys(r["reward"] for r in curves):
        for seed in sorted({r["seed"] for r in curves if r["reward"] == reward}):
            lines = {
                name: [
                    r
                    for r in curves
                    if (r["reward"], r["trainer"], r["seed"]) == (reward, name, seed)
                ]
                for name in ("alignprop", "ddpo", "rlcm")
            }
            if all(len(line) > 1 for line in lines.values()):
                found.append({"reward": reward, "seed": seed, **_compared(lines)})
        if found and found[-1]["reward"] == reward:
            first = next(row for row in found if row["reward"] == reward)
            first |= _frechet([r for r in mix if r["reward"] == reward])
    return found


def crossing(xs: list[float], ys: list[float], mark: float) -> float | None:
    """Return the x at which ys first reaches the mark; None if it never does."""
    if ys[0] >= mark:
        return xs[0]
    for i in range(1, len(xs)):
        if ys[i] >= mark:
            return xs[i - 1] + (xs[i] - xs[i - 1]) * (mark - ys[i - 1]) / (ys[i] - ys[i - 1])
    return None


def _compared(lines: dict[str, list[Row]]) -> Row:
    def column(name: str, key: str) -> list[float]:
        return [float(row[key]) for row in lines[name]]

    values = column("ddpo", "value")
    mark, gain = values[-1], values[-1] - values[0]
    images, spent = column("ddpo", "images")[-1], column("ddpo", "cpu_seconds")[-1]
    row: Row = {"ddpo_gain": gain, "ddpo_images": images, "ddpo_cpu_seconds": spent}
    row["ddpo_drift"] = column("ddpo", "drift")[-1]
    if gain <= 0:
        return row
    for key in ("images", "cpu_seconds", "drift"):
        row[f"alignprop_{key}"] = crossing(
            column("alignprop", key), column("alignprop", "value"), mark
        )
    gained = [value - column("rlcm", "value")[0] for value in column("rlcm", "value")]
    row["rlcm_cpu_seconds"] = crossing(column("rlcm", "cpu_seconds"), gained, gain)
    for name, part, whole in (
        ("images_share", row["alignprop_images"], images),
        ("cpu_share_alignprop", row["alignprop_cpu_seconds"], spent),
        ("cpu_share_rlcm", row["rlcm_cpu_seconds"], spent),
    ):
        row[name] = None if part is None else part / whole
    return row


def _frechet(mix: list[Row]) -> Row:
    """Fréchet distances where the sweeps of DDPO (weight 1) and AlignProp have equal reward."""
    ddpo = [r for r in mix if r["trainer"] == "ddpo"]
    ours = [r for r in mix if r["trainer"] == "alignprop"]
    if not ddpo or not ours:
        return {}
    values, distances = ([float(r[k]) for r in ours] for k in ("value", "frechet"))
    mark = float(ddpo[-1]["value"])
    return {
        "ddpo_frechet": float(ddpo[-1]["frechet"]),
        "alignprop_frechet": crossing(distances, values, mark),
    }
