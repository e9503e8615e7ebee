"""Start-up times of the command line against what they are built on, in interleaved pairs.

    python -m scripts.bench.startup [--pairs 15] [--images 5]   writes docs/figures/startup.csv

The commands that need no model are compared with `python -c "import typer, rich, pydantic"`, and so
is a program of typer with one option, which no command can be faster than; the import of the
package with a bare interpreter, and the first image from a fresh shell with the shortest diffusers
script that makes the same one. CPU seconds (user and system) of the process and its children, which
other programs on the machine disturb least, and wall time.
"""

from __future__ import annotations

import argparse
import csv
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # compiled modules are kept, as for a user
ROOT = Path(__file__).resolve().parents[2]
FIGURE = ROOT / "docs" / "figures" / "startup.csv"
PYTHON = sys.executable
LIBRARIES = [PYTHON, "-c", "import typer, rich, pydantic"]
ONE_OPTION = """
import typer

app = typer.Typer()


@app.command()
def command(steps: int = 1) -> None:
    print(steps)


app()
"""
STOCK = """
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from sampler.bundled import FOLDER

pipe = StableDiffusionPipeline.from_pretrained(FOLDER / "pipeline", dtype=torch.float32)
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
pipe("a fox", num_inference_steps=10, guidance_scale=3, generator=generator).images[0].save("x.png")
"""


def commands(folder: Path) -> dict[str, tuple[list[str], list[str], str]]:
    """Ours, the yardstick and its name, by the words of the command line."""
    ours = [PYTHON, "-m", "sampler"]
    configuration = str(ROOT / "configs" / "demo.yaml")
    libraries = "import typer, rich, pydantic"
    light = {
        "sampler --help": ["--help"],
        "sampler list samplers": ["list", "samplers"],
        "sampler validate demo.yaml": ["validate", configuration],
        "sampler generate -c demo.yaml --dry-run": ["generate", "-c", configuration, "--dry-run"],
    }
    image = ["generate", "a fox", "--steps", "10", "--scale", "3", "--seed", "0"]
    return {name: ([*ours, *words], LIBRARIES, libraries) for name, words in light.items()} | {
        "one option of typer": ([PYTHON, "-c", ONE_OPTION], LIBRARIES, libraries),
        "import sampler": ([PYTHON, "-c", "import sampler"], [PYTHON, "-c", "pass"], "python"),
        "sampler generate 'a fox' --steps 10": (
            [*ours, *image, "-o", str(folder / "runs")],
            [PYTHON, "-c", STOCK],
            "diffusers script",
        ),
    }


def seconds(command: list[str], folder: Path) -> tuple[float, float]:
    """Wall and CPU seconds of one run, which must succeed, in an empty folder."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder) as empty:
        made = [word.replace(str(folder / "runs"), empty) for word in command]
        subprocess.run(made, check=True, capture_output=True, cwd=empty)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Prints and writes medians in milliseconds, and the median of the ratios within the pairs."""
    from scripts.bench.overhead import machine

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--images", type=int, default=5, help="pairs of the first image (5)")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for words, (ours, other, against) in commands(folder).items():
            pairs = options.images if "generate 'a" in words else options.pairs
            for command in (ours, other):  # bytecode and file caches
                seconds(command, folder)
            runs = [(seconds(ours, folder), seconds(other, folder)) for _ in range(pairs)]
            row: dict[str, Any] = {"command": words, "against": against, "pairs": pairs}
            for i, kind in enumerate(("wall", "cpu")):
                row[f"{kind}_ms"] = round(1000 * median(a[i] for a, _ in runs))
                row[f"{kind}_ms_against"] = round(1000 * median(b[i] for _, b in runs))
                row[f"{kind}_ratio"] = round(median(a[i] / b[i] for a, b in runs), 2)
            rows.append({**row, **machine()})
            print(list(rows[-1].values())[:9], flush=True)
    with FIGURE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
