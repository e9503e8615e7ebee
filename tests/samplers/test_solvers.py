"""The solver pack's equations: weights, shares of noise, identities, orders, spreads."""

import itertools
import json
import math
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.integrate import quad, solve_ivp

import sampler
from sampler import registry
from sampler.samplers.er_sde import ERSDE
from sampler.samplers.multistep_weights import moments, places, simple, weights
from sampler.samplers.shares import share
from sampler.types import Level, Prediction, Span, settle, spans
from tests.analytic import flow_grid, mixture, sigma_grid, vp_grid
from tests.samplers.test_golden_solvers import FOLDER

PACK = [
    "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde", "res_multistep", "er_sde",
    "deis", "gradient_estimation", "unipc", "sa_solver", "dpmpp_sde", "dpmpp_2s", "res_2s",
]  # fmt: skip
TWO = PACK[-3:]


def named(name, **fields):
    return sampler.build("sampler", {"name": name, **fields})


def run(method, levels, x, prediction="eps", **options):
    mix = mixture(6, 5)
    engine = sampler.Engine(
        sampler.denoiser(lambda x, level, _: mix.out(x, level, prediction), prediction)
    )
    return engine.run(x, levels, sampler=method, **options)


def noise(rows=2):
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# the weight function


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("size", [1e-8, 1e-3, 0.5, 1.999, 2.001, 5.0, 40.0, 700.0])
def test_moments_are_the_integrals(size, sign):
    H = sign * size
    top = max(H, 0.0)  # the kernel is divided by its largest value
    near = [1 - 30 / size, 1.0] if H > 60 else [0.0, 30 / size] if H < -60 else [0.0, 1.0]
    whole = quad(lambda s: math.exp(H * s - top), *near, epsrel=1e-13)[0]
    for m, found in enumerate(moments(H, 5)):
        part = quad(lambda s, m=m: math.exp(H * s - top) * s**m, *near, epsrel=1e-13)[0]
        assert found == pytest.approx(part / whole, rel=1e-9)


@pytest.mark.parametrize("count", range(1, 6))
@pytest.mark.parametrize("H", [-3.0, 0.0, 0.7, 9.0, math.inf])
def test_weights_are_exact_for_polynomials(count, H):
    spots = (0.0, -0.8, -1.1, -2.5, -3.1)[:count]
    w, M = weights(spots, H), moments(H, count)
    for m in range(count):
        value = sum(a * s**m for a, s in zip(w, spots, strict=True))
        assert value == pytest.approx(M[m], rel=1e-10, abs=1e-12)


def test_weights_at_the_ends_and_of_nodes_that_coincide():
    assert moments(0.0, 4) == [1, 1 / 2, 1 / 3, 1 / 4]
    assert moments(math.inf, 3) == [1, 1, 1] and moments(-math.inf, 3)[1:] == [0, 0]
    assert simple((1.0, 0.0), 1.5) == pytest.approx((0.75 / -math.expm1(-1.5),) * 1 + (
        1 - 0.75 / -math.expm1(-1.5),))  # fmt: skip
    with pytest.raises(ValueError, match="must be distinct"):
        weights((0.0, -1.0, -1.0), 0.3)


# the noise


def flow_level(s):
    return Level(1000 * s, 1 - s, s)


def vp_level(ratio):
    a = 1 / math.sqrt(1 + ratio * ratio)
    return Level(ratio, a, ratio * a)


@pytest.mark.parametrize("policy", ["eta", "sde", "er", "flow"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_share_and_fresh_noise_make_one(policy, eta):
    for s, after in ((0.9, 0.6), (0.5, 0.5 - 1e-7), (0.2, 1e-6)):
        k, fresh = share(policy, Span(0, flow_level(s), flow_level(after)), eta)
        assert 0 <= k <= 1 and k * k + fresh * fresh == pytest.approx(1, abs=1e-14)
        assert (fresh == 0.0) == (eta == 0)
    close = Span(0, flow_level(0.5), flow_level(0.5 - 1e-12))
    missing = share(policy, close, 1.0).fresh ** 2  # 1 − k² is about 1e-12 here, and not rounded
    assert policy == "er" or missing == pytest.approx(8e-12, rel=1e-3)


@pytest.mark.parametrize("span", [
    Span(0, vp_level(8.0), vp_level(3.0)), Span(0, flow_level(0.7), flow_level(0.4)),
])  # fmt: skip
def test_policies_eta_and_sde_are_one_at_eta_1(span):
    one, other = share("eta", span, 1.0), share("sde", span, 1.0)
    assert one == pytest.approx(other, rel=1e-12)


def test_shares_without_signal():
    start = Span(0, Level(999, 0.0, 1.0), flow_level(0.9))
    assert share("eta", start, 0.6).k == pytest.approx(0.8)
    assert share("sde", start, 1.0) == (0.0, 1.0) == share("er", start, 1.0)
    assert share("sde", start, 0.0) == (1.0, 0.0)
    assert share("flow", start, 1.0).k == pytest.approx(
        (0.81 / 0.19) / 9,
        rel=1e-12,  # sigma_d = 0.81
    )


SAME = {
    "first order": [
        ({"name": "ddim", "eta": 1.0}, None),
        ({"name": "euler_ancestral", "form": "vp"}, None),
        ({"name": "sa_solver", "predictor_order": 1, "corrector_order": 0,
          "interval": (-1.0, 1e9)}, None),
    ],
    "2M SDE without noise": [("dpmpp_2m", None), ({"name": "dpmpp_2m_sde", "eta": 0.0}, None)],
    "RES": [
        ({"name": "res_multistep", "clock": "snr"}, None),
        ({"name": "dpmpp_2m_sde", "eta": 0.0, "solver_type": "heun"}, None),
    ],
    "RES ancestral": [
        ({"name": "res_multistep", "eta": 1.0}, None),
        ({"name": "dpmpp_2m_sde", "solver_type": "heun"}, None),
    ],
    "SEEDS-2": [
        ("dpmpp_sde", None), ({"name": "res_2s", "eta": 1.0, "solver_type": "phi_1"}, None),
    ],
    "Euler": [("ddim", None), ({"name": "gradient_estimation", "gamma": 1.0}, None),
              ({"name": "deis", "order": 1}, None), ({"name": "euler_ancestral", "eta": 0.0}, None),
              ({"name": "er_sde", "order": 1, "eta": 0.0}, None)],
}  # fmt: skip


@pytest.mark.parametrize("grid", [vp_grid(20), flow_grid(20, high=0.99)], ids=["vp", "flow"])
@pytest.mark.parametrize("names", SAME)
def test_methods_that_are_one(names, grid):
    first, *others = (run(spec, grid, noise(), seeds=[3, 4]) for spec, _ in SAME[names])
    for other in others:
        assert (first - other).abs().max() < 1e-10 * first.abs().max()


def test_only_the_ratio_matters():
    """A grid of the same sigma/alpha with alpha = 1 gives the same x/alpha."""
    vp = sigma_grid(12, 8.0, 0.2)
    edm = tuple(Level(v.t, 1.0, v.sigma / v.alpha) for v in vp)
    x = noise()
    for name in PACK:
        method = named(name, **({"interval": (1.0, 5.0)} if name == "sa_solver" else {}))
        one = run(method, vp, x * vp[0].alpha, "x0") / vp[-1].alpha
        assert (one - run(method, edm, x, "x0")).abs().max() < 1e-11 * one.abs().max(), name


# orders


def exact_solution(z, start, end):
    mix = mixture(6, 5)

    def slope(u, z):
        level = vp_level(u)
        return mix.eps(torch.as_tensor(z)[None] * level.alpha, level)[0].numpy()

    found = solve_ivp(slope, (start, end), z[0].numpy(), method="DOP853", rtol=1e-12, atol=1e-12)
    return torch.as_tensor(found.y[:, -1])[None]


ORDERS = [  # and the order that is found, between these two
    ("dpmpp_2m", {}, 1.8, 2.3), ("dpmpp_2m", {"solver_type": "heun"}, 1.8, 2.3),
    ("res_multistep", {}, 1.8, 2.3), ("deis", {}, 1.8, 2.3), ("er_sde", {"eta": 0.0}, 1.8, 2.3),
    ("sa_solver", {"eta": 0.0}, 2.4, 4.2),  # the corrector repairs the Euler start
    ("sa_solver", {"eta": 0.0, "corrector_order": 0}, 1.8, 2.3),
    ("res_2s", {}, 1.8, 2.3), ("dpmpp_2s", {}, 1.8, 2.3), ("res_2s", {"r": 1.0}, 1.8, 2.3),
    ("dpmpp_sde", {"eta": 0.0, "r": 0.3}, 1.8, 2.3),
    ("gradient_estimation", {}, 0.7, 1.2), ("gradient_estimation", {"gamma": 1.5}, 1.8, 2.3),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fields", "low", "high"), ORDERS)
def test_observed_orders(name, fields, low, high):
    z = noise(1) * 8
    right = exact_solution(z, 8.0, 0.5)
    errors = []
    for steps in (160, 320):
        levels = sigma_grid(steps)
        x = run(named(name, **fields), levels, z * levels[0].alpha)
        errors.append(float((x / levels[-1].alpha - right).norm()))
    observed = math.log2(errors[0] / errors[1])
    assert low < observed < high
    assert named(name, **fields).convergence == min(2, round(low))


@pytest.mark.parametrize(("form", "low", "high"), [("exact", 2.8, 3.3), ("published", 1.9, 2.4)])
def test_halving_the_quadratic_term_costs_an_order(form, low, high):
    """From a history on the exact solution, so that the start does not hide it."""
    method, mix, z = named("dpmpp_3m_sde", weights=form, eta=0.0), mixture(6, 5), noise(1) * 8
    errors = []
    for steps in (320, 640):
        levels, state = sigma_grid(steps), ()
        for span in spans(levels):
            now = span.now
            if span.index < 3:
                z_now = exact_solution(z, 8.0, now.sigma / now.alpha) if span.index else z
                x = z_now * now.alpha
            pred = Prediction.from_eps(x, mix.eps(x, now), now)
            x, state = settle(
                (lambda move: (move.mean, move.state))(method.step(x, pred, span, state))
            )
        errors.append(float((x / levels[-1].alpha - exact_solution(z, 8.0, 0.5)).norm()))
    assert low < math.log2(errors[0] / errors[1]) < high


def test_er_sde_integrals_and_their_left_sums():
    rho, end = 3.0, 0.4

    def psi(v):
        return v * (math.exp(v**0.3) + 10)

    exact = [
        (end - rho) + psi(end) * quad(lambda v: 1 / psi(v), end, rho, epsrel=1e-13)[0],
        (end - rho) ** 2 / 2
        + psi(end) * quad(lambda v: (v - rho) / psi(v), end, rho, epsrel=1e-13)[0],
    ]
    assert ERSDE()._factors(rho, end) == pytest.approx(exact, rel=1e-11)
    assert ERSDE(points=100_000)._factors(rho, end) == pytest.approx(exact, rel=1e-4)
    assert ERSDE(points=200)._factors(rho, end) != pytest.approx(exact, rel=1e-4)


# Gaussian data, where every step is linear

GAUSSIAN = {
    "euler_ancestral": {}, "dpmpp_2m_sde": {}, "dpmpp_2m_sde_heun": {"solver_type": "heun"},
    "dpmpp_3m_sde": {}, "er_sde": {"points": 200}, "sa_solver": {},
    "res_multistep_ancestral": {"eta": 1.0}, "dpmpp_2s_ancestral": {"eta": 1.0},
    "seeds_2": {"eta": 1.0, "solver_type": "phi_1"},
}  # fmt: skip


def gaussian_levels(steps, flow):
    if flow:
        sigmas = [*np.linspace(0.98, 0.98 / steps, steps).tolist(), 0.0]
        return [Level(s, 1 - s, s) for s in sigmas]
    high, low = 14.6146 ** (1 / 7), 0.0292 ** (1 / 7)
    ramp = [(high + u * (low - high)) ** 7 for u in np.linspace(0, 1, steps)]
    return [Level(s, 1.0, s) for s in [*ramp, 0.0]]


def spread(method, levels, deviation):
    """Deviation of the result: rows are the responses to x_T and to the noise of each step."""
    levels = method.levels(tuple(levels))
    steps = len(levels) - 1
    first = math.sqrt(levels[0].sigma ** 2 + (levels[0].alpha * deviation) ** 2)
    x = torch.zeros(steps + 1, 1, dtype=torch.float64)
    x[0] = first
    x, state = settle(method.start(x, levels[0]))
    for span in spans(levels):
        a, s = span.now.alpha, span.now.sigma
        x0 = x * (a * deviation**2 / (a * a * deviation**2 + s * s))
        move = method.step(x, Prediction.from_x0(x, x0, span.now), span, state)
        x, state = settle((move.mean, move.state))
        x = x.clone()
        x[span.index + 1] += move.std
    return float(x.square().sum().sqrt())


def gaussian_cases():
    for case in json.loads((FOLDER / "gaussian.json").read_text())["cases"]:
        name = case["function"].removeprefix("sample_")
        wrong = name == "res_multistep_ancestral" and case["flow"]
        if name in GAUSSIAN and not wrong:
            spec = {**GAUSSIAN[name]}
            if name == "sa_solver":  # ComfyUI's 0.2..0.8 of the model's time, in sigma
                spec["interval"] = (
                    (0.2, 0.8) if case["flow"] else (0.5711888670921326, 5.0924081802)
                )
            base = name.removesuffix("_heun").removesuffix("_ancestral")
            name = {"euler": name, "seeds_2": "res_2s"}.get(base, base)
            yield pytest.param(case, {"name": name, **spec}, id=f"{name}-flow{case['flow']}")


@pytest.mark.parametrize(("case", "spec"), gaussian_cases())
def test_spread_of_gaussian_data(case, spec):
    for steps, right in zip(case["steps"], case["std"], strict=True):
        levels = gaussian_levels(steps, case["flow"])
        assert spread(named(**spec), levels, case["data_std"]) == pytest.approx(right, abs=1e-6)


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("spec", [
    {"name": name, **fields}
    for name, fields in (
        ("euler_ancestral", {}), ("dpmpp_2m_sde", {}), ("dpmpp_3m_sde", {}), ("er_sde", {}),
        ("sa_solver", {"interval": (0.1, 5.0)}), ("res_multistep", {"eta": 1.0}),
        ("dpmpp_sde", {}), ("dpmpp_2s", {"eta": 1.0}), ("res_2s", {"eta": 1.0}),
    )
], ids=lambda spec: spec["name"])  # fmt: skip
def test_stochastic_results_tend_to_the_data(spec, flow):
    method = named(**spec)
    gaps = [abs(spread(method, gaussian_levels(n, flow), 0.5) - 0.5) for n in (20, 160)]
    assert gaps[1] < 0.013 and gaps[1] < gaps[0] / 3


# rules for all


@pytest.mark.parametrize("prediction", ["v", "x0"])
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("name", PACK)
def test_few_steps_from_no_signal(name, steps, prediction):
    """The last step is the prediction, the first of the first order, whatever the order."""
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    levels = [Level(1000 * t, 1 - t, t) for t in times]
    seen = []

    def fn(x, level, cond):
        x0 = torch.full_like(x, len(seen) + 1.0)
        seen.append(level.t)
        pred = Prediction.from_x0(x, x0, level)
        return getattr(pred, prediction).tensor()

    x = sampler.Engine(sampler.denoiser(fn, prediction)).run(noise(), levels, sampler=name)
    count = len(sampler.build("sampler", name).levels(tuple(levels))) - 1
    assert torch.allclose(x, torch.full_like(x, float(count)), atol=1e-12) and len(seen) == count
    assert count == (2 * steps - 2 + (steps == 1) if name in TWO else steps)


@pytest.mark.parametrize("name", PACK)
def test_a_target_with_noise_is_an_ordinary_step(name):
    levels = sigma_grid(6, 8.0, 0.5)
    assert run(name, levels, noise()).isfinite().all()


@pytest.mark.parametrize("name", PACK)
def test_levels_must_fall(name):
    levels = list(vp_grid(5))
    for broken in ([*levels[:3], levels[2], *levels[3:]], [levels[1], levels[0], *levels[2:]]):
        with pytest.raises(ValueError, match=r"must lie below the one before, t = \d+") as error:
            run(name, broken, noise())
        assert str(error.value).startswith(name) and error.value.args[0].count(". ") == 0


@pytest.mark.parametrize(
    "name", [n for n in PACK if n not in ("euler_ancestral", "gradient_estimation")]
)
def test_rows_at_different_levels_are_refused(name):
    s = torch.tensor([0.9, 0.5], dtype=torch.float64)
    now, after = Level(s, 1 - s, s), Level(s / 2, 1 - s / 2, s / 2)
    pred = Prediction.from_x0(noise(), noise(), now)
    with pytest.raises(ValueError, match="all samples at one level"):
        named(name).step(noise(), pred, Span(0, now, after), ())


def test_euler_ancestral_takes_rows_at_different_levels():
    s = torch.tensor([[0.9], [0.5]], dtype=torch.float64)
    x = noise()
    for form in ("auto", "vp"):
        method = named("euler_ancestral", form=form)
        now, after = Level(s, 1 - s, s), Level(s / 2, 1 - s / 2, s / 2)
        together = method.step(x, Prediction.from_x0(x, 0.3 * x, now), Span(0, now, after), ())
        for row, value in enumerate((0.9, 0.5)):
            one = x[row : row + 1]
            now, after = flow_level(value), flow_level(value / 2)
            alone = method.step(
                one, Prediction.from_x0(one, 0.3 * one, now), Span(0, now, after), ()
            )
            assert torch.allclose(settle(together.mean)[row], settle(alone.mean)[0], rtol=1e-12)
            assert float(settle(together.std)[row]) == pytest.approx(alone.std, rel=1e-12)


BAD = {
    "res_multistep": [{"order": 4}, {"order": 0}, {"eta": -1}, {"clock": "rho"}, {"s_noise": -1}],
    "dpmpp_2m": [{"solver_type": "trapezoid"}, {"clock": "time"}],
    "dpmpp_3m_sde": [{"weights": "halved"}],
    "euler_ancestral": [{"eta": 1.2}, {"form": "flow"}],
    "er_sde": [{"points": 9}, {"order": 4}],
    "deis": [{"order": 4}],
    "gradient_estimation": [{"gamma": 0.9}],
    "unipc": [{"order": 4}, {"variant": "bh3"}],
    "res_2s": [{"r": 0.0}, {"r": 1.1}, {"solver_type": "phi_3"}, {"eta": -0.1}],
    "dpmpp_sde": [{"eta": 1.1}],
    "dpmpp_2s": [{"s_noise": -1.0}],
    "sa_solver": [{"interval": (5, 1)}, {"predictor_order": 0}, {"corrector_order": 6}],
}


@pytest.mark.parametrize(("name", "fields"), [(n, f) for n, all_ in BAD.items() for f in all_])
def test_bad_settings_are_refused_by_name(name, fields):
    with pytest.raises(ValueError, match=rf"^{name}: {next(iter(fields))} = ") as error:
        named(name, **fields)
    text = str(error.value)
    assert text.endswith(".") and not re.search(r"[.!?] +[A-Z]", text)


@pytest.mark.parametrize("name", PACK)
def test_eta_0_draws_nothing_and_seeds_change_the_rest(name):
    levels, x = vp_grid(8), noise()
    fields = registry.describe("sampler", name)["fields"]
    if name == "sa_solver":
        fields = [*fields, {"name": "interval"}]
    noisy = any(entry["name"] == "eta" for entry in fields)
    if not noisy:
        assert not named(name).stochastic
        return
    quiet, loud = named(name, eta=0.0), replace(named(name), eta=1.0)
    assert not quiet.stochastic and quiet.convergence is not None
    assert loud.stochastic and loud.convergence is None
    one, two = (run(quiet, levels, x, seeds=s) for s in ([1, 2], [8, 9]))
    assert torch.equal(one, two)
    one, two = (run(loud, levels, x, seeds=s) for s in ([1, 2], [1, 9]))
    assert torch.equal(one[0], two[0]) and not torch.equal(one[1], two[1])


def test_pece_evaluates_inner_levels_twice():
    levels = vp_grid(6)
    walked = named("sa_solver", pece=True).levels(levels)
    assert len(walked) == 2 * 6 - 1 + 1
    assert [level for level, _ in itertools.groupby(walked)] == list(levels)


def test_state_holds_order_plus_one_latents_at_most():
    mix, x = mixture(6, 5), noise()
    for name, order in (("dpmpp_3m_sde", 3), ("res_multistep", 2), ("er_sde", 3), ("deis", 2)):
        method, state, latents = named(name), (), x
        for span in spans(vp_grid(8))[:-1]:
            pred = Prediction.from_eps(latents, mix.eps(latents, span.now), span.now)
            latents, state = settle(
                (lambda move: (move.mean, move.state))(method.step(latents, pred, span, state))
            )
        held = str(state).count("tensor(")
        assert held == order - 1, name


def test_a_short_run_of_3m_sde_warns():
    with pytest.warns(UserWarning, match="dpmpp_3m_sde overshoots in runs of fewer than 25 steps"):
        run("dpmpp_3m_sde", vp_grid(10), noise())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run("dpmpp_3m_sde", vp_grid(25), noise())
        run(named("dpmpp_3m_sde", eta=0.0), vp_grid(10), noise())


def test_a_short_run_of_res_multistep_on_a_flow_model_warns():
    with pytest.warns(UserWarning, match="overshoots on flow models in runs of fewer than 8"):
        run("res_multistep", flow_grid(7)[1:], noise())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run("res_multistep", flow_grid(9)[1:], noise())
        run("res_multistep", vp_grid(5), noise())
        run(named("res_multistep", order=1), flow_grid(7)[1:], noise())


def test_places():
    assert places((1.0, 0.0, -1.0), 3.0) == (0.0, -0.5, -1.0)


def test_times_of_middle_levels_are_the_schedules():
    """vp: interpolated in ln(sigma/alpha) over the table; without a schedule, between the two."""
    table = sampler.Schedule.from_config(
        {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
        "DDIMScheduler",
    )
    grid = table.grid(4)
    plain, bound = named("res_2s"), named("res_2s").with_schedule(table)
    assert bound == plain and registry.spec_of(bound) == registry.spec_of(plain)
    for walked, exact in ((plain.levels(grid), False), (bound.levels(grid), True)):
        now, middle, after = walked[:3]
        assert middle.sigma / middle.alpha == pytest.approx(
            math.sqrt(now.sigma / now.alpha * after.sigma / after.alpha)
        )
        at = table.level(middle.t)  # the table itself is interpolated in sigma/alpha
        assert (abs(at.sigma / middle.sigma - 1) < 1e-4) == exact
    flow = sampler.Schedule.from_config({"shift": 3.0}, "FlowMatchEulerDiscreteScheduler")
    for level in named("dpmpp_2s").with_schedule(flow).levels(flow.grid(5)):
        assert level.t == pytest.approx(1000 * level.sigma)
    edm = sampler.Schedule.from_config({}, "EDMEulerScheduler")
    for level in named("dpmpp_sde").with_schedule(edm).levels(edm.grid(5))[:-1]:
        assert level.alpha == 1 and level.t == pytest.approx(math.log(level.sigma) / 4)
