"""`forecast`: weights and decisions against the published codes, rows, composition, refusals."""

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import sampler
from sampler import registry
from sampler.core.graphs import GraphedRuns
from sampler.core.trajectory import Run
from sampler.guidance.forecast_weights import polynomial, windowed
from sampler.types import Level, Prediction, Span
from tests.analytic import flow_grid, mixture, sigma_grid, vp_grid
from tests.guidance.golden import relative
from tests.guidance.stock import SCALE, STOCK, Rows
from tests.laws.world import Counting, cond, noise, run
from tests.test_graphs import Recorded

GOLDEN = Path(__file__).parents[1] / "golden" / "guidance_pack"
WEIGHTS = np.load(GOLDEN / "forecast_weights.npz")
EASY = np.load(GOLDEN / "easycache.npz")
CFG = {"name": "cfg", "scale": 3.0}
EVERY_SECOND = [1, 1, 1, *[0, 1] * 8, 1]


def forecast(**fields):
    return registry.build("guidance", {"name": "forecast", **fields})


def walked(rule, levels, x, conditions=None, method="ddim", counting=None):
    """(last snapshot, rows of each network call)."""
    counting = counting or Counting()
    engine = sampler.Engine(counting.denoiser)
    conditions = conditions or cond(x.shape[0])
    snapshot, grid = engine.start(x, levels, conditions, method, rule)
    *_, last = engine.steps(snapshot, grid, conditions, method, rule)
    return last, counting.rows


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float64, 1e-9), (torch.float32, 1e-6)])
@pytest.mark.parametrize("case", range(5))
def test_spectrum_s_forecast(case, dtype, bar):
    """The rule itself, fed with the history at its step numbers."""
    count, target = int(WEIGHTS["count"][case]), int(WEIGHTS["target"][case])
    times = WEIGHTS["times"][case][:count].tolist()
    policy = [1 if i in times else 0 for i in range(target)] + [0, 1]
    rule = forecast(
        rule="none",
        policy=policy,
        basis="chebyshev",
        degree=int(WEIGHTS["M"][case]),
        ridge=float(WEIGHTS["lam"][case]),
        blend=float(WEIGHTS["w"][case]),
    )
    history = torch.as_tensor(WEIGHTS["history"]).to(dtype)
    x, state = torch.zeros_like(history[0])[None], rule.start(sampler.Cond())
    level = Level(500, 0.6, 0.8)
    for index in range(target + 1):
        span = Span(index, level, Level(0, 1.0, 0.0), len(policy))
        preds = {}
        if rule.plan(x, span, sampler.Cond(), state):
            value = history[times.index(index)][None]
            preds = {"cond": Prediction.from_eps(x, value, level)}
        pred, state = rule.combine(x, preds, span, state)
        state = sampler.settle(state)
    assert relative(pred.eps.tensor()[0], WEIGHTS["forecast"][case]) <= bar


def test_spectrum_s_windows():
    for case, expected in zip(WEIGHTS["window_cases"], WEIGHTS["window_real"], strict=True):
        steps, warmup, window, growth, count = case.tolist()
        found = windowed(int(steps), int(warmup), window, growth, 0)
        assert "".join(str(int(due)) for due in found) == expected and sum(found) == count


@pytest.mark.parametrize("form", ["authors", "comfyui"])
@pytest.mark.parametrize("case", range(3))
def test_easycache_s_decisions_and_images(form, case):
    name = "authors" if form == "authors" else "comfy_easy"
    start, end = (int(EASY[k]) for k in ("start_step", "end_step"))
    outputs, sigmas = torch.as_tensor(EASY["outputs"]).double(), EASY["sigmas"].tolist()
    levels = [Level(i, 1 - s, s) for i, s in enumerate(sigmas)]
    real = np.zeros((20, 3), dtype=int)

    def fn(x, level, rows):
        real[level.t, rows] += 1
        return outputs[level.t, rows] + 0.1 * x

    rule = forecast(
        rule="none",
        when="change",
        form=form,
        threshold=float(EASY["thresholds"][case]),
        warmup=start,
        last=20 - end,
    )
    engine = sampler.Engine(sampler.denoiser(fn, "velocity"))
    x = engine.run(torch.as_tensor(EASY["x0"]).double(), levels, torch.arange(3), "ddim", rule)
    assert (real == EASY[f"{name}_real_per_row"][case]).all()
    assert relative(x, EASY[f"{name}_final"][case]) <= 1e-9


def test_polynomials_are_exact_and_bounded():
    clocks = np.array(
        [[7.0, 5.0, 4.0], [6.0, 5.0, 4.0], [7.0, 5.0, math.nan], [7.0, math.nan] * 1 + [math.nan]]
    )
    weights = polynomial(clocks, 8.0, 2)
    assert np.allclose(weights.sum(1), 1)
    assert weights[0] @ clocks[0] ** 2 == pytest.approx(64)
    assert weights[1].tolist() == [3.0, -2.0, 0.0]  # Σ|w| of the parabola is 9
    assert weights[2].tolist() == [1.5, -0.5, 0.0] and weights[3].tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(("order", "method"), [(0, "ab"), (1, "ab"), (2, "ab"), (1, "ddim")])
def test_order_of_convergence_with_every_second_step_forecast(order, method):
    """A forecast of order p leaves the sampler's order where that is at most p + 1."""
    mix = mixture(6, 5)
    engine = sampler.Engine(sampler.denoiser(lambda x, level, _: mix.eps(x, level)))
    z = noise(1).flatten(1)[:, :6] * 8.0
    spec = {"name": "ab", "order": 3} if method == "ab" else method

    def end(steps, rule, spec):
        levels = sigma_grid(steps)
        return engine.run(z * levels[0].alpha, levels, sampler=spec, guidance=rule)

    exact = end(1280, "none", {"name": "ab", "order": 3})
    errors = []
    for steps in (160, 320, 640):
        policy = [1, 1, 1, 1] + [0, 1] * ((steps - 4) // 2)
        rule = forecast(rule="none", policy=policy, order=order)
        errors.append(float((end(steps, rule, spec) - exact).norm()))
    own = 1.0 if method == "ddim" else 3.0
    assert math.log2(errors[1] / errors[2]) >= min(order + 1, own) - 0.35, errors


def test_rows_decide_for_themselves_and_are_counted():
    rule = forecast(warmup=2, tolerance=0.2)
    last, rows = walked(rule, vp_grid(20), noise(3))
    assert len(set(last.nfe)) > 1 and sum(rows) == sum(last.nfe)
    for batch in (1, 8):
        last, rows = walked(rule, vp_grid(20), torch.cat([noise(3)] * 3)[:batch])
        assert sum(rows) == sum(last.nfe)
    together, rows = walked(
        forecast(warmup=2, tolerance=0.2, compact="batch"), vp_grid(20), noise(3)
    )
    assert len(set(together.nfe)) == 1 and set(rows) == {6}


@pytest.mark.parametrize(
    "fields", [{"policy": EVERY_SECOND}, {"when": "window"}, {"when": "window", "growth": 0.25}]
)
def test_fixed_patterns_cost_what_they_say(fields):
    rule = forecast(rule=CFG, **fields)
    pattern = EVERY_SECOND if rule.policy else windowed(20, 4, 2.0, rule.growth, 1)
    for batch in (1, 3, 8):
        last, rows = walked(rule, vp_grid(20), noise(batch))
        assert rows == [2 * batch] * sum(pattern) and last.nfe == (2 * sum(pattern),) * batch


def test_three_samples_of_different_patterns_are_what_each_is_alone():
    """Samples with other patterns in one batch: images of one do not depend on the others."""
    rule = forecast(warmup=2, tolerance=0.2)
    together, _ = walked(rule, vp_grid(20), noise(3))
    for row in range(3):
        alone, _ = walked(rule, vp_grid(20), noise(3)[row : row + 1])
        assert torch.equal(alone.x[0], together.x[row]) and alone.nfe[0] == together.nfe[row]


def test_at_most_order_plus_one_predictions_are_kept():
    rule, engine = forecast(order=2), sampler.Engine(Counting().denoiser)
    snapshot, grid = engine.start(noise(2), vp_grid(20), cond(2), "ddim", rule)
    for snapshot in engine.steps(snapshot, grid, cond(2), "ddim", rule):
        assert len(snapshot.guidance.history.values) <= 3


def test_the_history_is_dropped_where_the_rule_stops_guiding():
    """A window's end is a jump of g: the step is evaluated, and nothing crosses it."""
    rule = forecast(rule={**CFG, "window": [0, 11]}, when="window", window=3, growth=0)
    last, rows = walked(rule, vp_grid(20), noise(1))
    assert rows == [2, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1]  # steps 0-3, 6, 9; 11, 14, 17, 19
    assert len(last.guidance.history.values) == 3


def test_a_latched_sample_starts_its_history_again():
    adaptive = {"name": "adaptive", "rule": CFG, "threshold": 0.9}
    last, rows = walked(forecast(rule=adaptive, warmup=2, tolerance=0.3), vp_grid(20), noise(3))
    plain, _ = walked(adaptive, vp_grid(20), noise(3))
    assert sum(rows) == sum(last.nfe) < sum(plain.nfe)
    assert float((last.x - plain.x).norm() / plain.x.norm()) < 0.05


def test_the_first_level_without_signal_is_no_node():
    engine = sampler.Engine(sampler.denoiser(lambda x, level, _: torch.tanh(x), "velocity"))
    for rule in ("error", "window", "change"):
        seen = forecast(rule="none", when=rule)
        assert engine.run(noise(2), flow_grid(12), guidance=seen).isfinite().all()
    with pytest.raises(ValueError, match="step 1 has no earlier output to forecast from"):
        engine.run(noise(2), flow_grid(12), guidance=forecast(rule="none", policy=[1, 0] * 6))


@pytest.mark.parametrize("space", ["eps", "native", "x0", "v", "velocity"])
@pytest.mark.parametrize("clock", ["index", "log_snr"])
def test_spaces_and_clocks_stay_near_the_run_without_forecasts(space, clock):
    plain = run("ddim", CFG, vp_grid(40), noise(2))
    rule = forecast(rule=CFG, space=space, clock=clock, policy=[1] * 4 + [0, 1] * 18)
    assert float((run("ddim", rule, vp_grid(40), noise(2)) - plain).norm() / plain.norm()) < 0.05


def test_gradients_flow_through_forecasts():
    rule = forecast(rule=CFG, policy=[1, 1, 0, 0])
    engine = sampler.Engine(Counting().denoiser)
    x, way = noise(1), noise(1).flip(-1)
    leaf = x.clone().requires_grad_()
    loss = lambda x: engine.run(x, vp_grid(4), cond(1), "ddim", rule, grad=True).square().sum()  # noqa: E731
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    h = 1e-6
    numeric = float(loss(x + h * way) - loss(x - h * way)) / (2 * h)
    assert float((gradient * way).sum()) == pytest.approx(numeric, rel=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize(
    "fields", [{"policy": [1, 1, 0, 1, 0]}, {"when": "change", "threshold": 9.0}]
)
def test_stock_pipelines_make_no_call_on_skipped_steps(name, fields):
    stock = STOCK[name]
    pipe = stock.build()
    counted = Rows(getattr(pipe, stock.network))
    with sampler.guide(
        pipe, {"name": "forecast", "rule": {**CFG, "scale": SCALE}, **fields}
    ) as calls:
        images = stock.run(pipe)
    assert sum(counted.rows) == sum(calls.nfe) < 2 * 10 and images.isfinite().all()
    if "policy" in fields:
        assert calls.nfe == [6, 6] and len(counted.rows) == (6 if stock.sequential else 3)
    plain = stock.run(pipe)
    assert not torch.equal(images, plain)


def test_fixed_patterns_are_graphs_and_the_error_criterion_is_refused():
    engine, captured = sampler.Engine(Counting().denoiser), Recorded()
    method, levels = registry.build("sampler", "ddim"), vp_grid(12)

    def begun(rule, seed=0):
        snapshot, grid = engine.start(noise(2) * (1 + seed), levels, cond(2), method, rule)
        return Run(snapshot, grid, cond(2), method, rule)

    with torch.no_grad():
        for rule in (forecast(rule=CFG, when="window"), forecast(policy=[1, 1, 1] + [0, 1, 1] * 3)):
            runs = GraphedRuns(engine, True, captured)
            for seed in range(2):
                usual, snapshot = engine.run_to_end(*begun(rule, seed))
                mine, own = runs(begun(rule, seed))
                assert torch.equal(mine, usual) and own.nfe == snapshot.nfe
        with pytest.raises(sampler.SamplerError, match="when='window'"):
            GraphedRuns(engine, True, captured)(begun(forecast()))
        found, _ = GraphedRuns(engine, False, captured)(begun(forecast()))
        assert torch.equal(found, engine.run_to_end(*begun(forecast()))[0])


def test_generate_counts_what_the_network_sees():
    engine = sampler.load()
    rows, forward = [], engine.denoiser.forward

    def counting(x, level, conditions, model):
        rows.append(x.shape[0])
        return forward(x, level, conditions, model)

    engine.denoiser.forward = counting
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in (1, 3):
            rows.clear()
            result = engine.generate(
                "a red apple on a blue background",
                n=batch,
                seeds=1,
                steps=12,
                output="latent",
                guidance={"name": "forecast", "rule": CFG, "tolerance": 0.05},
                batch_size=8,
            )
            assert sum(rows) == sum(result.nfe) < 24 * batch
            again = engine.generate(**result.config)
            assert torch.equal(again.latents, result.latents)


REFUSED = [
    ({"rule": "linear_ag"}, "linear_ag predicts"),
    ({"rule": {"name": "adaptive", "rule": "linear_ag"}}, "linear_ag predicts"),
    ({"rule": "forecast"}, "inside another"),
    ({"order": 4}, "order = 4"),
    ({"tolerance": 0.0}, "tolerance = 0.0"),
    ({"when": "window", "growth": -0.5}, "growth = -0.5"),
    ({"policy": [0, 1]}, "first step"),
    ({"policy": [1, 2]}, "policy"),
    ({"threshold": 0.5}, "belongs to when = 'change'"),
    ({"when": "change", "threshold": 0.5, "space": "v"}, "leave space out"),
    ({"degree": 3}, "belongs to basis = 'chebyshev'"),
    ({"policy": [1, 1, 0], "warmup": 2}, "leave warmup out"),
    ({"basis": "chebyshev", "clock": "log_snr"}, "counts steps"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_settings_that_are_refused(fields, message):
    with pytest.raises(ValueError, match=message), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        forecast(**fields)


def test_runs_that_are_refused():
    for rule in (
        {"name": "adaptive", "rule": "forecast"},
        {"name": "sum", "rules": ["forecast", "autoguidance"]},
    ):
        with pytest.raises(ValueError, match="put forecast outside"):
            registry.build("guidance", rule)
    with pytest.raises(ValueError, match="4 steps leave no step.*use at least 8"):
        run("ddim", forecast(), vp_grid(4), noise(1))
    with pytest.raises(ValueError, match="12 entries and the run 10 steps"):
        run("ddim", forecast(policy=[1] * 12), vp_grid(10), noise(1))
    with pytest.raises(ValueError, match="evaluates twice per step"):
        run("heun", forecast(), vp_grid(10), noise(1))
    engine = sampler.load()
    for method, message in (("heun", "'heun' evaluates twice"), ("consistency", "jumps to x0")):
        with pytest.raises(ValueError, match=message):
            engine.generate("a fox", steps=10, sampler=method, guidance="forecast")
    with pytest.warns(UserWarning, match="not a smooth function"):
        engine.generate(
            "a fox", steps=8, sampler={"name": "ddim", "eta": 1.0}, guidance="forecast", seeds=1
        )
