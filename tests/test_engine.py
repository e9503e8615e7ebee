"""The engine's own behaviour: what it refuses, what it counts, what it keeps."""

import pytest
import torch

import sampler
from sampler.core.errors import SamplerError
from sampler.types import Branch, GuidanceBase
from tests.analytic import flow_grid, mixture, pair_cond, pair_denoiser, vp_grid
from tests.laws.world import Counting, cond, noise

MIX = mixture(8, 1)


def plain(prediction="eps"):
    return sampler.Engine(
        sampler.denoiser(lambda x, level, _: MIX.out(x, level, prediction), prediction)
    )


def test_as_the_contract_shows_it():
    levels = [sampler.Level(t=901, alpha=0.3, sigma=0.95394), sampler.Level(0, 1.0, 0.0)]
    model = sampler.denoiser(lambda x, level, cond: x * 0.5, prediction="eps")
    x = sampler.Engine(model).run(
        torch.ones(2, 3), levels, cond=None, sampler={"name": "ab"}, guidance="none", seeds=[0, 1]
    )
    assert x.shape == (2, 3)
    assert torch.allclose(x, torch.full((2, 3), (1 - 0.95394 * 0.5) / 0.3))


def test_cond_is_passed_on_and_stacked_in_the_order_of_the_branches():
    seen = []

    def fn(x, level, cond):
        seen.append((x.shape[0], cond))
        return x * 0

    engine = sampler.Engine(sampler.denoiser(fn))
    levels = vp_grid(1)
    engine.run(torch.ones(2, 3), levels, cond="as it is", guidance="none")
    assert seen[-1] == (2, "as it is")
    both = sampler.Cond(cond={"e": torch.ones(2, 1)}, uncond={"e": torch.zeros(2, 1)})
    engine.run(torch.ones(2, 3), levels, cond=both, guidance="cfg")
    assert seen[-1][0] == 4 and seen[-1][1]["e"][:, 0].tolist() == [0, 0, 1, 1]


def test_a_missing_condition_is_refused_before_any_evaluation():
    counting = Counting()
    with pytest.raises(ValueError, match="needs an unconditional branch"):
        sampler.Engine(counting.denoiser).run(noise(1), vp_grid(2), torch.ones(1), guidance="cfg")
    assert counting.rows == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": [1]}, "1 seeds for 2 samples"),
        ({"levels": vp_grid(1)[:1]}, "at least two levels"),
        ({"sampler": "dimm"}, "did you mean 'ddim'"),
    ],
)
def test_wrong_arguments(options, message):
    options = {"levels": vp_grid(2), **options}
    with pytest.raises(ValueError, match=message):
        plain().run(noise(2), **options)


def test_generate_without_a_pipeline_says_so():
    with pytest.raises(SamplerError, match="no pipeline"):
        plain().generate("a fox")


def test_unknown_model_and_unknown_prediction():
    class Weak(GuidanceBase):
        name = "odd"

        def plan(self, x, span, cond, state):
            return {"cond": Branch(cond.cond, model="huge")}

    with pytest.raises(ValueError, match="Unknown model 'huge'"):
        plain().run(noise(1), vp_grid(1), guidance=Weak())
    with pytest.raises(ValueError, match="Unknown prediction type"):
        sampler.denoiser(lambda x, level, c: x, prediction="noise")


def test_rows_left_out_of_a_branch_get_the_conditional_prediction():
    class Half(GuidanceBase):
        name = "half"

        def plan(self, x, span, cond, state):
            return {
                "cond": Branch(cond.cond),
                "uncond": Branch(cond.uncond, rows=torch.tensor([True, False])),
            }

        def combine(self, x, preds, span, state):
            gap = (preds["cond"].out - preds["uncond"].out).tensor()
            assert gap[0].abs().sum() > 0 and gap[1].abs().sum() == 0
            return preds["cond"], state

    engine = sampler.Engine(Counting().denoiser)
    first, grid = engine.start(noise(2), vp_grid(3), cond(2), guidance=Half())
    *_, last = engine.steps(first, grid, cond(2), guidance=Half())
    assert last.nfe == (6, 3)


def test_grad_keeps_the_graph_and_the_default_does_not():
    x = noise(1).requires_grad_()
    assert not plain().run(x, vp_grid(2)).requires_grad
    assert plain().run(x, vp_grid(2), grad=True).requires_grad


def test_half_precision_networks_have_a_float32_state():
    def fn(x, level, _):
        return MIX.out(x.double(), level, "eps").to(torch.bfloat16)

    engine = sampler.Engine(sampler.denoiser(fn))
    x = noise(2, torch.float32)
    low, high = engine.run(x, vp_grid(6)), plain().run(x, vp_grid(6))
    assert low.dtype == torch.float32
    assert (low - high).norm() < 0.05 * high.norm()


def test_flow_model_ends_near_its_data():
    tight = mixture(8, 3, count=1)
    fn = lambda x, level, _: tight.out(x, level, "velocity")  # noqa: E731
    levels = flow_grid(200, high=0.999)
    engine = sampler.Engine(sampler.denoiser(fn, "velocity"))
    x = engine.run(noise(64), levels, sampler={"name": "ab", "order": 2})
    rows = x.flatten(1)
    assert torch.allclose(rows.mean(0), tight.mu[0], atol=0.35)
    assert float(rows.std(0).mean()) == pytest.approx(float(tight.sd[0]), rel=0.15)


def test_guidance_moves_toward_the_condition():
    engine = sampler.Engine(pair_denoiser(mixture(8, 1, count=1), mixture(8, 2)))
    target = mixture(8, 1, count=1).mu[0]
    ends = [
        engine.run(noise(16), vp_grid(20), pair_cond(16), guidance={"name": "cfg", "scale": w})
        for w in (0.0, 1.0)
    ]
    gaps = [float((x.flatten(1) - target).norm(dim=1).mean()) for x in ends]
    assert gaps[1] < gaps[0]
