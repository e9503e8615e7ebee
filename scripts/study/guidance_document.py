"""Pages on guidance from templates and the CSV files of the study: no number typed by hand."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import sampler
from scripts.study.cads import table as cads_table
from scripts.study.nag import table as nag_table
from scripts.study.trials import table as trials_table

PAGES = ("guidance.md", "guidance_study.md")
Row = Mapping[str, Any]


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV, numbers as numbers."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{k: _number(v) for k, v in row.items()} for row in csv.DictReader(file)]


def write_documents(docs: Path, folder: Path) -> None:
    """The pages in docs/ from the templates beside this file and the CSVs of a figures folder."""
    measured = read(folder / "guidance_study.csv")
    rows = {row["point"]: row for row in measured}
    overhead = read(folder / "guidance_overhead.csv")
    real = read(folder / "guidance_real.csv")[0]
    tables = {f"table_{study}": _table(measured, study) for study in "abc"}
    filled = {
        **tables,
        "table_trials": "\n".join(trials_table(read(folder / "trials.csv"))),
        "table_cads": "\n".join(cads_table(read(folder / "cads.csv"))),
        "table_nag": "\n".join(nag_table(read(folder / "nag.csv"))),
        "table_apg_steps": _apg_steps(read(folder / "apg_steps.csv")),
        "rules": _rules(),
        "targets": _targets(rows, overhead, real),
        "overhead": _overhead(overhead),
        "images": str(min(row["images"] for row in measured)),
        "model": measured[0]["model"],
        "machine": overhead[0]["machine"],
        "real_saturation": f"{real['saturation']:.3f}",
        "real_clipped": f"{100 * real['clipped']:.1f} %",
    }
    for page in PAGES:
        text = Path(__file__).with_name(page).read_text(encoding="utf-8")
        for key, value in filled.items():
            text = text.replace(f"@{key}@", value)
        (docs / page).write_text(text, encoding="utf-8")


def _table(rows: list[dict[str, Any]], study: str) -> str:
    lines = [
        "| rule | images | NFE | accuracy | Fréchet | SSIM to CFG 3 | saturation | clipped |",
        "|---|---|---|---|---|---|---|---|",
    ]
    extra = {"b": ("cfg 3", "none"), "c": ("cfg 3",)}.get(study, ())
    for row in rows:
        if row["study"] == study or row["point"] in extra:
            cells = [
                f"{row[k]:.{d}f} ({row[f'{k}_low']:.{d}f}–{row[f'{k}_high']:.{d}f})"
                for k, d in (("accuracy", 3), ("frechet", 1), ("ssim", 3), ("saturation", 3))
            ]
            lines.append(
                f"| {row['point']} | {row['images']} | {row['rows']:.1f} | {' | '.join(cells)} | "
                f"{100 * row['clipped']:.1f} % |"
            )
    return "\n".join(lines)


def _apg_steps(rows: list[dict[str, Any]]) -> str:
    """Clipped share by sampler, scale and rule; a column for each number of steps."""
    shares = {(r["sampler"], r["scale"], r["rule"], r["steps"]): r["clipped"] for r in rows}
    steps = sorted({row["steps"] for row in rows})
    lines = [
        f"| sampler, scale | rule | {' | '.join(f'{n} steps' for n in steps)} |",
        "|---|---" + "|---" * len(steps) + "|",
    ]
    for method, scale, rule in dict.fromkeys(key[:3] for key in sorted(shares)):
        cells = [f"{100 * shares[method, scale, rule, n]:.1f} %" for n in steps]
        lines.append(f"| {method}, {scale:g} | {rule} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _rules() -> str:
    lines = ["| rule | what it does | reference |", "|---|---|---|"]
    for name in sorted(sampler.names("guidance")):
        told = sampler.describe("guidance", name)
        lines.append(f"| `{name}` | {told['summary']} | {told['reference'] or '–'} |")
    return "\n".join(lines)


def _overhead(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| rule | rule ms per step | network ms per step | share |",
        "|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['rule']} | {row['rule_ms']:.2f} | {row['network_ms']:.1f} | "
            f"{100 * row['rule_ms'] / row['network_ms']:.1f} % |"
        )
    return "\n".join(lines)


def _targets(rows: Mapping[str, Row], overhead: list[dict[str, Any]], real: Row) -> str:
    """Table of the study's targets and results."""
    lines = ["| aim | reached | found |", "|---|---|---|"]
    checks = [*_saving(rows), *_quality(rows, real["saturation"])]
    slow = max(row["rule_ms"] / row["network_ms"] for row in overhead)
    checks.append(("arithmetic of a rule ≤ 3 % of the network", slow <= 0.03, f"≤ {slow:.1%}"))
    own = next(row for row in overhead if row["rule"].startswith("forecast"))
    share = own["rule_ms"] / own["network_ms"]
    checks.append(("arithmetic of forecast ≤ 1 % of the network", share <= 0.01, f"{share:.2%}"))
    for aim, reached, found in checks:
        lines.append(f"| {aim} | {'yes' if reached else '**no**'} | {found} |")
    return "\n".join(lines)


def _saving(rows: Mapping[str, Row]) -> Iterator[tuple[str, bool, str]]:
    """Adaptive guidance and LinearAG against full CFG."""
    full = rows["cfg 3"]
    bars = {
        "drop 0.985": ("adaptive, drop", 0.75, 0.0, True),
        "drop 0.99": ("adaptive, drop, higher threshold", 0.75, 0.0, True),
        "hold 0.95 /3": ("adaptive, hold", 0.73, 0.96, False),
        "hold 0.97 /3": ("adaptive, hold, higher threshold", 0.75, 0.96, True),
        "linear_ag": ("LinearAG", 0.70, 0.96, True),
    }
    for name, (label, most, ssim, accurate) in bars.items():
        row = rows[name]
        share = row["rows"] / full["rows"]
        close = row["accuracy"] >= full["accuracy"] - 0.01
        reached = share <= most and row["ssim"] >= ssim and (close or not accurate)
        aim = f"{label}: ≤ {most:.2f} of the evaluations"
        aim += f", SSIM ≥ {ssim}" if ssim else ""
        aim += ", accuracy within 1 point" if accurate else ""
        found = (
            f"{share:.3f} of the evaluations, SSIM {row['ssim']:.3f}, "
            f"accuracy {row['accuracy']:.3f} (full CFG {full['accuracy']:.3f})"
        )
        yield aim, reached, found
    fitted, held = rows["linear_ag"], rows["held at the same steps"]
    yield (
        "LinearAG beats holding at the same steps",
        fitted["ssim"] > held["ssim"],
        f"SSIM {fitted['ssim']:.3f} against {held['ssim']:.3f}, accuracy "
        f"{fitted['accuracy']:.3f} against {held['accuracy']:.3f}",
    )


def _quality(rows: Mapping[str, Row], real: float) -> Iterator[tuple[str, bool, str]]:
    """APG and GFCG against CFG."""
    for scale in (12, 20):
        apg, cfg = rows[f"apg {scale}"], rows[f"cfg {scale}"]
        nearer = abs(apg["saturation"] - real) < abs(cfg["saturation"] - real)
        better = apg["frechet"] < cfg["frechet"] and apg["accuracy"] > cfg["accuracy"]
        yield (
            f"APG at scale {scale} better than CFG in Fréchet distance, accuracy, saturation",
            better and nearer,
            f"{apg['frechet']:.1f} against {cfg['frechet']:.1f}, {apg['accuracy']:.3f} against "
            f"{cfg['accuracy']:.3f}, {apg['saturation']:.3f} against {cfg['saturation']:.3f} "
            f"(real {real:.3f})",
        )
    cfg = rows["cfg 3, sigma <= 5"]
    for strength in (2, 4):
        gfcg = rows[f"gfcg {strength}"]
        yield (
            f"GFCG, strength {strength}: higher accuracy than CFG at equal NFE",
            gfcg["accuracy"] > cfg["accuracy"] and gfcg["rows"] <= cfg["rows"] + 0.05,
            f"{gfcg['accuracy']:.3f} at {gfcg['rows']:.1f} NFE against {cfg['accuracy']:.3f} at "
            f"{cfg['rows']:.1f} (CFG in the same interval)",
        )


def _number(text: str) -> Any:
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        return text
