"""Every rule against the golden vectors, within the bars of their description."""

import numpy as np
import pytest
import torch
from sampler_kernels import settle

import sampler
from sampler.guidance.gates import inside
from sampler.guidance.linear_ag_coefficients import Coefficients, gram_of, solve
from sampler.guidance.spaces import cosine
from sampler.samplers.ddim import DDIM
from sampler.types import Cond, Level, Lin, Prediction, Span
from tests.guidance.golden import combine, load, relative, span, tensor


def build(name, **fields):
    return sampler.build("guidance", {"name": name, **fields})


def test_cfg_and_rescale():
    z = load("cfg")
    c, u = tensor(z["cond"]), tensor(z["uncond"])
    for i, scale in enumerate(z["scales"].tolist()):
        assert relative(combine(build("cfg", scale=scale), cond=c, uncond=u)[0], z["cfg"][i]) < 2e-7
        for j, phi in enumerate(z["rescales"].tolist()):
            rule = build("cfg", scale=scale, rescale=phi)
            out = combine(rule, cond=c, uncond=u)[0]
            assert relative(out, z["cfg_rescaled"][i, j]) < 5e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cfg_in_half_precision_is_as_good_as_rounding_the_exact_answer(dtype):
    z = load("cfg")
    for i, scale in enumerate(z["scales"].tolist()):
        c, u = tensor(z["cond"], dtype), tensor(z["uncond"], dtype)
        exact = u.double() + scale * (c.double() - u.double())
        found = combine(build("cfg", scale=scale), cond=c, uncond=u)[0].to(dtype)
        rounding = relative(exact.to(dtype), exact)
        assert relative(found, exact) <= 1.02 * rounding + 1e-12, (i, scale)


@pytest.mark.parametrize("config", range(6))
@pytest.mark.parametrize("formulation", ["paper", "diffusers"])
def test_apg_trajectories_with_their_buffer(config, formulation):
    z = load("apg")
    scale, momentum, threshold, eta = z["configs"][config].tolist()
    momentum = 0.0 if np.isnan(momentum) else momentum
    rule = build(
        "apg",
        scale=scale,
        momentum=momentum,
        norm_threshold=threshold,
        eta=eta,
        space="native",
        formulation=formulation,
    )
    expected = z["out_paper" if formulation == "paper" else "out_diffusers_default"][config]
    state = rule.start(Cond())
    for t in range(8):
        c, u = tensor(z["cond"][t]), tensor(z["uncond"][t])
        out, state = combine(rule, state=settle(state), cond=c, uncond=u)
        assert relative(out, expected[t]) < 5e-7
        if momentum:
            assert relative(state.tensor(), z["buffer"][config, t]) < 5e-7


@pytest.mark.parametrize(
    "kind, space, key",
    [
        ("eps", "x0", "eps_from_x0space"),
        ("eps", "eps", "eps_from_epsspace"),
        ("v", "x0", "v_from_x0space"),
        ("velocity", "x0", "flow_v_from_x0space"),
    ],
)
def test_apg_works_in_the_space_it_is_told(kind, space, key):
    z = load("apg_spaces")
    scale, momentum, threshold, eta = z["config"].tolist()
    rule = build(
        "apg", scale=scale, momentum=momentum, norm_threshold=threshold, eta=eta, space=space
    )
    state = rule.start(Cond())
    for t in range(5):
        s = float(z["flow_sigma"][t])
        bar = float(z["alpha_bar"][t])
        level = Level(t, 1 - s, s) if kind == "velocity" else Level(t, bar**0.5, (1 - bar) ** 0.5)
        out, state = combine(
            rule,
            Span(t, level, level),
            state,
            kind,
            tensor(z["x_t"][t]),
            cond=tensor(z["pred_cond"][t]),
            uncond=tensor(z["pred_uncond"][t]),
        )
        # x0 = (x − s·eps)/a and back costs 1/a of float32's rounding at the noisy end
        assert relative(out, z[key][t]) < 2e-6


@pytest.mark.parametrize(
    "prefix, axes, key",
    [
        ("video", None, "video_out"),
        ("tokens", None, "tokens_out"),
        ("tokens", (1,), "tokens_out_axis1"),
        ("acestep", (2, 3), "acestep_out_axes_hw"),
        ("acestep", (-1, -2), "acestep_out_axes_hw"),
    ],
)
def test_apg_norms_over_the_axes_it_is_told(prefix, axes, key):
    z = load("apg_axes")
    scale, momentum, threshold, eta = z["config"].tolist()
    rule = build(
        "apg",
        scale=scale,
        momentum=momentum,
        norm_threshold=threshold,
        eta=eta,
        space="native",
        axes=axes,
    )
    c, u = tensor(z[f"{prefix}_cond"]), tensor(z[f"{prefix}_uncond"])
    assert relative(combine(rule, cond=c, uncond=u)[0], z[key]) < 5e-7


def test_apg_corners():
    z = load("edge")
    c, zero_c_u = tensor(z["cond"]), tensor(z["zero_cond_uncond"])
    plain = {"momentum": 0.0, "norm_threshold": 0.0, "space": "native"}
    for clip in (0.0, 3.0):
        same = combine(
            build("apg", scale=10.0, space="native", norm_threshold=clip), cond=c, uncond=c
        )
        assert torch.equal(same[0], c)
    out = combine(build("apg", scale=3.0, **plain), cond=torch.zeros_like(c), uncond=zero_c_u)[0]
    assert relative(out, z["zero_cond_w3"]) < 5e-7
    assert torch.equal(combine(build("apg", scale=1.0), cond=c, uncond=zero_c_u)[0], c)
    out = combine(build("apg", scale=0.0, eta=1.0, **plain), cond=c, uncond=zero_c_u)[0]
    assert relative(out, z["w0_eta1"]) < 5e-7


def test_cfg_zero():
    z = load("cfg_zero_star")
    c, u = tensor(z["cond"]), tensor(z["uncond"])
    for i, scale in enumerate(z["scales"].tolist()):
        rule = build("cfg_zero", scale=scale, zero_init_steps=0)
        assert relative(combine(rule, kind="velocity", cond=c, uncond=u)[0], z["out"][i]) < 2e-7


def decisions(rule, c, u):
    """Rows evaluated at each step [T, B], and the guided outputs."""
    state, asked, outs = rule.start(Cond()), [], []
    for t in range(c.shape[0]):
        branches = rule.plan(c[t], span(t), Cond(), state)
        rows = torch.zeros(c.shape[1], dtype=torch.bool)
        if "uncond" in branches:
            rows = branches["uncond"].rows
            rows = torch.ones(c.shape[1], dtype=torch.bool) if rows is None else rows
        asked.append(rows)
        given = {"cond": c[t]}
        if rows.any():
            mask = rows.view(-1, *(1,) * (c.ndim - 2))
            given["uncond"] = torch.where(mask, u[t], c[t])
        out, state = combine(rule, span(t), state, **given)
        state = settle(state)
        outs.append(out)
    return torch.stack(asked), torch.stack(outs)


@pytest.mark.parametrize("index", range(6))
def test_adaptive_guidance_decides_as_the_tables_say(index):
    z = load("adaptive_guidance")
    c, u = tensor(z["eps_cond"]), tensor(z["eps_uncond"])
    fields = {"threshold": float(z["thresholds"][index]), "rule": {"name": "cfg", "scale": 7.5}}
    rows, outs = decisions(build("adaptive", **fields), c, u)
    assert rows.tolist() == z["use_cfg_per_sample"][index].tolist()
    assert (20 + rows.sum(0)).tolist() == z["nfe_per_sample"][index].tolist()
    if index == int(z["guided_threshold_index"]):
        assert relative(outs, z["guided"]) < 1e-6

    together, same = decisions(build("adaptive", compact="batch", **fields), c, u)
    assert together.any(1).tolist() == z["use_cfg_until_all_converged"][index].tolist()
    assert torch.equal(together.any(1), together.all(1)) and torch.equal(same, outs)

    # one row that holds the whole batch decides as implementations that flatten the batch do
    flat, _ = decisions(build("adaptive", **fields), c.reshape(20, 1, -1), u.reshape(20, 1, -1))
    assert flat[:, 0].tolist() == z["use_cfg_flattened_batch"][index].tolist()
    assert 3 * int(20 + flat.sum()) == int(z["nfe_flattened_batch"][index])


def test_adaptive_guidance_measures_the_cosine():
    z = load("adaptive_guidance")
    for t in range(20):
        c, u = tensor(z["eps_cond"][t]), tensor(z["eps_uncond"][t])
        found = cosine(Lin.of(c), Lin.of(u))
        assert (found.double() - torch.as_tensor(z["gamma"][t])).abs().max() < 1e-6


@pytest.mark.parametrize("index", range(6))
def test_lag_costs_at_most_one_pass_more(index):
    z = load("adaptive_guidance")
    c, u = tensor(z["eps_cond"]), tensor(z["eps_uncond"])
    fields = {"threshold": float(z["thresholds"][index])}
    exact, lagging = (decisions(build("adaptive", lag=k, **fields), c, u)[0] for k in (0, 1))
    extra = lagging.sum(0) - exact.sum(0)
    stopped = exact.sum(0) < 20
    assert torch.equal(extra, stopped.int() * (exact.sum(0) < 20))
    assert (lagging | ~exact).all()


def test_linear_ag_fit_and_prediction():
    z = load("linear_ag")
    n, steps = int(z["n_train"]), z["eps_cond"].shape[1]
    c, u = (tensor(z[k]).transpose(0, 1) for k in ("eps_cond", "eps_uncond"))  # [T, N, D]
    gram = gram_of(list(c[:, :n]), list(u[:, :n]))
    fitted = solve(gram, {"scale": float(z["scale"])}, ridge=0.0)
    for t in range(steps):
        expected = z["coef"][t]
        assert relative(tensor(fitted.cond[t], torch.float64), expected[: t + 1]) < 1e-6
        if t:
            found = tensor(fitted.uncond[t], torch.float64)
            assert relative(found, expected[steps : steps + t]) < 1e-6
    policy = tuple(int(p) for p in z["policy_eval_uncond"])
    rule = build("linear_ag", coefficients=fitted, policy=policy)
    state, rows = rule.start(Cond()), 0
    for t in range(steps):
        branches = rule.plan(c[t, n:], span(t), Cond(), state)
        rows += len(branches)
        given = {"cond": c[t, n:]}
        if "uncond" in branches:
            given["uncond"] = u[t, n:]
        out, state = combine(rule, span(t), state, **given)
        state = settle(state)
        assert relative(state.uncond[-1], z["uncond_used"][:, t]) < 1e-5
        assert relative(out, z["guided"][:, t]) < 1e-5
    assert rows == int(z["nfe"])


def test_linear_ag_default_ridge_changes_predictions_by_little():
    z = load("linear_ag")
    n = int(z["n_train"])
    c, u = (tensor(z[k], torch.float64).transpose(0, 1) for k in ("eps_cond", "eps_uncond"))
    exact, damped = (
        solve(gram_of(list(c[:, :n]), list(u[:, :n])), {}, ridge=r) for r in (0.0, 1e-8)
    )
    assert exact != damped
    for t in range(c.shape[0]):
        past = tuple(c[: t + 1, n:]), tuple(u[:t, n:])
        a, b = (
            build("linear_ag", coefficients=k).predicted(*past).tensor() for k in (exact, damped)
        )
        assert relative(a, b) < 1e-5


def test_coefficients_survive_their_file(tmp_path):
    known = Coefficients(((1.5,), (0.25, -1e-9)), ((), (0.125,)), {"scale": 3.0})
    known.save(tmp_path / "k.json")
    loaded = Coefficients.load(tmp_path / "k.json")
    assert (loaded.cond, loaded.uncond, loaded.keys) == (known.cond, known.uncond, known.keys)


def test_autoguidance():
    z = load("autoguidance_interval")
    main, weak = tensor(z["d_main"]), tensor(z["d_weak"])
    for i, scale in enumerate(z["scales"].tolist()):
        out = combine(build("autoguidance", scale=scale), kind="x0", cond=main, weak=weak)[0]
        assert relative(out, z["out"][i]) < 2e-7


def test_interval_and_step_windows():
    z = load("autoguidance_interval")
    interval = float(z["sigma_lo"]), float(z["sigma_hi"])
    found = [inside(interval, Level(0, 1.0, float(s))) for s in z["edm_sigmas"]]
    assert found == z["inside_lo_exclusive_hi_inclusive"].tolist()
    for steps, start, stop, count, first in z["step_fraction_table"].tolist():
        window = int(start * steps), int(stop * steps)  # as diffusers' guiders truncate them
        on = [i for i in range(int(steps)) if window[0] <= i < window[1]]
        assert (len(on), on[0] if on else -1) == (int(count), int(first))
        rule = build("cfg", window=window)
        asked = ["uncond" in rule.plan(None, span(i), Cond(1, 0), ()) for i in range(int(steps))]
        assert asked == [i in on for i in range(int(steps))]


def test_gfcg_reconstruction():
    z = load("gfcg_reconstruction")
    target = torch.as_tensor(z["target"])
    for name, key in (("confusion", "scale_confusion"), ("ratio", "scale_ratio")):
        rule = build("gfcg", strength=float(z["strength"]), confidence=name)
        for t in range(6):
            judged = rule.judge(tensor(z["logits"][t]), target)
            assert judged.reference.tolist() == z["reference_class"][t].tolist()
            assert relative(1 + judged.gain, z[key][t]) < 1e-6


def test_gfcg_combination_alone_and_with_cfg():
    z = load("gfcg_reconstruction")
    target = torch.as_tensor(z["target"])
    both = build(
        "sum",
        rules=[
            {"name": "gfcg", "strength": float(z["strength"])},
            {"name": "cfg", "scale": float(z["cfg_scale"])},
        ],
    )
    at = Span(3, Level(9, 1.0, 3.0), Level(0, 1.0, 0.0))
    for t in range(6):
        d = {k: tensor(z[f"d_{v}"][t]) for k, v in (("cond", "target"), ("reference",) * 2)}
        judged = both.rules[0].judge(tensor(z["logits"][t]), target)
        out, _ = combine(both.rules[0], at, judged, "x0", **d)
        assert relative(out, z["guided_confusion"][t]) < 1e-6
        out, _ = combine(both, at, (judged, ()), "x0", uncond=tensor(z["d_uncond"][t]), **d)
        assert relative(out, z["guided_confusion_plus_cfg"][t]) < 1e-6


@pytest.mark.parametrize("key", ["cfg_ddim", "cfg_flow_euler", "apg_x0space_ddim"])
def test_rule_and_sampler_in_one_step(key):
    z = load("fused_step")
    now, after = float(z["alpha_bar_t"]), float(z["alpha_bar_prev"])
    at = Span(0, *(Level(0, a**0.5, (1 - a) ** 0.5) for a in (now, after)))
    kind = "eps"
    if key == "cfg_flow_euler":
        at = Span(0, *(Level(0, 1 - s, s) for s in (float(z["sigma_t"]), float(z["sigma_next"]))))
        kind = "velocity"
    if key == "apg_x0space_ddim":
        scale, momentum, threshold, eta = z["apg_config"].tolist()
        rule = build("apg", scale=scale, momentum=momentum, norm_threshold=threshold, eta=eta)
    else:
        rule = build("cfg", scale=float(z["scale"]))
    x = tensor(z["x"])
    predictions = {k: Prediction.of(kind, x, tensor(z[k]), at.now) for k in ("cond", "uncond")}
    guided, _ = rule.combine(x, predictions, at, rule.start(Cond()))
    moved = DDIM().step(x, guided, at, ()).mean
    assert relative(settle(moved), z[key]) < 1e-6
