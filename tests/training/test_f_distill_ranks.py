"""Two gloo processes distil what one does."""

import os
import socket

import pytest
from accelerate.state import AcceleratorState

from sampler.training import checkpoint
from tests.training import world
from tests.training.test_f_distill import LORAS, OWN, tune
from tests.training.test_fit import flat_moment

KEYS = {"loss", "loss_distill", "loss_gan", "loss_discriminator", "loss_fake_score", "ratio"}
OPTIONS = {"batch": 4, "micro": 1, "clip": 0, "seed": 2, "checkpoint_every": 1}


def run(out, trainer):
    """A critics' update, then the student's, whose weights are those of all four rows: one bin
    holds rows of both processes."""
    tune(world.engine(), out, 2, trainer={"divergence": "kl", "bins": 1, **trainer}, **OPTIONS)


def as_rank(rank, port, out, trainer):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    AcceleratorState._reset_state(True)
    run(out, trainer)
    assert AcceleratorState().num_processes == 2


@pytest.mark.parametrize("trainer", [{}, {**OWN, **LORAS}], ids=["renoised", "own lora"])
def test_two_processes_have_the_gradients_of_one(tmp_path, trainer):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    children = []
    for rank in (0, 1):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                as_rank(rank, port, tmp_path / "two", trainer)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    run(tmp_path / "one", trainer)
    ours, theirs = flat_moment(tmp_path / "two"), flat_moment(tmp_path / "one")
    assert (ours - theirs).norm() <= 1e-6 * theirs.norm() > 0
    states = [checkpoint.load_newest(tmp_path / n / "checkpoints").state for n in ("two", "one")]
    two, one = (state["trainer"]["bins"] for state in states)
    assert two == pytest.approx(one, rel=1e-6) and one != [1.0]
    for a, b in zip(world.curve(tmp_path / "two"), world.curve(tmp_path / "one"), strict=True):
        for key in KEYS & a.keys():
            assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-6), key
        assert a["nfe"] == b["nfe"]
