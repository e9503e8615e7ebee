"""The rule `reward`: universal guidance, and the classifier rule as its special case."""

import pytest
import torch

import sampler

PROMPTS = ["a fox on a green background", "a red apple on a white background"]
RUN = {"seeds": [1, 2], "steps": 3, "output": "latent"}


@pytest.fixture(scope="module")
def engine():
    return sampler.load()


def latents(engine, rule, **run):
    return engine.generate(PROMPTS, guidance=rule, **{**RUN, **run}).latents


def test_classifier_guidance_is_its_special_case(engine):
    """The reward log p(concept) of the bundled classifier, and the rule with that classifier."""
    wanted = latents(engine, {"name": "classifier", "strength": 1.5})
    found = latents(engine, {"name": "reward", "reward": "classifier", "strength": 1.5})
    assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    assert (found - latents(engine, "none")).abs().max() > 1e-3


def test_a_step_is_the_formula(engine):
    """One row, by hand: x0 + s·r²·∇R, here with cfg inside."""

    def brightness(images, prompts):
        return images.flatten(1).mean(1) * 100

    cfg = {"name": "cfg", "scale": 2.0}
    adapter, seen = engine.pipeline, []

    class Keeps(type(sampler.build("sampler", "ddim"))):
        def step(self, x, pred, span, state):
            seen.append((sampler.settle(pred.x0), span.now))
            return super().step(x, pred, span, state)

    for rule in (cfg, {"name": "reward", "reward": brightness, "strength": 2.0, "rule": cfg}):
        latents(engine, rule, sampler=Keeps(), steps=1)
    (plain, level), (moved, _) = seen
    leaf = plain.clone().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(brightness(adapter.decode(leaf), ()).sum(), leaf)
    r2 = level.sigma**2 / (level.alpha**2 + level.sigma**2)
    assert torch.allclose(moved, plain + 2 * r2 * slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("reward", "part"),
    [
        (lambda images, prompts: torch.ones(len(images)), "have no gradient"),
        ("jpeg", "'jpeg'"),
        ("nothing", "Unknown reward 'nothing'"),
    ],
)
def test_bad_rewards_are_one_sentence(engine, reward, part):
    with pytest.raises(ValueError, match=part) as error:
        latents(engine, {"name": "reward", "reward": reward})
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_it_needs_a_decoder():
    engine = sampler.Engine(sampler.denoiser(lambda x, level, _: x))
    with pytest.raises(ValueError, match=r"reward: it scores images and needs generate\(\)"):
        engine.run(
            torch.zeros(1, 2),
            [sampler.Level(1, 0.8, 0.6), sampler.Level(0, 1.0, 0.0)],
            guidance={"name": "reward", "reward": lambda images, prompts: images.flatten(1).sum(1)},
        )
