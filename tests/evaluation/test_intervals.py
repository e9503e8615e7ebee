"""Intervals over prompts: their coverage, and what pairing gains."""

import numpy as np
import pytest

from sampler.evaluation.intervals import bootstrap, cluster_means, interval, paired, pooled

SETS, PROMPTS, REPEATS = 2000, 32, 4


def test_the_interval_over_prompts_covers_the_mean_and_the_one_over_images_does_not():
    """Images of a prompt are correlated by 0.5, as half of their variance is the prompt's."""
    draw = np.random.default_rng(0)
    prompt = draw.standard_normal((PROMPTS, 1, SETS))
    images = np.sqrt(0.5) * prompt + np.sqrt(0.5) * draw.standard_normal((PROMPTS, REPEATS, SETS))
    low, high = bootstrap(images.mean(1), 1000)
    assert 0.93 <= np.mean((low < 0) & (high > 0)) <= 0.97
    low, high = bootstrap(images.reshape(-1, SETS), 1000)
    assert np.mean((low < 0) & (high > 0)) < 0.90


def test_the_mean_is_over_prompts_whatever_the_number_of_their_images():
    names, means = cluster_means(["b", "a", "b", "b"], [1.0, 5.0, 2.0, 3.0])
    assert names == ["a", "b"] and means.tolist() == [5.0, 2.0]


def test_equal_data_gives_equal_intervals_and_a_single_prompt_none():
    data = np.linspace(0, 1, 40)
    assert interval(data) == interval(data.copy())
    assert interval([0.3]) is None
    low, high = interval(data)
    # The standard error of the mean is std/sqrt(n).
    assert high - low == pytest.approx(2 * 1.96 * data.std() / np.sqrt(40), rel=0.03)


def test_differences_are_taken_inside_the_prompts():
    prompt = np.random.default_rng(1).standard_normal(40) * 10
    found = paired(prompt + 0.5, prompt)
    assert found.mean == pytest.approx(0.5) and found.interval == pytest.approx((0.5, 0.5))
    assert (found.wins, found.ties, found.losses) == (40, 0, 0) and found.verdict == "higher"
    assert paired(prompt, prompt + 0.5).verdict == "lower"


def test_weighted_means_are_drawn_with_their_weights():
    """Equal weights change nothing but rounding; with whole numbers it is that of repeated rows."""
    draw = np.random.default_rng(0)
    a, b, w = draw.normal(size=40), draw.normal(size=40), draw.integers(1, 5, 40)
    assert interval(a, np.full(40, 3.0)) == pytest.approx(interval(a), rel=1e-9)
    assert pooled(a, w) == pytest.approx(np.repeat(a, w).mean()) and pooled(a) == a.mean()
    low, high = interval(a, w)
    spread = np.sqrt((w**2 * (a - pooled(a, w)) ** 2).sum()) / w.sum()  # of a ratio of sums
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.1)
    assert abs(spread / (a.std() / 40**0.5) - 1) > 0.05
    gap = paired(a, b, w)
    assert gap.mean == pytest.approx(pooled(a, w) - pooled(b, w))
    assert gap.interval == pytest.approx(interval(a - b, w))
    assert (gap.wins, gap.ties, gap.losses) == paired(a, b)[2:]


def test_nothing_is_shown_where_the_interval_has_zero():
    mixed = np.tile([1.0, -1.0, 0.0, 0.1], 10)
    found = paired(mixed, np.zeros(40))
    assert found.interval[0] < 0 < found.interval[1] and found.verdict == "not shown"
    assert (found.wins, found.ties, found.losses) == (20, 10, 10)
    assert paired([1.0], [0.0]).verdict == "not shown"
