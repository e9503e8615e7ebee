"""The report under the images: what each side cost, beside the stock pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from sampler.ui.pictures import seconds
from sampler.ui.stock import StockRun
from sampler.ui.studio import FinishedRun

HEAD = ("", "images", "NFE per image", "NFE in all", "per image", "in all", "SSIM to stock")


def report(runs: Mapping[str, FinishedRun], stock: StockRun | None) -> str:
    """Markdown table of the sides of a run by name, their drafts, and the stock pipeline."""
    rows: list[Sequence[str]] = []
    for side, run in runs.items():
        if run.drafts is not None:
            records = run.drafts.records
            rows.append(_row(f"{side}, drafts", _nfe(records), run.drafts.seconds, ""))
        same = [] if stock is None else stock.similarity(run.records, run.folder)
        ssim = f"{fmean(same):.3f}" if same else ""
        rows.append(_row(side, _nfe(run.records), run.seconds, ssim))
    if stock is not None:
        name = f"stock: {stock.scheduler}, CFG {stock.scale:g}"
        rows.append(_row(name, stock.nfe, stock.seconds, ""))
    if not any(len(row) for row in rows):
        return ""
    kept = HEAD if stock is not None else HEAD[:-1]
    lines = [kept, ["---"] + ["---:"] * (len(kept) - 1), *(row[: len(kept)] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _nfe(records: Sequence[Mapping[str, Any]]) -> list[int]:
    return [record["nfe"] for record in records if record["nfe"] is not None]


def _row(name: str, nfe: Sequence[int], each: float, ssim: str) -> Sequence[str]:
    """Cells of one row; each: seconds per image."""
    mean = f"{fmean(nfe):.4g}" if nfe else ""
    return name, str(len(nfe)), mean, str(sum(nfe)), seconds(each), seconds(each * len(nfe)), ssim
