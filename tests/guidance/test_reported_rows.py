"""The evaluations that are reported for an image are the rows of it that the network saw.

A spy reads every network call and finds each row again among the latents of the run, image by
image, in the engine and in stock pipelines, for batches of one, three and eight.
"""

import pytest
import torch

import sampler
from tests import tiny
from tests.families import FAMILIES

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 8
CFG = {"name": "cfg", "scale": 5.0}
HOLD = {"name": "adaptive", "rule": CFG, "after": "hold", "threshold": 0.9995}
RULES = {
    "cfg": CFG,
    "cfg in a window": {**CFG, "window": [1, 4]},
    "adaptive": {"name": "adaptive", "rule": CFG, "threshold": 0.9995},
    "hold": HOLD,
    "forecast": {"name": "forecast", "rule": CFG, "tolerance": 0.02},
    "policy": {"name": "forecast", "rule": CFG, "policy": [1, 1, 1, 0, 1, 0, 0, 1]},
    "forecast of hold": {"name": "forecast", "rule": HOLD, "tolerance": 0.02},
}
DECIDE_PER_ROW = ("adaptive", "hold", "forecast", "forecast of hold")


class Spy:
    """Keeps the samples of every call of a network, from below all hooks."""

    def __init__(self, network):
        self.rows = []
        forward = network.forward

        def spied(*args, **kwargs):
            given = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
            self.rows += list(given.detach().clone())
            return forward(*args, **kwargs)

        network.forward = spied

    def seen(self, latents):
        """Count the evaluations of each image, from its latents [B, ...] of every step."""
        found = [0] * len(latents[0])
        for row in self.rows:
            owners = [b for x in latents for b in range(len(x)) if torch.equal(x[b], row)]
            assert len(owners) == 1, "a row that is no image's, or several images'"
            found[owners[0]] += 1
        return found


def prompts(count):
    things = ("a fox", "two green apples", "a boat", "the moon", "a red car", "a dog", "x", "snow")
    return list(things[:count])


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("build", [tiny.sd, tiny.sd3])
def test_in_the_engine(build, rule, count):
    pipe = build()
    engine = sampler.load(pipe)
    adapter = engine.pipeline
    spy, size = Spy(adapter.network), (32, 32)
    with torch.no_grad():
        cond = adapter.encode(prompts(count), [""] * count, True, size)
        draw = torch.Generator().manual_seed(5)
        x = torch.randn(count, *adapter.latent_shape(*size), generator=draw)
        given = (cond, "ddim", sampler.build("guidance", RULES[rule]))
        first, grid = engine.start(x, adapter.grid(STEPS, size), *given)
        snaps = [first, *engine.steps(first, grid, *given)]
    assert spy.seen([snap.x for snap in snaps[:-1]]) == list(snaps[-1].nfe)
    if build is tiny.sd and count == 8 and rule in DECIDE_PER_ROW:
        assert len(set(snaps[-1].nfe)) > 1


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["Stable Diffusion 1.x", "Flux"])
def test_in_a_stock_pipeline(name, rule, count):
    """One call for both branches, and one call for each."""
    family = FAMILIES[name]
    pipe = family.build()
    spy, latents = Spy(getattr(pipe, family.network)), []
    shape = (count, *sampler.load(pipe).pipeline.latent_shape(32, 32))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    latents.append(family.latents(x))

    def keep(pipe, step, t, given):
        latents.append(given["latents"].clone())
        return given

    call = {**family.call, family.scale[0]: 5.0 - family.scale[1], "num_inference_steps": STEPS}
    call |= {"negative_prompt": ["blurry"] * count, "output_type": "latent"}
    call |= {"height": 32, "width": 32, "callback_on_step_end": keep}
    with sampler.guide(pipe, RULES[rule]) as calls:
        pipe(prompt=prompts(count), latents=latents[0], **call)
    assert len(latents) == STEPS + 1
    assert spy.seen(latents[:-1]) == calls.nfe
