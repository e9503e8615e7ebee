"""Quality of one-step students of the bundled model: part (b) of the f-distill study.

    python -m scripts.study.students measure --data sprites.npz runs/students/*
    python -m scripts.study.students sheet runs/students/js-0 runs/students/rkl-0

`measure` makes the same images (evaluation prompts, image i from seed i) with each run's student,
the network that they began as, the bundled student, and the teacher at 1, 2, 4 and 20 steps, and
appends to docs/figures/f_distill_students.csv what is not there yet: agreement with the prompt,
Fréchet distance, recall and coverage of real images in classifier features, CPU seconds an image.
`sheet` draws docs/figures/f_distill_students.png. The table is written into docs/f_distill.md by
`scripts/study/fdistill.py document`.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import sampler
from sampler.bundled import EvaluationPrompt, prompts
from sampler.bundled.classifier import load, reference_statistics
from sampler.bundled.measures import extracted_features, measure
from scripts.bundled.classifier_task import composite_features
from scripts.bundled.distill_student import SCALE, SEED
from scripts.bundled.emoji_data import EmojiData
from scripts.site.readme_grid import grid

FIGURES = Path(__file__).resolve().parents[2] / "docs" / "figures"
CSV = FIGURES / "f_distill_students.csv"
CFG: dict[str, Any] = {"guidance": {"name": "cfg", "scale": SCALE}, "sampler": "ddim"}
BEGIN = "bundled-lcm, 1 step"
SHIPPED = "bundled-student"
TEACHER = "teacher, 20 steps"

app = typer.Typer(add_completion=False)
Runs = Annotated[list[Path], typer.Argument(help="Run folders of distill_student.py.")]


def cases(runs: list[Path]) -> Iterator[tuple[str, dict[str, Any], Any, dict[str, Any]]]:
    """Yield (name, metadata, engine, options of `generate`)."""
    for run in runs:
        engine = sampler.load(student=run)
        known: Any = engine.pipeline.student
        about = {"f": known["f"], "seed": known["fit"]["seed"], "updates": known["updates"]}
        yield f"{known['f']}, seed {about['seed']}", about, engine, {"steps": known["steps"]}
    lcm = {"steps": 1, "guidance": {"name": "embedded", "scale": SCALE}}
    yield BEGIN, {}, sampler.load("bundled-lcm"), lcm
    shipped = sampler.load(SHIPPED)
    manifest: Any = shipped.pipeline.student
    about = {"f": manifest["f"], "updates": manifest["updates"]}
    yield SHIPPED, about, shipped, {"steps": 1}
    for steps in (1, 2, 4, 20):
        name = f"teacher, {steps} step{'s' * (steps > 1)}"
        yield name, {}, sampler.load(), {"steps": steps, **CFG}


@app.command("measure")
def measure_all(
    runs: Runs,
    data: Annotated[Path, typer.Option(help="sprites.npz, for real images.")],
    count: Annotated[int, typer.Option(help="Images of each.")] = 512,
    out: Path = CSV,
) -> None:
    """Measure missing rows and append them."""
    model, wanted = load(), prompts(count)
    real = composite_features(model, EmojiData(data), count, SEED + 1)
    done = [row["of"] for row in read(out)] if out.is_file() else []
    for name, about, engine, options in cases(runs):
        if name in done:
            continue
        found = measured(model, engine, wanted, real, options)
        row = {"of": name, "f": "", "seed": "", "updates": "", **about, **found}
        print(row, flush=True)
        append(out, row)


def measured(
    model: Any, engine: Any, wanted: list[EvaluationPrompt], real: Tensor, options: dict[str, Any]
) -> dict[str, Any]:
    """The figures of one way of making images. real: features [N, D] of real ones."""
    began = time.process_time()
    made = engine.generate(
        [p.text for p in wanted], seeds=0, batch_size=16, output="tensor", **options
    )
    seconds = (time.process_time() - began) / len(wanted)
    found = measure(model, made.images, wanted, reference_statistics())
    found |= neighbours(real, extracted_features(model, made.images))
    rounded = {k: round(v, 4) for k, v in found.items()}
    return {"rows": round(mean(made.nfe), 2), **rounded, "cpu_seconds": round(seconds, 4)}


def neighbours(real: Tensor, made: Tensor, k: int = 5) -> dict[str, float]:
    """Recall and coverage of features [N, D].

    recall: the share of real ones within the k-th neighbour distance of a made one (Kynkäänniemi et
    al., 2019, arXiv:1904.06991); coverage: the share of real ones with a made one within their own
    k-th neighbour distance (Naeem et al., 2020, arXiv:2002.09797).
    """
    between = torch.cdist(real, made)
    radius_real, radius_made = (torch.cdist(v, v).sort(1).values[:, k] for v in (real, made))
    return {
        "recall": float((between <= radius_made).any(1).float().mean()),
        "coverage": float((between <= radius_real[:, None]).any(1).float().mean()),
    }


@app.command()
def sheet(runs: Runs, columns: int = 16, out: Path = FIGURES / "f_distill_students.png") -> None:
    """Draw the same prompts and seeds, one row for each."""
    chosen = prompts(128)[:: 128 // columns][:columns]
    texts = [p.text for p in chosen]
    rows = {
        name: engine.generate(texts, seeds=0, batch_size=columns, **options).images
        for name, _, engine, options in cases(runs)
    }
    out.write_bytes(grid(rows))


def read(path: Path = CSV) -> list[dict[str, str]]:
    """The rows of the CSV."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, row: dict[str, Any]) -> None:
    """Append one row, with a header if the file is new."""
    new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def table() -> str:
    """Students by divergence with the spread over seeds, then the baselines."""
    rows = read()
    heads = ["", "NFE", "concept", "background", "Fréchet", "recall", "coverage", "CPU ms"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    students = [row for row in rows if row["seed"]]
    for f in dict.fromkeys(row["f"] for row in students):
        lines.append(_line(f"`{f}`", [row for row in students if row["f"] == f]))
    lines += [_line(row["of"], [row]) for row in rows if not row["seed"]]
    return "\n".join(lines) + "\n"


def _line(name: str, rows: list[dict[str, str]]) -> str:
    """Means, with (least to most) where there are several runs."""
    formats = {"rows": ".0f", "concept": ".3f", "background": ".3f"}
    formats |= {"frechet_distance": ".2f", "recall": ".3f", "coverage": ".3f"}
    cells = [name if len(rows) == 1 else f"{name}, {len(rows)} seeds"]
    for key, form in formats.items():
        values = [float(row[key]) for row in rows]
        text = format(mean(values), form)
        spread = f" ({format(min(values), form)} to {format(max(values), form)})"
        cells.append(text + spread * (len(values) > 1 and key not in ("rows", "background")))
    cells.append(f"{1000 * mean(float(row['cpu_seconds']) for row in rows):.1f}")
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    torch.set_num_threads(1)
    app()
