"""Run the test suite on the lowest version of every dependency that pyproject.toml allows.

    python -m scripts.lowest_versions FOLDER [--torch 2.13.0] [-- pytest options]

Makes a virtual environment in FOLDER with each of the package's dependencies at its lower bound and
the tools of the tests as constraints.txt has them, runs pytest in it and writes
docs/figures/lowest_versions.csv: a row per dependency with its lower bound, the version that was
installed, and the result of the suite. The bounds are those of the installed package, so run
`make install` first. `--torch` is for machines where the lowest torch exists as a
CUDA build alone.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import venv
from datetime import date
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
FIGURE = ROOT / "docs" / "figures" / "lowest_versions.csv"
# Tools of the suite that are no dependency of the package; tests of other extras are skipped.
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "packaging", "setuptools", "scipy", "matplotlib")


def lower_bounds() -> dict[str, str]:
    """The lowest allowed version of every dependency, by name."""
    found = map(Requirement, requires("diffusion-sampler") or ())
    return {
        r.name: next(s.version for s in r.specifier if s.operator == ">=")
        for r in found
        if r.marker is None  # an extra's
    }


def install(folder: Path, pins: dict[str, str]) -> Path:
    """A new virtual environment with the package and these versions; returns its interpreter."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    tested = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    tools = [line for line in tested if line.partition("==")[0] in TOOLS]
    wanted = [f"{name}=={version}" for name, version in pins.items()]
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, *wanted, *tools], check=True)
    subprocess.run([*pip, "--no-deps", "-e", str(ROOT)], check=True)
    return python


def installed(python: Path) -> dict[str, str]:
    """Versions in an environment, by name."""
    command = [str(python), "-m", "pip", "list", "--format", "json"]
    listed = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return {entry["name"].lower().replace("_", "-"): entry["version"] for entry in listed}


def main() -> int:
    """Install, test, write the rows; the exit code is that of pytest."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the virtual environment, made if missing")
    parser.add_argument("--torch", help="version of torch in place of its lower bound")
    parser.add_argument("pytest", nargs="*", help="options for pytest, after --")
    options = parser.parse_args()
    bounds = lower_bounds()
    pins = bounds | ({"torch": options.torch} if options.torch else {})
    python = options.folder / "bin" / "python"
    if not python.exists():
        python = install(options.folder, pins)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    command = [str(python), "-m", "pytest", "-n", "2", "--dist", "worksteal", *options.pytest]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    sys.stdout.write(run.stdout[-20000:])
    result = run.stdout.strip().splitlines()[-1].strip("= ")
    versions = installed(python)
    with FIGURE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["dependency", "lower bound", "installed", "suite", "python", "date"])
        for name, version in bounds.items():
            found = versions[name.lower().replace("_", "-")]
            row = [name, version, found, result, platform.python_version(), date.today()]
            writer.writerow(row)
    return run.returncode


if __name__ == "__main__":
    sys.exit(main())
