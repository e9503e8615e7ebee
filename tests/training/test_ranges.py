"""Every numeric field of Settings, trainers and rewards has a range, tested at its ends."""

import inspect
from dataclasses import fields

import pytest

from sampler import registry
from sampler.registry import ranges
from sampler.training.settings import Settings

TINY = 1e-9
COUNT, FROM_0, POSITIVE = ([1], [0, -1]), ([0], [-1]), ([TINY], [0, -1])
NONNEGATIVE, DECAY = ([0], [-TINY]), ([0, 1 - TINY], [-TINY, 1])
# field: (accepted at the ends, refused beyond them)
SETTINGS = {
    "updates": FROM_0, "batch": COUNT, "micro": COUNT, "seed": FROM_0, "steps": COUNT,
    "height": COUNT, "width": COUNT, "lr": POSITIVE, "lr_end": ([0, 1], [-TINY, 1 + TINY]),
    "betas": ([(0, 0), (1 - TINY,) * 2], [(-TINY, 0), (0, 1), (0.9,)]), "eps": POSITIVE,
    "weight_decay": NONNEGATIVE, "clip": NONNEGATIVE, "rank": COUNT, "alpha": POSITIVE,
    "max_skips": COUNT, "checkpoint_every": COUNT, "keep": COUNT, "eval_every": FROM_0,
    "text_cache_mb": FROM_0, "ema": DECAY, "patience": COUNT, "max_drift": NONNEGATIVE,
    "stop_reward": ([-1e9, 1e9], ["1"]),
}  # fmt: skip
POLICY = {
    "clip_range": POSITIVE, "max_advantage": POSITIVE, "buffer": ([16], [0]), "min_count": COUNT,
    "group_size": COUNT, "minibatches": COUNT, "passes": COUNT, "kl_beta": NONNEGATIVE,
    "keep": ([None], [1]),
}  # fmt: skip
GROUP = {
    "clip_range": POSITIVE, "threshold": POSITIVE, "max_advantage": POSITIVE,
    "group_size": ([2], [1]), "minibatches": COUNT, "passes": COUNT, "kl_beta": NONNEGATIVE,
    "keep": ([None], [1]),
}  # fmt: skip
FORWARD = {
    "group_size": ([2], [1]), "times": COUNT, "shift": POSITIVE, "minibatches": COUNT,
    "low": ([0, 0.5], [-TINY, 1 + TINY]), "high": ([0.5, 1], [0, 1 + TINY]), "passes": COUNT,
}  # fmt: skip
MATCHING = {**FORWARD, "max_advantage": POSITIVE, "kl": NONNEGATIVE}
RANGE = ([(0, 1)], [(-TINY, 1), (0, 1 + TINY), (0.5, 0.5), (0.5,)])
TRAINERS = {
    "nft": {**MATCHING, "beta": POSITIVE},
    "awm": {**MATCHING, "power": POSITIVE, "clip_range": POSITIVE, "kl_ema": NONNEGATIVE},
    "alignprop": {
        "k": COUNT, "low": FROM_0, "high": FROM_0, "mean": ([TINY, 1 - TINY], [0, 1]),
        "std": POSITIVE, "value": ([-1e9, 1e9], ["1"]), "loss_scale": POSITIVE, "lv": ([0], [-1]),
        "anchor": NONNEGATIVE, "early": FROM_0,
    },
    "dpo": {**FORWARD, "beta": POSITIVE, "anchor": NONNEGATIVE},
    "grpo": GROUP,
    "srpo": {
        "k_denoise": ([(0, 1)], [(-TINY, 1)]), "k_inversion": ([(0, 1)], [(-TINY, 1)]),
        "threshold": ([None, -1e9], ["1"]), "low": ([0, 0.4], [-TINY, 1 + TINY]),
        "high": ([0.5, 1], [0, 1 + TINY]), "shift": POSITIVE, "gap": ([TINY, 1], [0, 1 + TINY]),
    },
    "denoise": {
        "gamma": POSITIVE, "dropout": ([0, 1], [-TINY, 1 + TINY]), "count": COUNT,
    },
    "ddpo": POLICY,
    "rlcm": {**POLICY, "explore_std": POSITIVE},
    "f_distill": {
        "gan_weight": ([TINY], [0, -1]), "timesteps": ([(), (999, 0)], [(0, 999), (5, 5), (-1,)]),
        "samples": ([1], [-1]), "warmup": FROM_0, "student_every": COUNT, "ema": DECAY,
        "low": ([TINY, 1], [0, 1 + TINY]), "high": ([1], [1 - TINY]), "bins": COUNT,
        "memory": DECAY, "times": RANGE, "guidance_times": RANGE, "student_lr": POSITIVE,
        "huber": ([None], [0, -1]),
    },
    "prox_matching": {
        "noise": POSITIVE, "gamma": POSITIVE, "pretraining": FROM_0, "stage": COUNT,
        "stages": COUNT, "fall": ([0, 1], [-TINY, 1 + TINY]), "hidden": COUNT, "layers": COUNT,
        "beta": POSITIVE, "alpha": NONNEGATIVE, "samples": COUNT,
    },
}  # fmt: skip
REWARDS = {
    "pickscore": {"divisor": POSITIVE},
    "soft_compressibility": {"quality": ([1, 100], [0, 101])},
    "colour_agreement": {"border": ([TINY, 0.5], [0, 0.5 + TINY])},
    "object_count": {"count": FROM_0, "threshold": ([TINY, 1 - TINY], [0, 1])},
    "target": {"value": ([-1e9, 1e9], ["1"])},
    "capped": {"value": ([-1e9, 1e9], ["1"])},
    "zscore": {"mean": ([-1e9, 1e9], ["1"]), "std": POSITIVE},
    "sum": {"weights": ([(-1e9,)], [("1",)])},
    "contrast": {"k": NONNEGATIVE},
}
NEEDED = {
    "fit": {"eval_every": 1, "cache_text": True}, "denoise": {"data": "folder"},
    "pickscore": {"path": "folder"}, "object_count": {"path": "folder", "label": "dog", "count": 1},
    "target": {"reward": "brightness", "value": 1}, "capped": {"reward": "brightness", "value": 1},
    "zscore": {"reward": "brightness", "mean": 0, "std": 1}, "sum": {"rewards": ["brightness"]},
    "contrast": {"reward": "classifier", "positive": "Real", "negative": "Oil"},
}  # fmt: skip


def cases():
    for field, ends in SETTINGS.items():
        yield "fit", Settings, field, ends
    for kind, table in (("trainer", TRAINERS), ("reward", REWARDS)):
        for name, limits in table.items():
            for field, ends in limits.items():
                yield name, registry.lookup(kind, name), field, ends


@pytest.mark.parametrize(("name", "cls", "field", "ends"), list(cases()))
def test_the_ends_of_a_range_are_accepted_and_what_lies_beyond_is_refused(name, cls, field, ends):
    accepted, refused = ends
    others = dict(NEEDED.get(name, {}))
    for value in accepted:
        assert getattr(cls(**{**others, field: value}), field) == value
    for value in refused:
        with pytest.raises(ValueError, match=f"^{name}: .*{field}") as error:
            cls(**{**others, field: value})
        assert "\n" not in str(error.value)


def test_no_numeric_field_is_left_out():
    tables = {
        **{Settings: SETTINGS},
        **{registry.lookup("trainer", n): TRAINERS.get(n, {}) for n in registry.names("trainer")},
        **{registry.lookup("reward", n): REWARDS.get(n, {}) for n in registry.names("reward")},
    }
    for cls, table in tables.items():
        numeric = {
            entry.name
            for entry in fields(cls)
            if any(word in _type(cls, entry.name) for word in ("int", "float"))
        }
        assert numeric == set(table), cls


def _type(cls, field):
    hint = ranges.hints(cls)[field]
    return "" if "Literal" in str(hint) else inspect.formatannotation(hint)
