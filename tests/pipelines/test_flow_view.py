"""The bundled model on flow matching's levels is the same network, exactly."""

import pytest
import torch

import sampler
from sampler.bundled import classifier, measures, prompts
from sampler.config.model import ModelConfig
from sampler.core.binding import model_name
from sampler.models.lora import load_lora
from sampler.models.trainable_lora import adapted, save_lora
from sampler.runs.fingerprint import model_of
from sampler.types import Branch, Level, Span


@pytest.fixture(scope="module")
def engines():
    return sampler.load("bundled"), sampler.load("bundled-flow")


@pytest.fixture(scope="module")
def conds(engines):
    return [e.pipeline.encode(["a dog"] * 2, ["", ""], False, (64, 64)).cond for e in engines]


def prediction(engine, cond, x, level):
    with torch.no_grad():
        return engine.pipeline(x, Span(0, level, level), {"cond": Branch(cond)}, [0] * len(x))[
            "cond"
        ]


@pytest.mark.parametrize("t", [1, 300, 700, 999])
def test_both_estimate_the_same_image_and_noise(engines, conds, t):
    """x_flow = r·x_vp with r = (1 − sigma)/alpha_t at the level of the same ratio."""
    vp, flow = engines
    now = vp.pipeline.schedule.level(t)
    sigma = now.sigma / (now.alpha + now.sigma)
    root = ((1 - sigma) ** 2 + sigma**2) ** 0.5
    torch.manual_seed(t)
    x = torch.randn(2, 4, 16, 16)
    ours = prediction(flow, conds[1], root * x, Level(1000 * sigma, 1 - sigma, sigma))
    theirs = prediction(vp, conds[0], x, now)
    torch.testing.assert_close(ours.x0.tensor(), theirs.x0.tensor(), atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(ours.eps.tensor(), theirs.eps.tensor(), atol=2e-4, rtol=1e-4)


def test_samples_may_have_levels_of_their_own(engines, conds):
    flow = engines[1]
    x, sigmas = torch.randn(2, 4, 16, 16), (0.3, 0.9)
    levels = [Level(1000 * s, 1 - s, s) for s in sigmas]
    stacked = Level(*(torch.tensor(v) for v in zip(*levels, strict=True)))
    found = prediction(flow, conds[1], x, stacked).x0.tensor()
    cond = {k: v[:1] for k, v in conds[1].items()}
    for row, level in enumerate(levels):
        alone = prediction(flow, cond, x[row : row + 1], level).x0.tensor()
        torch.testing.assert_close(found[row : row + 1], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["cps", "flow_sde", "dance_sde", "unipc"])
def test_flow_samplers_run_on_it(engines, method):
    made = engines[1].generate("a dog on a red background", seeds=1, steps=4, sampler=method)
    assert made.latents.isfinite().all()
    if method.endswith("sde"):
        with pytest.raises(ValueError, match="needs a flow-matching model"):
            engines[0].generate("a dog", seeds=1, steps=4, sampler=method)


def test_it_draws_what_it_is_asked_for(engines):
    """As well as the model on its own levels, in ten Euler steps."""
    listed, model = prompts(128)[::8], classifier.load()
    figures, images = [], []
    for engine in engines:
        made = engine.generate(
            [p.text for p in listed], seeds=list(range(16)), steps=10, sampler="ddim",
            batch_size=16, output="tensor",
        )  # fmt: skip
        features = measures.extracted_features(model, made.images)
        figures.append(measures.agreement(model, features, listed))
        images.append(made.images)
    assert figures[1]["concept"] >= max(0.85, figures[0]["concept"] - 0.1)
    assert figures[1]["background"] >= 0.9
    assert not torch.equal(*images)


def test_it_is_a_model_of_its_own(engines, tmp_path):
    """Its keys differ; a LoRA of one is a LoRA of the other."""
    vp, flow = (model_of(ModelConfig(path=path)) for path in ("bundled", "bundled-flow"))
    assert vp.identity != flow.identity and flow.identity["levels"] == "flow"
    assert model_name(engines[0].pipeline) != model_name(engines[1].pipeline)
    with adapted(engines[1].pipeline.network, 2, 2, ["to_q"], 0) as adapter:
        for parameter in adapter.parameters.values():
            parameter.data.normal_()
        save_lora(adapter, "unet", tmp_path, {})
    load_lora(engines[0], tmp_path)
    sampler.models.lora.unload_lora(engines[0])
    with pytest.raises(ValueError, match="student has no effect on bundled-flow"):
        sampler.load("bundled-flow", student="somewhere")
