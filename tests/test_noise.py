"""Noise is a function of (seed, step, stream), and the first noise is stock diffusers'."""

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from scipy import stats

from sampler.core.noise import INITIAL, Noise, initial


def test_first_noise_equals_per_image_generators_of_a_stock_pipeline():
    generators = [torch.Generator("cpu").manual_seed(s) for s in (3, 2**40 + 1)]
    stock = randn_tensor((2, 4, 5, 7), generator=generators, dtype=torch.float32)
    assert torch.equal(initial([3, 2**40 + 1], (4, 5, 7)), stock)


def test_a_row_draws_the_same_alone_reordered_and_in_float64():
    like = torch.empty(3, 4, 2)
    rows = Noise((7, 8, 9)).draw(5, like)
    assert torch.equal(Noise((9,)).draw(5, like[:1])[0], rows[2])
    assert torch.equal(Noise((9, 7)).draw(5, like[:2]), rows[[2, 0]])
    assert torch.equal(Noise((7, 8, 9)).draw(5, like.double()).float(), rows)


def test_steps_streams_and_seeds_never_share_numbers():
    like = torch.empty(1, 64)
    drawn = [
        Noise((seed,)).draw(index, like, stream)
        for seed in (0, 1, 2**63 - 1)
        for index in (INITIAL, 0, 1, 999)
        for stream in ("step", "start", "reddiff")
        if not (index == INITIAL and stream != "step")
    ]
    flat = torch.cat(drawn)
    assert len({tuple(row.tolist()) for row in flat}) == len(flat)
    assert torch.corrcoef(flat).fill_diagonal_(0).abs().max() < 0.5


def test_it_is_standard_normal():
    values = Noise((11,)).draw(3, torch.empty(1, 20000))[0]
    assert stats.kstest(values.numpy(), "norm").pvalue > 1e-3


def test_one_seed_per_row():
    with pytest.raises(ValueError, match="2 seeds for 3 samples"):
        Noise((1, 2)).draw(0, torch.empty(3, 4))
