"""Processes by a fork, where torch and diffusers are imported already: the command line, or ranks.

A fresh interpreter takes six seconds to import them. What a test says of the imports themselves
needs one all the same.
"""

import os
import sys
from pathlib import Path
from typing import NamedTuple

from accelerate.state import AcceleratorState
from torch.distributed import TCPStore

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


def in_ranks(action):
    """Call `action` in two forks, the ranks of one job of torchrun; returns their exit statuses.

    The job's store is in this process, as torchrun's agent holds it: a free port that is only
    looked up here could be another process's by the time rank 0 listens on it.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
           "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}  # fmt: skip
    children = []
    for rank in ("0", "1"):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.environ |= {**job, "RANK": rank, "LOCAL_RANK": rank}
                AcceleratorState._reset_state(True)
                action()
                assert AcceleratorState().num_processes == 2
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitpid(child, 0)[1] for child in children]
