"""Two gloo processes distil what one does."""

import pytest

from sampler.training import checkpoint
from tests.processes import in_ranks
from tests.training import world
from tests.training.test_f_distill import LORAS, OWN, tune
from tests.training.test_fit import flat_moment

KEYS = {"loss", "loss_distill", "loss_gan", "loss_discriminator", "loss_fake_score", "ratio"}
OPTIONS = {"batch": 4, "micro": 1, "clip": 0, "seed": 2, "checkpoint_every": 1}


def run(out, trainer):
    """A critics' update, then the student's, whose weights are those of all four rows: one bin
    holds rows of both processes."""
    tune(world.engine(), out, 2, trainer={"divergence": "kl", "bins": 1, **trainer}, **OPTIONS)


@pytest.mark.parametrize("trainer", [{}, {**OWN, **LORAS}], ids=["renoised", "own lora"])
def test_two_processes_have_the_gradients_of_one(tmp_path, trainer):
    assert in_ranks(lambda: run(tmp_path / "two", trainer)) == [0, 0]
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
