"""The proximal step on a measurement, and the rule `data` built on it, against closed forms."""

import pytest
import torch

import sampler
from sampler.samplers import operators
from sampler.samplers.measurement import measurement, posterior_variance
from sampler.samplers.operators_filter import SuperResolution
from sampler.samplers.operators_nonlinear import HighDynamicRange
from sampler.samplers.proximal import nearest
from tests.analytic import vp_grid

G = torch.Generator().manual_seed(0)
MATRIX = torch.randn(3, 8, generator=G, dtype=torch.float64)
Y = torch.randn(2, 3, generator=G, dtype=torch.float64)
CENTRE = torch.randn(2, 8, generator=G, dtype=torch.float64)
NOISE, VARIANCE = 0.2, torch.tensor([0.5, 0.07], dtype=torch.float64)


class Square(torch.autograd.Function):
    """x² whose author has written no forward-mode derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient * ctx.saved_tensors[0]


def closed_form(row):
    """(AᵀA/s² + I/r²)⁻¹ (Aᵀy/s² + c/r²)"""
    precision = MATRIX.T @ MATRIX / NOISE**2 + torch.eye(8).double() / VARIANCE[row]
    right = MATRIX.T @ Y[row] / NOISE**2 + CENTRE[row] / VARIANCE[row]
    return torch.linalg.solve(precision, right)


def test_a_linear_operator_is_solved_exactly_and_per_row():
    found = nearest(measurement(MATRIX, Y), Y, CENTRE, NOISE, VARIANCE)
    for row in range(2):
        assert (found[row] - closed_form(row)).abs().max() < 1e-10
        y, centre, r2 = Y[row : row + 1], CENTRE[row : row + 1], VARIANCE[row : row + 1]
        alone = nearest(measurement(MATRIX, y), y, centre, NOISE, r2)
        assert (alone[0] - found[row]).abs().max() < 1e-14  # the length of a step is the row's own


def test_the_gradient_is_the_jacobian_of_the_minimum():
    leaf, probe = CENTRE.clone().requires_grad_(), torch.arange(16.0).view(2, 8).double()
    found = nearest(measurement(MATRIX, Y), Y, leaf, NOISE, VARIANCE)
    (gradient,) = torch.autograd.grad((found * probe).sum(), leaf)
    for row in range(2):
        inner = torch.eye(8).double() + VARIANCE[row] / NOISE**2 * MATRIX.T @ MATRIX
        assert torch.allclose(gradient[row], torch.linalg.solve(inner, probe[row]), atol=1e-9)


def test_average_pooling_and_holes_need_two_iterations():
    image = torch.randn(1, 3, 8, 8, dtype=torch.float64, generator=G)
    for operator in (SuperResolution(4), operators.Inpaint(torch.arange(64).view(8, 8) % 3 > 0)):
        y = operator.A(image) + 0.3
        few, many = (nearest(measurement(operator, y), y, 0 * image, 0.1, 0.4, cg) for cg in (2, 9))
        assert (few - many).abs().max() < 1e-12


def objective(forward, y, x, centre):
    return ((y - forward(x)) ** 2).sum() / (2 * NOISE**2) + ((x - centre) ** 2).sum() / 0.8


@pytest.mark.parametrize("forward", [HighDynamicRange(1.5).A, lambda x: (2 * x).tanh()])
def test_gauss_newton_reaches_the_minimum_of_a_nonlinear_operator(forward):
    centre = torch.linspace(-0.8, 0.8, 48, dtype=torch.float64).view(1, 3, 4, 4)
    y = forward(centre + 0.1)
    found = nearest(measurement(forward, y), y, centre, NOISE, 0.4, cg=48, gn=12)
    leaf = found.clone().requires_grad_()
    (slope,) = torch.autograd.grad(objective(forward, y, leaf, centre), leaf)
    assert slope.abs().max() < 1e-6


def test_an_operator_without_forward_mode_gets_the_step_of_steepest_descent():
    centre, y = torch.full((1, 4), 0.8).double(), torch.tensor([[0.5, 0.6, 0.7, 0.9]]).double()
    found = nearest(measurement(Square.apply, y), y, centre, NOISE, 0.4)
    slope = 0.4 / NOISE**2 * 2 * centre * (y - centre**2)
    curvature = slope.square().sum() + 0.4 / NOISE**2 * (2 * centre * slope).square().sum()
    length = slope.square().sum() / curvature
    # the Jacobian is a difference over 0.01, which for x² is off by 0.01/(2·0.8)
    assert torch.allclose(found - centre, length * slope, rtol=0.02)
    assert objective(torch.square, y, found, centre) < objective(torch.square, y, centre, centre)


def denoiser(matrix):
    return sampler.denoiser(lambda x, level, _: matrix @ x, "x0")


def test_the_rule_moves_x0_and_leaves_steps_without_signal_alone():
    fn = sampler.denoiser(lambda x, level, _: 0.9 * x, "x0")
    spec = {"name": "data", "operator": MATRIX, "y": Y, "noise": NOISE}
    rule, x = sampler.build("guidance", spec), CENTRE
    now, blind = sampler.Level(500, 0.8, 0.6), sampler.Level(999, 0.04, 0.9992)
    for level, moves in ((now, True), (blind, False)):
        span = sampler.Span(0, level, sampler.Level(0, 1.0, 0.0))
        pred = sampler.Prediction.from_x0(x, 0.9 * x, level)
        guided, _ = rule.combine(x, {"cond": pred}, span, ())
        r2 = posterior_variance(1.0, level.alpha, level.sigma)
        wanted = nearest(measurement(MATRIX, Y), Y, 0.9 * x, NOISE, r2) if moves else 0.9 * x
        assert torch.equal(sampler.settle(guided.x0), wanted)
    off = sampler.Engine(fn).run(x, vp_grid(5), guidance={**spec, "window": (0, 0)})
    assert torch.equal(off, sampler.Engine(fn).run(x, vp_grid(5)))


def test_posterior_variance_is_that_of_unit_data_seen_through_noise():
    assert posterior_variance(1.0, 0.6, 0.8) == pytest.approx(0.64)
    assert posterior_variance(4.0, 1.0, 2.0) == pytest.approx(2.0)
