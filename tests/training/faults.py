"""A short run, to be killed, or to be that of one of several processes."""

from pathlib import Path

from tests.training import test_votes, world

# Runs with something of their own to go on with: (trainer, reward, settings).
RUNS = {
    "nft": ({**world.TRAINERS["nft"], "kl": 1e-3}, "brightness", {"ema": 0.5}),
    "awm": (world.TRAINERS["awm"], "brightness", {}),
    "grpo": (
        {**world.TRAINERS["grpo"], "window": {"size": 1, "every": 1, "within": 1.0}},
        "brightness",
        {"steps": 3},
    ),
    "dpo": (world.TRAINERS["dpo"], "brightness", {}),
    "srpo": (world.TRAINERS["srpo"], "brightness", {}),
    "votes": ({"name": "nft", "group_size": 2, "times": 1}, {"name": "votes"}, {}),
    "cached": (
        world.TRAINERS["nft"],
        "brightness",
        {"cache_text": True, "text_cache_mb": 0, "eval_every": 1},
    ),
}


def main(out, updates, trainer="alignprop", micro=None):
    """One fine-tuning run of the tiny pipeline; resumes what is in `out`."""
    world.tune(
        world.engine(), out, trainer, updates=updates, batch=4, micro=micro, clip=0, keep=1,
        checkpoint_every=1,
    )  # fmt: skip


def run(out, updates, name):
    """One of `RUNS`; people who vote do so where it waits for them."""
    trainer, reward, settings = RUNS[name]
    votes = test_votes.votes

    def act(seconds):
        (folder,) = test_votes.ballots.open_ballots(Path(out))
        test_votes.vote(folder)

    pause, votes.time.sleep = votes.time.sleep, act
    try:
        world.tune(
            world.engine(), out, trainer, reward, updates=updates, batch=4, keep=1,
            checkpoint_every=1, **settings,
        )  # fmt: skip
    finally:
        votes.time.sleep = pause
