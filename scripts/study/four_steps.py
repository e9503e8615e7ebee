"""Students of four steps of the bundled model: two trajectories, two forms, and a longer training.

    python -m scripts.study.four_steps train --out runs/four_steps       # goes on where it stopped
    python -m scripts.study.four_steps collect --out runs/four_steps
    python -m scripts.study.four_steps document

`train` distils every case by reverse KL without a discriminator, for UPDATES updates (half of them
the student's) and then up to LONGER times as many. Every UPDATES the student's average makes images
of 64 prompts that are not trained on; the judge, a classifier that is used in no training, names
their concepts. The log holds the same scores of the teacher's images at 20 steps, prompt by prompt.
`collect` writes docs/figures/f_distill_four_steps.csv, `document` the table in docs/f_distill.md.
"""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import torch
import typer

import sampler
from sampler.bundled import prompts
from scripts.bundled.networks import plain_attention

ROOT = Path(__file__).resolve().parents[2]
CSV = ROOT / "docs" / "figures" / "f_distill_four_steps.csv"
PAGE = ROOT / "docs" / "f_distill.md"
UPDATES, LONGER, HELD = 80, 5, 64
TIMES = [999, 749, 499, 249]
OWN: dict[str, Any] = {"trajectory": "own", "separate": True, "huber": 1e-3}
LORA = {"student": "lora", "fake": "lora"}
CASES: dict[str, dict[str, Any]] = {
    "own-full-cfg": OWN,
    "own-full-apg": OWN,
    "own-lora-cfg": {**OWN, **LORA},
    "renoised-full-cfg": {},
    "renoised-lora-cfg": LORA,
}
BARS = {"concept": 0.95, "saturation": 0.05}

app = typer.Typer(add_completion=False)
Out = Annotated[Path, typer.Option(help="Folder of the runs.")]


@app.command()
def train(
    out: Out = Path("runs/four_steps"),
    case: Annotated[list[str] | None, typer.Option(help="Cases; all by default.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds; 0 by default.")] = None,
    longer: int = LONGER,
) -> None:
    """Train the cases; a run that is there already goes on, or is left alone where it is done."""
    texts = [p.text for p in prompts(512)]
    held = list(dict.fromkeys(texts))[::7][:HELD]
    trained = [text for text in dict.fromkeys(texts) if text not in held]
    for name in case or CASES:
        for number in seed or [0]:
            engine = sampler.load()
            plain_attention(engine.pipeline.network)
            sampler.finetune(
                engine,
                trainer_of(name),
                None,
                trained,
                out / f"{name}-{number}",
                longer * UPDATES,
                settings=settings_of(name, number, held),
                progress=lambda record: print(json.dumps(record)[:200], flush=True),
            )


def trainer_of(case: str) -> dict[str, Any]:
    """The trainer of a case."""
    common = {"name": "f_distill", "divergence": "rkl", "gan_weight": 0.0, "timesteps": TIMES}
    return {**common, "student_every": 2, "ema": 0.95, **CASES[case]}


def settings_of(case: str, seed: int, held: list[str]) -> dict[str, Any]:
    """The settings of a run; held: prompts of its evaluations."""
    return {
        "batch": 8,
        "seed": seed,
        "steps": 20,
        "sampler": "ddim",
        "guidance": {"name": case.rpartition("-")[2], "scale": 3.0},
        "lr": 5e-4 if "lora" in case else 1e-4,
        "rank": 16,
        "alpha": 16,
        "betas": [0.0, 0.95],
        "checkpoint_every": 20,
        "eval_every": UPDATES,
        "eval_prompts": held,
        "evals": ["judge", "saturation"],
    }


@app.command()
def collect(out: Out = Path("runs/four_steps"), to: Path = CSV) -> None:
    """Write the evaluations of all runs as a table; rows of runs that are not in `out` stay."""
    known = {path.parent.name for path in out.glob("*/log.jsonl")}
    rows: list[dict[str, Any]] = [
        row for row in _read(to) if f"{row['of']}-{row['seed']}" not in known
    ]
    for path in sorted(out.glob("*/log.jsonl")):
        case, _, seed = path.parent.name.rpartition("-")
        log, spent = [json.loads(line) for line in path.read_text().splitlines()], 0.0
        for record in log:
            spent += record.get("cpu_seconds", 0.0)
            if record["kind"] != "eval":
                continue
            scores = {
                f"{who}_{name}": round(mean(record[key][column]), 4)
                for name, column in (("concept", "judge.concept"), ("saturation", "saturation"))
                for who, key in (("student", "evals"), ("teacher", "base_evals"))
            }
            about = {"of": case, "seed": seed, "update": record["update"]}
            rows.append({**about, **scores, "cpu_seconds": round(spent, 1)})
    rows.sort(key=lambda row: (list(CASES).index(row["of"]), int(row["seed"]), int(row["update"])))
    with to.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _read(path: Path) -> list[dict[str, str]]:
    """The rows of a table, none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table(path: Path = CSV) -> str:
    """A line per case and seed: after UPDATES and after the longest training."""
    rows = _read(path)
    heads = ["student", "updates", "concept", "of the teacher's"]
    heads += ["saturation", "over the teacher's", "drift", "bars"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for case, seed in dict.fromkeys((row["of"], row["seed"]) for row in rows):
        found = [row for row in rows if (row["of"], row["seed"]) == (case, seed)]
        first = next(row for row in found if int(row["update"]) == UPDATES)
        for row in [found[0], first, *(found[-1:] if found[-1] is not first else [])]:
            lines.append("| " + " | ".join(_cells(row, first)) + " |")
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, str], first: dict[str, str]) -> list[str]:
    """One line; first: the row after UPDATES, which the drift of saturation is measured from."""
    value = {k: float(v) for k, v in row.items() if k.startswith(("student", "teacher"))}
    share = value["student_concept"] / value["teacher_concept"]
    over = value["student_saturation"] / value["teacher_saturation"] - 1
    drift = value["student_saturation"] / float(first["student_saturation"]) - 1
    update = int(row["update"])
    bars = f"accuracy {_met(share >= BARS['concept'])}" if update else ""
    if update > UPDATES and "apg" in row["of"]:
        bars += f", drift {_met(drift <= BARS['saturation'])}"
    return [
        f"`{row['of']}`, seed {row['seed']}",
        str(update),
        f"{value['student_concept']:.3f}",
        f"{share:.3f}",
        f"{value['student_saturation']:.3f}",
        f"{over:+.1%}",
        f"{drift:+.1%}" if update > UPDATES else "",
        bars,
    ]


def _met(met: bool) -> str:
    return "met" if met else "missed"


SECTION = f"""## Students of four steps of the bundled model

Reverse KL without a discriminator, {UPDATES} updates and up to {LONGER} times as many, against the
teacher at 20 steps of the same rule at scale 3, on {HELD} prompts that were not trained on. *drift*
is the change of saturation since {UPDATES} updates; the bars are {BARS["concept"]:.0%} of the
teacher's accuracy, and a drift of at most {BARS["saturation"]:.0%} with `apg`.

<!-- four steps -->
<!-- end -->

`python -m scripts.study.four_steps train`, `collect` and `document`.

"""


@app.command()
def document() -> None:
    """Put the table in its place on the page, with a section around it the first time."""
    text, before = PAGE.read_text(encoding="utf-8"), "## What it costs\n"
    if SECTION.partition("\n")[0] not in text:
        text = text.replace(before, SECTION + before)
    marks = re.compile(r"(<!-- four steps -->\n).*?(<!-- end -->)", re.S)
    PAGE.write_text(marks.sub(lambda m: m[1] + table() + m[2], text), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    app()
