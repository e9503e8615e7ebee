"""The command `sampler`: one module per command, heavy imports inside functions."""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (default: that of the process) and return its exit code."""
    from sampler.cli import commands

    return commands.run(arguments)
