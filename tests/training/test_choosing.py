"""select "spread" and prompts "vade": against brute force and a bandit, in updates, on resume."""

import itertools
import random
import statistics

import pytest
import torch

import sampler
from sampler.training import checkpoint
from sampler.training.batches import Batch, batch
from sampler.training.policy.choosing import _counts
from sampler.training.policy.selection import (
    flat_groups,
    informative,
    kept_images,
    learned,
    widest,
)
from tests.training import world
from tests.training.test_fit import flat_moment


@pytest.fixture(scope="module")
def engine():
    return world.engine()


def test_the_widest_images_are_those_of_brute_force():
    """300 random groups, ties among them."""
    generator = random.Random(0)
    for case in range(300):
        size = generator.randint(2, 8)
        k = generator.randint(2, size)
        group = generator.sample(range(10), size)
        values = torch.zeros(10, dtype=torch.float64)
        for row in group:
            values[row] = generator.gauss(0, 1) if case % 3 else generator.randint(0, 2)
        chosen = widest(group, values, k)
        assert len(set(chosen)) == k and set(chosen) <= set(group) and chosen == sorted(chosen)
        best = max(
            statistics.pvariance([float(values[row]) for row in rows])
            for rows in itertools.combinations(group, k)
        )
        found = statistics.pvariance([float(values[row]) for row in chosen])
        assert found == pytest.approx(best, abs=1e-12)


def test_the_share_of_equal_groups_is_that_of_the_choice(tmp_path):
    """In all optimiser steps alike: groups that are equal up to rounding are left out."""

    seen = {"a dog": [1.0, 1.0 + 1e-6], "a cat": [1.0, 3.0], "a red car": [0.0, 2.0]}

    def reward(images, prompts):
        return [seen[prompt].pop() for prompt in prompts]

    spec = {**world.TRAINERS["grpo"], "select": "spread", "keep": 2, "minibatches": 2, "passes": 1}
    report = world.tune(world.engine(), tmp_path, spec, reward, updates=1, batch=6)
    assert report.log[0]["flat_groups"] == pytest.approx(1 / 3)


def test_the_number_of_images_grows_from_half_to_all():
    assert [kept_images(None, 8, u / 8) for u in range(9)] == [4, 4, 5, 6, 6, 6, 7, 8, 8]
    assert kept_images(None, 2, 0.0) == 2 and kept_images(3, 8, 0.9) == 3


def test_groups_of_equal_rewards_are_those_within_rounding():
    """The spread is that of all groups, remembered over updates."""
    groups, rewards = [[0, 1], [2, 3]], [0.0, 2.0, 5.0, 5.0 + 1e-6]
    flat, spread = flat_groups(groups, rewards, None)
    assert flat == [False, True] and spread == pytest.approx(0.5)
    flat, spread = flat_groups(groups, [1.0, 1.0 + 1e-4, 2.0, 2.0], spread)
    assert flat == [True, True] and spread == pytest.approx(0.45, abs=1e-4)
    assert flat_groups([[0, 1]], [3.0, 3.0], None) == ([True], 0.0)


@pytest.mark.parametrize("seed", range(3))
def test_prompts_of_uncertain_reward_are_found(seed):
    """A bandit of 24 prompts with known p: at least 0.9 of the best p·(1 − p) after 50 updates."""
    generator = random.Random(seed)
    p = [generator.random() for _ in range(24)]
    names = [f"prompt {i}" for i in range(24)]
    state, found = {"hits": {}, "recent": []}, []
    for update in range(60):
        chosen = informative(names, 4, state["hits"], seed, update)
        assert len(set(chosen)) == 4
        found.append(statistics.fmean(p[i] * (1 - p[i]) for i in chosen))
        rewards = [float(generator.random() < p[i]) for i in chosen for _ in range(8)]
        state = learned(state, [names[i] for i in chosen for _ in range(8)], rewards)
    best = statistics.fmean(sorted((x * (1 - x) for x in p), reverse=True)[:4])
    plain = statistics.fmean(x * (1 - x) for x in p)
    assert statistics.fmean(found[50:]) >= 0.9 * best > plain
    assert len(state["recent"]) == 256


def test_hits_are_rewards_above_the_median_of_all_prompts():
    state = learned({"hits": {}, "recent": []}, ["a", "a", "b", "b"], [0.1, 0.2, 0.8, 0.9])
    assert state["hits"] == {"a": [1, 3], "b": [3, 1]}
    after = learned(state, ["b"], [0.0])
    assert after["hits"]["b"] == pytest.approx([2.8, 2.0])
    assert after["hits"]["a"] == pytest.approx([1, 2.98])
    ones = learned({"hits": {}, "recent": []}, ["a"] * 4, [1.0, 1.0, 1.0, 0.0])
    assert ones["hits"]["a"] == [4, 2]  # the median is 1: a reward of 1 is a hit
    assert informative(["a", "b"], 5, {}, 0, 0) in ([0, 1, 0, 1, 0], [1, 0, 1, 0, 1])


def test_places_decide_the_prompts_of_a_batch():
    found = batch(world.PROMPTS, 4, 3, 0, group=2, places=[2, 0])
    assert found.prompts == ("a red car", "a red car", "a dog", "a dog")
    assert found.numbers == (2, 2, 0, 0)


def test_counts_are_those_of_all_processes():
    """Two processes, two steps each: rows 0 2 | 4 6 of the first, 1 3 | 5 7 of the second."""
    rows = Batch(0, 0, ("a",) * 8, tuple(range(8)), rank=1, world=2)
    assert _counts(rows, 2, {0, 1, 2, 7}) == [3, 1]


SPECS = {
    "ddpo": {**world.TRAINERS["ddpo"], "clip_range": 0.1},
    "rlcm": {**world.TRAINERS["rlcm"], "passes": 1},
    "grpo": {"name": "grpo", "window": None, "ratio": "plain", "clip_range": 0.1},
}


@pytest.mark.parametrize("trainer", SPECS)
def test_half_of_the_images_have_a_gradient(engine, tmp_path, trainer):
    """Cut out of their micro-batches or left out with them, it is the same; the ratio is 1."""
    spec = {**SPECS[trainer], "group_size": 4, "select": "spread", "keep": 2}
    grads = []
    for micro in (4, 1):
        out = tmp_path / str(micro)
        options = {"updates": 1, "batch": 8, "micro": micro, "clip": 0, "steps": 3}
        report = world.tune(engine, out, spec, **options)
        record = report.log[0]
        assert record["kept"] == 0.5 and record["flat_groups"] == 0
        assert record["ratio"] == pytest.approx(1, abs=1e-4) and record["images"] == 8
        grads.append(flat_moment(out))
    assert (grads[0] - grads[1]).norm() <= 2e-3 * grads[0].norm() > 0
    whole = world.tune(engine, tmp_path / "all", {**spec, "keep": 4}, **options)
    assert whole.log[0]["kept"] == 1.0
    assert (flat_moment(tmp_path / "all") - grads[0]).norm() > 0.1 * grads[0].norm()


def test_equal_rewards_make_no_step(engine, tmp_path):
    def same(images, prompts):
        return torch.ones(len(images))

    spec = {**SPECS["ddpo"], "group_size": 2, "select": "spread"}
    report = world.tune(engine, tmp_path, spec, same, updates=2, batch=2)
    assert [r["grad_norm"] for r in report.log] == [0.0, 0.0]
    assert [(r["reward"], r["kept"], r["flat_groups"]) for r in report.log] == [(1, 0, 1)] * 2
    found = checkpoint.load_newest(tmp_path / "checkpoints")
    assert not any(torch.count_nonzero(v) for k, v in found.adapter.items() if "lora_B" in k)


def test_a_run_with_choices_goes_on_bit_equal(engine, tmp_path):
    spec = {**SPECS["ddpo"], "group_size": 2, "select": "spread", "keep": 2, "prompts": "vade"}

    def stop(record):
        if record["update"] == 3:
            raise KeyboardInterrupt

    whole = world.tune(engine, tmp_path / "whole", spec, updates=4, batch=4)
    with pytest.raises(KeyboardInterrupt):
        world.tune(engine, tmp_path / "cut", spec, updates=4, batch=4, progress=stop)
    world.tune(engine, tmp_path / "cut", spec, updates=4, batch=4)
    assert world.curve(tmp_path / "whole") == world.curve(tmp_path / "cut")
    assert world.weights(tmp_path / "whole") == world.weights(tmp_path / "cut")
    state = checkpoint.load_newest(whole.folder / "checkpoints").state["trainer"]
    assert set(state["hits"]) <= set(world.PROMPTS) and len(state["recent"]) == 16
    assert state["spread"] > 0 and state["own"]  # the ring buffers of ddpo


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"name": "ddpo", "select": "spread"}, "group_size = 1 must be at least 2"),
        ({"name": "grpo", "select": "spread", "keep": 9}, "and keep at most that"),
        ({"name": "rlcm", "keep": 2, "group_size": 4}, "keep belongs to select = 'spread'"),
        ({"name": "grpo", "select": "spread", "keep": 1}, "keep = 1 must be"),
        ({"name": "ddpo", "prompts": "easy"}, "prompts = 'easy' must be"),
    ],
)
def test_wrong_choices_are_one_sentence(fields, problem):
    with pytest.raises(ValueError) as error:
        sampler.build("trainer", fields)
    assert problem in str(error.value) and "\n" not in str(error.value)


def test_a_growing_choice_depends_on_the_length_of_the_run():
    grows = sampler.build("trainer", {"name": "grpo", "select": "spread"})
    fixed = sampler.build("trainer", {"name": "grpo", "select": "spread", "keep": 4})
    assert grows.scheduled and not fixed.scheduled and not fixed.prompts == "vade"
