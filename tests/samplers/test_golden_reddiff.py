"""RED-Diff against the authors' published loop."""

import pytest
import torch

import sampler
from sampler.samplers import operators, reddiff
from sampler.samplers.operators_nonlinear import HighDynamicRange, PhaseRetrieval
from sampler.samplers.weights import published_times
from sampler.types import Level, Prediction, Span
from tests.samplers.golden import arrays, cases, level, mixture

CASES = cases("reddiff")


def problem(case, data):
    """(operator, y, init) of a case, as images [B, 3, 4, 4]."""
    key = case["key"]
    y, mu0 = torch.from_numpy(data[f"{key}_y"]), torch.from_numpy(data[f"{key}_mu0"])
    if case["op"] == "inpaint":
        mask = torch.from_numpy(data[f"{key}_mask"])
        return operators.Inpaint(mask), y.reshape(mu0.shape), mu0
    if case["op"] == "hdr":
        return HighDynamicRange(), y.reshape(mu0.shape), mu0
    if case["op"] == "phase":
        return PhaseRetrieval(pad=case["op_kwargs"]["pad"]), y, mu0
    matrix, inverse = (torch.from_numpy(data[f"{key}_{n}"]) for n in ("A", "A_pinv"))
    return operators.Matrix(matrix, tuple(mu0.shape[1:]), inverse), y.flatten(1), mu0


def walk(case, data, monkeypatch, dtype=torch.float64, **options):
    """(every mu, the finished result) with the golden noise."""
    key = case["key"]
    operator, y, mu0 = problem(case, data)
    noise = torch.from_numpy(data[f"{key}_noise_xt"]).to(dtype)
    if case.get("sigma_x0"):
        jitter = torch.from_numpy(data[f"{key}_noise_x0"]).to(dtype)
        monkeypatch.setattr(
            reddiff, "_shared_noise", lambda index, like: jitter[min(index, len(jitter) - 1)]
        )
    method = sampler.build(
        "sampler",
        {
            "name": "reddiff",
            "operator": operator,
            "y": y,
            "init": mu0,
            "lam": case["lam"],
            "lr": case["lr"],
            "weight": case["weight"],
            "sigma_x0": case.get("sigma_x0", 0.0),
            "obs_weight": case.get("obs_weight", 1.0),
            "eps": 1e-8 * len(y),  # the published loss is a mean over the batch, too
            **options,
        },
    )
    table, times = data["alphas_bar_0_to_1000"], data[f"{key}_timesteps_descending"].tolist()
    levels = [*(level(table, t + 1) for t in times), Level(0, 1.0, 0.0)]
    mix, walked = mixture(data), []
    x, state = method.start(torch.zeros_like(mu0).to(dtype), levels[0])
    for i, (now, after) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        # start and step hand out alpha·x0 (the query's mean); the golden noise goes on top
        x = x + now.sigma * noise[i]
        pred = Prediction.from_eps(x, mix.eps(x.double(), now).to(dtype), now)
        move = method.step(x, pred, Span(i, now, after, len(times)), state)
        x, state = sampler.settle((sampler.Lin.of(move.mean), move.state))
        walked.append(state.mu)
    return torch.stack(walked).double(), method.finish(x, state).double()


@pytest.mark.parametrize(("dtype", "tolerance"), ((torch.float64, 1e-9), (torch.float32, 1e-4)))
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['key']}-{c['op']}-{c['weight']}")
def test_every_iterate(case, dtype, tolerance, monkeypatch):
    data = arrays("reddiff")
    ours, final = walk(case, data, monkeypatch, dtype)
    golden = torch.from_numpy(data[f"{case['key']}_mu_traj"]).double()
    if case["op"] == "phase":  # the published operator is in complex64: see the README there
        assert torch.allclose(ours[:5], golden[:5], rtol=1e-4, atol=1e-4)
        assert torch.allclose(ours, golden, rtol=1e-2, atol=1e-2)
        return
    assert torch.allclose(ours, golden, rtol=tolerance, atol=tolerance), (ours - golden).abs().max()
    end = torch.from_numpy(data[f"{case['key']}_mu_final"])
    assert torch.allclose(final, end, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("key", ["r00", "r04"])
def test_what_the_published_loop_returns(key, monkeypatch):
    data = arrays("reddiff")
    case = next(c for c in CASES if c["key"] == key)
    _, final = walk(case, data, monkeypatch, returns="published")
    golden = torch.from_numpy(data[f"{key}_returned_x0_pred"])
    assert torch.allclose(final, golden, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["key"])
def test_published_timesteps(case):
    times = arrays("reddiff")[f"{case['key']}_timesteps_descending"].tolist()
    assert published_times(case["num_steps"]) == times and len(times) == case["n_steps"]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["key"])
def test_the_pseudo_inverse_is_the_published_start(case):
    """The operators' own A_dagger gives the golden start, and A of the truth the measurement."""
    data = arrays("reddiff")
    operator, y, mu0 = problem(case, data)
    start = operator.A_dagger(y)
    tolerance = 1e-4 if case["op"] == "phase" else 1e-9
    assert torch.allclose(start.to(mu0), mu0, rtol=tolerance, atol=tolerance)
    if case["sigma_y"] == 0:
        x = torch.from_numpy(data[f"{case['key']}_x_true"])
        assert torch.allclose(operator.A(x).to(y), y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['key']}-{c['op']}-{c['weight']}")
def test_gain_over_the_pseudo_inverse(case, monkeypatch):
    """In dB as the published loop's: 3 to 13 for most, a loss for three (long, steep weights)."""
    data = arrays("reddiff")
    truth = torch.from_numpy(data[f"{case['key']}_x_true"])
    start = torch.from_numpy(data[f"{case['key']}_mu0"])
    _, final = walk(case, data, monkeypatch)
    gains = [float(10 * (4 / (x - truth).square().mean()).log10()) for x in (start, final)]
    tolerance = 0.1 if case["op"] == "phase" else 2e-3  # the record has three digits
    assert gains[0] == pytest.approx(case["psnr_init_dB"], abs=tolerance)
    assert gains[1] == pytest.approx(case["psnr_final_dB"], abs=tolerance)
    assert (gains[1] > gains[0] + 2.5) == (case["key"] not in ("r00", "r06", "r10"))
