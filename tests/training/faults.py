"""A short run, to be killed, or to be that of one of several processes."""

from tests.training import world


def main(out, updates, trainer="alignprop", micro=None):
    """One fine-tuning run of the tiny pipeline; resumes what is in `out`."""
    world.tune(
        world.engine(), out, trainer, updates=updates, batch=4, micro=micro, clip=0, keep=1,
        checkpoint_every=1,
    )  # fmt: skip
