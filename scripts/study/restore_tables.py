"""The tables of restoring.md, from the studies' files."""

from __future__ import annotations

from scripts.study.markdown import Row, Table, grid

ORDER = ("pseudo-inverse", "dps", "reddiff", "difface", "data", "daps", "admm", "vble")


def inverse(measure: str, digits: int) -> Table:
    """A table of one measure with its standard error: a row per operator, a column per method."""

    def table(rows: list[Row]) -> list[str]:
        rows = _compared(rows)
        methods = list(dict.fromkeys(r["method"] for r in rows))
        lines = []
        for task in dict.fromkeys(r["task"] for r in rows):
            mine = {r["method"]: r for r in rows if r["task"] == task}
            best = max(mine.values(), key=lambda r: float(r[measure]))
            cells = []
            for row in (mine.get(m) for m in methods):
                text = row and f"{float(row[measure]):.{digits}f}"
                error = row and f" ± {float(row[measure + '_error']):.{digits}f}"
                cells.append(
                    f"**{text}**{error}" if row is best else f"{text}{error}" if row else "–"
                )
            lines.append((task, *cells))
        return grid(("operator", *methods), lines)

    return table


def settings(rows: list[Row]) -> list[str]:
    """The tuned setting of each method."""
    rows = [r for r in _compared(rows) if r["setting"]]
    methods = list(dict.fromkeys(r["method"] for r in rows))
    found = {(r["task"], r["method"]): r["setting"] for r in rows}
    tasks = dict.fromkeys(r["task"] for r in rows)
    return grid(
        ("operator", *methods), [(t, *(found.get((t, m), "–") for m in methods)) for t in tasks]
    )


def calmed(rows: list[Row]) -> list[str]:
    """Plain RED-Diff beside its decay and its average."""
    with_both = dict.fromkeys(r["task"] for r in rows if _is_calmed(r))
    mine = [r for r in rows if r["task"] in with_both and r["method"].startswith("reddiff")]
    return grid(
        ("operator", "method", "setting", "PSNR / dB", "SSIM"),
        [
            (
                r["task"],
                r["method"],
                r["setting"],
                f"{float(r['psnr']):.2f} ± {float(r['psnr_error']):.2f}",
                f"{float(r['ssim']):.3f} ± {float(r['ssim_error']):.3f}",
            )
            for task in with_both
            for r in mine
            if r["task"] == task
        ],
    )


def ceiling(rows: list[Row]) -> list[str]:
    """The autoencoder alone, on the true images."""
    (row,) = (r for r in rows if r["method"] == "autoencoder")
    return grid(("PSNR / dB", "SSIM"), [(f"{float(row['psnr']):.1f}", f"{float(row['ssim']):.3f}")])


def times(rows: list[Row]) -> list[str]:
    """Seconds per image."""
    return grid(
        ("method", "seconds per image"),
        [(r["method"], f"{float(r['seconds per image']):.3g}") for r in rows],
    )


def _compared(rows: list[Row]) -> list[Row]:
    return [r for r in rows if r["task"] != "none" and not _is_calmed(r)]


def _is_calmed(row: Row) -> bool:
    return row["method"].startswith("reddiff, ")


def methods(rows: list[Row]) -> list[str]:
    """Methods of restoration on the bundled model."""
    names = {"own": "the model's own", "real": "real composites"}
    lines: list[tuple[str, ...]] = []
    for row in sorted(rows, key=lambda r: (r["set"], ORDER.index(r["method"]))):
        covered = "–"
        if row["coverage"]:
            value, half = float(row["coverage"]), 1.96 * float(row["coverage_se"])
            covered = f"{value:.2f} ({value - half:.2f}–{value + half:.2f})"
        errors = [_with_error(row, *of) for of in (("psnr", 1), ("psnr_of_mean", 1), ("misfit", 3))]
        where = f"{row['images']} of {names[row['set']]}"
        lines.append((where, f"`{row['method']}`", *errors, covered))
    head = ("images", "method", "PSNR of a sample / dB", "PSNR of the mean of three / dB",
            "distance to y", "coverage (95 %)")  # fmt: skip
    return grid(head, lines)


def gaussian(rows: list[Row]) -> list[str]:
    """Errors of mean and covariance in closed form, a column for each noise."""
    noises = list(dict.fromkeys(r["noise"] for r in rows))
    found = {(r["method"], r["noise"]): r for r in rows}
    head = [f"{what}, noise {noise}" for noise in noises for what in ("mean", "covariance")]
    lines = [
        (
            f"`{name}`",
            found[name, noises[0]]["problems"],
            *(
                _with_error(found[name, noise], key, 3)
                for noise in noises
                for key in ("mean_error", "covariance_error")
            ),
        )
        for name in dict.fromkeys(r["method"] for r in rows)
    ]
    return grid(("method", "problems", *head), lines)


def _with_error(row: Row, key: str, digits: int) -> str:
    return f"{float(row[key]):.{digits}f} ± {float(row[f'{key}_se']):.{digits}f}"
