"""Noise of stochastic samplers inside stock pipelines: new in every call, and repeatable."""

import pytest
import torch

import sampler
from sampler.core.noise import Noise
from sampler.stock.step_seeds import NOT_PASSED, step_seeds
from tests import tiny

STOCHASTIC = {"name": "ddim", "eta": 1.0}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def run(pipe, prompt="a fox", **options):
    given = {"num_inference_steps": 4, "output_type": "latent", "height": 32, "width": 32}
    return pipe(prompt, **{**given, **options}).images


@pytest.fixture(params=["sd", "flux", "sd3"])
def pipe(request):
    pipe = getattr(tiny, request.param)()
    pipe.scheduler = sampler.scheduler(STOCHASTIC, pipe.scheduler)
    return pipe


def test_without_a_generator_every_call_draws_other_noise(pipe):
    """Also the noise of the steps: stock DDIM at eta = 1 varies as much (diffusers)."""
    torch.manual_seed(1)
    first, second = run(pipe), run(pipe)
    torch.manual_seed(1)
    assert torch.equal(run(pipe), first) and torch.equal(run(pipe), second)
    seeds = []
    for _ in range(4):
        run(pipe)
        seeds += pipe.scheduler._seeds
    assert len(set(seeds)) == 4


def test_one_generator_moves_on_from_call_to_call(pipe):
    one = generator(5)
    first, second = run(pipe, generator=one), run(pipe, generator=one)
    assert not torch.allclose(first, second, atol=1e-3)
    one = generator(5)
    assert torch.equal(run(pipe, generator=one), first)
    assert torch.equal(run(pipe, generator=one), second)
    one.manual_seed(5)
    assert torch.equal(run(pipe, generator=one), first)


def test_seeds_give_other_noise_than_each_other(pipe):
    seeds = []
    for seed in (3, 4):
        run(pipe, generator=generator(seed))
        seeds += pipe.scheduler._seeds
    assert len(set(seeds)) == 2


def test_a_batch_has_the_noise_of_its_images_alone(pipe):
    both = run(pipe, ["a fox", "a door"], generator=[generator(3), generator(4)])
    seeds = pipe.scheduler._seeds
    for row, (prompt, seed) in enumerate((("a fox", 3), ("a door", 4))):
        alone = run(pipe, prompt, generator=generator(seed))
        assert pipe.scheduler._seeds == seeds[row : row + 1]
        assert torch.allclose(alone[0], both[row], atol=2e-4)


def test_the_same_latents_with_one_generator_get_other_noise_in_every_call():
    pipe = tiny.sd()
    pipe.scheduler = sampler.scheduler(STOCHASTIC, pipe.scheduler)
    latents = torch.randn(1, 4, 16, 16, generator=generator())
    one = generator(7)
    first, second = (run(pipe, latents=latents, generator=one) for _ in range(2))
    assert not torch.allclose(first, second, atol=1e-3)
    torch.manual_seed(0)
    assert not torch.allclose(run(pipe, latents=latents), run(pipe, latents=latents), atol=1e-3)


def test_a_fresh_generator_gives_the_engines_seed():
    x = torch.randn(2, 4, 8, 8, generator=generator())
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        one = generator(9)
        torch.randn(x.shape, generator=one, dtype=dtype)
        assert step_seeds(one, x.to(dtype)) == (9, 10)
        assert step_seeds(one, x.to(dtype)) != (9, 10)
    many = [generator(9), generator(4)]
    for one in many:
        torch.randn(1, 4, 8, 8, generator=one)
    assert step_seeds(many, x) == (9, 4) != step_seeds(many, x)
    largest = generator(2**63 - 1)
    assert all(0 <= seed < 2**63 for seed in step_seeds(largest, x))


def test_equal_samples_are_told_apart_where_no_generator_is_passed():
    x = torch.randn(1, 4, 8, 8, generator=generator()).repeat(3, 1, 1, 1)
    seeds = step_seeds(NOT_PASSED, x)
    assert len(set(seeds)) == 3 and seeds[:1] == step_seeds(NOT_PASSED, x[:1])
    noise = Noise(seeds).draw(0, x)
    assert float(noise.std()) == pytest.approx(1, abs=0.05)


def test_deterministic_samplers_leave_generators_alone():
    pipe = tiny.sd()
    pipe.scheduler = sampler.scheduler("ddim", pipe.scheduler)
    one, other = generator(3), generator(3)
    run(pipe, generator=one)
    torch.randn(1, 4, 16, 16, generator=other)
    assert torch.equal(one.get_state(), other.get_state())
