"""Start-up time of `sampler --help` against the smallest typer program, in interleaved pairs.

python -m scripts.bench.startup [--pairs 30]
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

BARE = """
import typer

app = typer.Typer()


@app.command()
def one(name: str = "x") -> None:
    print(name)


@app.command()
def two(name: str = "x") -> None:
    print(name)


app()
"""
OURS = "import sys; from sampler.cli import main; sys.exit(main())"


def seconds(command: list[str]) -> float:
    """Wall time of one run of a command that must succeed."""
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    """Prints the medians, and the median of the ratios within the pairs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=30)
    pairs = parser.parse_args().pairs
    with tempfile.TemporaryDirectory() as folder:
        bare = Path(folder) / "bare.py"
        bare.write_text(BARE)
        commands = {
            "bare typer --help": [sys.executable, str(bare), "--help"],
            "sampler --help": [sys.executable, "-c", OURS, "--help"],
            "sampler list samplers": [sys.executable, "-c", OURS, "list", "samplers"],
        }
        for command in commands.values():  # bytecode and file caches
            seconds(command)
        rows = [
            {name: seconds(command) for name, command in commands.items()} for _ in range(pairs)
        ]
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    for name in commands:
        ratio = median(row[name] / row["bare typer --help"] for row in rows)
        print(f"{name:24}{1000 * median(row[name] for row in rows):7.0f} ms   ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
