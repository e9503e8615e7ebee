"""Options of `cfg`: scales, tangential, damp and norm_limit against the published codes."""

from pathlib import Path

import numpy as np
import pytest
import torch

import sampler
from sampler import registry
from tests.analytic import vp_grid
from tests.guidance.golden import combine, relative, tensor
from tests.laws.world import Counting, cond, noise, run

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "guidance_pack" / "cfg_forms.npz")
DTYPES = [(torch.float64, 1e-9), (torch.float32, 1e-6)]
FORMS = {
    "tcfg": {"tangential": True},
    "mambo": {"damp": float(GOLDEN["mambo_alpha"])},
    "comfy_cfg_norm": {"norm_limit": 1.0, "match_norm": [1]},
    "per_sample_clip": {"norm_limit": 1.0},
}


def cfg(**fields):
    return registry.build("guidance", {"name": "cfg", **fields})


@pytest.mark.parametrize(("dtype", "bar"), DTYPES)
@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize("form", FORMS)
def test_the_published_forms(form, case, dtype, bar):
    rule = cfg(scale=float(GOLDEN["scales"][case]), **FORMS[form])
    values = {k: tensor(GOLDEN[k], dtype) for k in ("cond", "uncond")}
    found, _ = combine(rule, **values)
    assert found.dtype == dtype and relative(found, GOLDEN[form][case]) <= bar


@pytest.mark.parametrize(
    "fields", [*FORMS.values(), {**FORMS["tcfg"], "damp": 8.0, "rescale": 0.5}]
)
def test_degenerate_predictions_are_finite(fields):
    zero, one = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    for c, u in ((zero, zero), (one, zero), (zero, one), (one, one)):
        found, _ = combine(cfg(scale=4.0, **fields), cond=c, uncond=u)
        assert found.isfinite().all()


def test_samples_do_not_see_each_other():
    values = {k: tensor(GOLDEN[k], torch.float64) for k in ("cond", "uncond")}
    rule = cfg(scale=5.0, tangential=True, damp=4.0, norm_limit=0.9)
    together, _ = combine(rule, **values)
    for b in range(3):
        alone, _ = combine(rule, **{k: v[b : b + 1] for k, v in values.items()})
        assert torch.equal(alone[0], together[b])


def test_scales_are_one_per_step_and_cost_what_they_need():
    scales = [3.0, 1.0, 0.0, 2.0]
    counting, levels, x = Counting(), vp_grid(4), noise(2)
    engine = sampler.Engine(counting.denoiser)
    found = engine.run(x, levels, cond(2), "ddim", cfg(scales=scales))
    assert counting.rows == [4, 2, 2, 4]
    for index, scale in enumerate(scales):
        snapshot, grid = engine.start(x, levels[index : index + 2], cond(2), "ddim", "none")
        x = engine.run(x, levels[index : index + 2], cond(2), "ddim", cfg(scale=scale))
    assert torch.equal(found, x)
    with pytest.raises(ValueError, match="4 scales for 5 steps"):
        run("ddim", cfg(scales=scales), vp_grid(5), noise(1))


def test_scale_one_is_the_conditional_model_with_every_option():
    plain = run("ddim", "none", vp_grid(5), noise(2))
    for fields in ({"damp": 8.0}, {"norm_limit": 1.0}, {"scales": [1.0] * 5}):
        fields = fields if "scales" in fields else {"scale": 1.0, **fields}
        assert torch.equal(run("ddim", cfg(**fields), vp_grid(5), noise(2)), plain)


@pytest.mark.parametrize(
    "fields",
    [
        {"scales": []},
        {"scales": [1.0], "scale": 3.0},
        {"scales": [-1.0]},
        {"damp": -1.0},
        {"norm_limit": 0.0},
    ],
)
def test_settings_that_are_refused(fields):
    with pytest.raises(ValueError, match="cfg"):
        cfg(**fields)
