"""The command line in a process of its own, by a fork: torch and diffusers are imported already.

A fresh interpreter takes six seconds to import them. What a test says of the imports themselves
needs one all the same.
"""

import os
import sys
from pathlib import Path
from typing import NamedTuple

from sampler.cli import entry


class Done(NamedTuple):
    """Exit code and output of a process that has ended; a signal that ended it is negative."""

    returncode: int
    stdout: str
    stderr: str


class Forked:
    """`sampler WORDS...` in a fork; its output goes to two files in `folder`."""

    def __init__(self, words, folder):
        self.out, self.err = Path(folder) / "stdout.txt", Path(folder) / "stderr.txt"
        self.out.touch()
        self.pid = os.fork()
        if not self.pid:
            code = 70
            try:
                for number, path in ((1, self.out), (2, self.err)):
                    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
                sys.stdout, sys.stderr = (
                    open(number, "w", closefd=False, encoding="utf-8") for number in (1, 2)
                )
                sys.argv = ["sampler", *map(str, words)]
                code = entry.main()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def wait(self):
        _, status = os.waitpid(self.pid, 0)
        return Done(os.waitstatus_to_exitcode(status), self.out.read_text(), self.err.read_text())
