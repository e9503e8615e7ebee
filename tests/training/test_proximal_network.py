"""Learned proximal networks: gradients of convex functions, their prior, and proximal matching."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sampler
from sampler.models.proximal import ProximalConfig, ProximalNetwork
from sampler.models.proximal_files import load_proximal, save_proximal
from sampler.objectives import proximal_gamma, proximal_matching_loss
from sampler.types import Level
from scripts.study import prox

SHAPES = {"vectors": (5,), "images": (2, 6, 7)}


@pytest.fixture(scope="module", params=SHAPES)
def network(request):
    """A network with weights of every size, in float64."""
    torch.manual_seed(0)
    made = ProximalNetwork(ProximalConfig(SHAPES[request.param], hidden=8, alpha=0.02)).double()
    with torch.no_grad():
        for parameter in made.parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 else 1
            parameter.add_(torch.randn_like(parameter) / fan**0.5)
    made.clip()
    return made


def points(network, count, seed=1):
    g = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(count, *network.config.shape, generator=g, dtype=torch.float64)


def test_the_jacobian_is_symmetric_and_positive(network):
    (x,) = points(network, 1)
    jacobian = torch.autograd.functional.jacobian(lambda v: network(v[None])[0], x)
    jacobian = jacobian.reshape(x.numel(), -1)
    assert (jacobian - jacobian.T).abs().max() <= 1e-5
    least = torch.linalg.eigvalsh(jacobian).min()
    assert least >= 2 * 0.02 - 1e-12  # psi is strongly convex by 2·alpha
    assert jacobian.diagonal().std() > 1e-3  # and no multiple of the identity


def test_it_is_monotone(network):
    x, y = points(network, 1000), points(network, 1000, 2)
    with torch.no_grad():
        product = ((network(x) - network(y)) * (x - y)).flatten(1).sum(1)
    assert (product >= 0).all()


def test_without_clipping_it_is_not(network):
    """The tests above can fail: negative weights in the last layer give a concave part."""
    free = ProximalNetwork(replace(network.config, alpha=0.0)).double()
    free.load_state_dict(network.state_dict())
    with torch.no_grad():
        free.lin[-1].weight.neg_()
    x, y = points(network, 50), points(network, 50, 2)
    with torch.no_grad():
        assert (((free(x) - free(y)) * (x - y)).flatten(1).sum(1) < 0).any()
    free.clip()
    assert not free.lin[-1].weight.any()


def test_the_prior_is_that_of_the_proximal_operator(network):
    """x = f(y) minimises ‖x − y‖²/2 + R(x): no other point of the range is lower."""
    y = points(network, 2)
    with torch.no_grad():
        x, others = network(y), network(torch.cat([y + 0.3, -y, 0 * y]))
    prior, there = network.prior(x), network.prior(others)
    assert prior.gap.max() < 1e-6 and there.gap.max() < 1e-6
    assert torch.allclose(network(prior.point), x, atol=1e-6)

    def objective(at, value, centre):
        return (at - centre).square().flatten(1).sum(1) / 2 + value

    for row in range(2):
        own = objective(x[row : row + 1], prior.value[row : row + 1], y[row : row + 1])
        assert (objective(others, there.value, y[row : row + 1]) > own).all()


def test_the_prior_of_a_quadratic_has_a_closed_form():
    """psi = alpha·‖x‖² alone: f = 2·alpha·y and R = (1/(4·alpha) − 1/2)·‖x‖²."""
    plain = ProximalNetwork(ProximalConfig((3,), hidden=4, alpha=0.1)).double()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    x = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 3.0]], dtype=torch.float64)
    shift = plain.potential(0 * x)  # softplus(0) is not 0, but its weight is
    prior = plain.prior(x)
    assert torch.allclose(prior.value, 2 * x.square().sum(1) - shift, atol=1e-8)
    assert torch.allclose(plain(x), 0.2 * x)


def test_published_networks_have_these_weights():
    """Names and shapes of the published networks of vectors and of 28 x 28 images."""
    dense = ProximalNetwork(ProximalConfig((1,), hidden=50)).state_dict()
    assert dense["lin.5.weight"].shape == (1, 50) and dense["res.4.bias"].shape == (1,)
    assert len(dense) == 6 + 10
    images = ProximalNetwork(ProximalConfig((1, 28, 28))).state_dict()
    assert images["lin.4.weight"].shape == (64, 64 * 49) and images["lin.5.weight"].shape[1] == 64
    assert images["res.3.weight"].shape == (64, 49) and len(images) == 6 + 8


def test_it_is_a_denoiser_of_the_clean_input_scaled(network):
    """At every level it answers f(x / alpha); rows with levels of their own as well."""
    x = points(network, 2)
    fn = sampler.denoiser(network, prediction="x0")
    level = Level(1, 0.5, 0.2)
    branch = {"cond": sampler.types.Branch()}
    nfe = [0, 0]
    with torch.inference_mode():
        pred = fn(x, sampler.Span(0, level, level), branch, nfe)["cond"]
    assert nfe == [1, 1] and torch.allclose(pred.x0.tensor(), network(2 * x).detach())
    own = Level(*(torch.tensor(v, dtype=torch.float64) for v in ([1, 1], [0.5, 0.0], [0.2, 1])))
    expected = network(torch.stack([2 * x[0], x[1]]))
    assert torch.allclose(network(x, own), expected)
    with pytest.raises(ValueError, match="takes rows of"):
        network(x[:, :1])


def test_gradients_pass_where_they_are_asked_for(network):
    x = points(network, 1).requires_grad_()
    (grad,) = torch.autograd.grad(network(x).square().sum(), x)
    assert grad.abs().sum() > 0
    network(x.detach()).sum().backward()  # a training step: the graph goes to the weights
    assert network.lin[0].weight.grad.abs().sum() > 0
    network.zero_grad()
    with torch.no_grad():
        assert not network(x).requires_grad


def test_files(network, tmp_path):
    folder = save_proximal(network.float(), tmp_path / "lpn", {"updates": 1})
    network.double()
    again = load_proximal(folder)
    assert again.config == network.config
    x = points(network, 1).float()
    assert torch.allclose(again(x), network(x).float(), atol=1e-5)
    (folder / "config.json").write_text('{"shape": [5], "hidden": 0}')
    with pytest.raises(sampler.SamplerError, match="no proximal network: .*hidden = 0"):
        load_proximal(folder)


def test_the_loss_and_its_stages():
    out, x0 = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    assert proximal_matching_loss(out, x0, None).tolist() == [1.5, 0.0]
    found = proximal_matching_loss(out, x0, 2.0)
    assert found.tolist() == pytest.approx([1 - torch.tensor(-5 / 4).exp().item(), 0.0])
    gammas = [proximal_gamma(update, 3, 2, 4, 0.1) for update in range(14)]
    assert gammas == [None] * 3 + [0.8] * 2 + [0.4] * 2 + [0.2] * 2 + [0.1] * 5


def test_proximal_matching_leaves_the_posterior_mean():
    """A short run of the study: the error to soft thresholding falls, and it stays monotone."""
    torch.manual_seed(1)
    network = ProximalNetwork(ProximalConfig((1,), hidden=16, layers=1))
    rows = prox.train(network, 250, 60, 400, 1, lr=1e-2)
    assert [row["gamma"] for row in rows] == ["L1", 0.64, 0.32, 0.16, 0.08]
    assert [row["updates"] for row in rows] == [250, 310, 370, 430, 490]
    first, last = rows[0]["soft_threshold"], rows[-1]["soft_threshold"]
    assert last < 0.9 * first and all(row["least_slope"] >= 0 for row in rows)


def test_the_study_reached_the_proximal_operator():
    """Mean error to soft thresholding at most 0.05 on [−4, 4], and the mean is left behind."""
    path = Path(__file__).parents[2] / "docs/figures/prox.csv"
    *_, last = csv.DictReader(path.open(encoding="utf-8"))
    assert float(last["soft_threshold"]) <= 0.05 < float(last["posterior_mean"])
    assert float(last["least_slope"]) >= 0
