"""Formulas of one step, solved from its numbers: right, or refused."""

import pytest
import torch

from sampler.stock.forms import Given, Unsolved
from sampler.stock.run_formula import RunFormula
from sampler.stock.solving import solve
from sampler.types import GuidanceBase

S = 3.0
SIGMAS = (0.01, 1.0, 40.0)
B = 2


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def step(formula, sigma=1.0, shape=(4, 8, 8), kind="x0", rows=B, calls="one", exploding=True):
    """A step whose model_output is formula(u, c, x, sigma); `calls`: how the network is called."""
    u, c = (drawn(rows, *shape, seed=k) for k in (1, 2))
    c = u + 0.2 * c
    x = drawn(rows, *shape, seed=3) * max(1.0, sigma)
    others = [drawn(rows, *shape, seed=k) for k in (5, 6)]
    answers = {
        "one": [torch.cat([u, c])],
        "two": [c, u],
        "another before": [torch.cat(others), torch.cat([u, c])],
        "another of each": [torch.cat([others[0], u, others[1], c])],
        "another of each, one the same": [torch.cat([u, u, others[1], c])],
    }[calls]
    return Given(formula(u, c, x, sigma), x, answers, kind, sigma, exploding, 0.5)


def cfg(u, c):
    return u + S * (c - u)


def karras(d, sign=1.0):
    """x0 of Karras' preconditioning, with a factor on the network's part."""
    total = lambda s: s * s + d * d  # noqa: E731
    return lambda o, x, s: d * d / total(s) * x + sign * s * d / total(s) ** 0.5 * o


def scaled_flow(o, x, s):
    return (x - s * o) / (1 + s)


def as_eps(x0):
    return lambda o, x, s: (x - x0(o, x, s)) / s


def guided(read):
    """Guidance of what `read` makes of every branch."""
    return lambda u, c, x, s: cfg(read(u, x, s), read(c, x, s))


READS = {  # how a branch is read, and what the scheduler is given
    "karras": (karras(0.5), "x0"),
    "karras of data of another size": (karras(1.0), "x0"),
    "karras with the sign of v": (karras(0.5, -1.0), "x0"),
    "karras as eps": (as_eps(karras(0.5)), "eps"),
    "flow of the scaled sample": (scaled_flow, "x0"),
    "flow of the scaled sample as eps": (as_eps(scaled_flow), "eps"),
}


def flow_as_v(o, x, s, d=0.5):
    """v of a network that answers with the velocity of a flow of x/(d·(alpha + sigma))."""
    alpha = (1 - s * s) ** 0.5
    return ((alpha - s) * x + d * o) / (alpha + s)


@pytest.mark.parametrize("sigma", [0.01, 0.6, 0.999])
def test_velocities_of_a_flow_are_read_as_v(sigma):
    given = step(guided(flow_as_v), sigma, kind="v", exploding=False)
    form = solve(given, "")
    assert form.roles == ("uncond", "cond") and form.scale == pytest.approx(S, rel=1e-3)
    assert form.residual(given) <= 1e-5
    u, c = given.answers[0].double().chunk(2)
    for branch, block in zip(form.branches(given), (u, c), strict=True):
        wanted = flow_as_v(block, given.x.double(), sigma)
        assert (branch - wanted).abs().max() <= 1e-4 * wanted.abs().max()


WRONG_V = {
    "of data of another size": lambda o, x, s: flow_as_v(o, x, s, 0.4),
    "of another level": lambda o, x, s: flow_as_v(o, x, 0.9 * s),
    "clamped": lambda o, x, s: flow_as_v(o, x, s).clamp(-1, 1),
    "with an offset": lambda o, x, s: flow_as_v(o, x, s) + 0.01 * x,
}


@pytest.mark.parametrize("sigma", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("name", WRONG_V)
def test_other_velocities_are_refused(name, sigma):
    with pytest.raises(Unsolved):
        solve(step(guided(WRONG_V[name]), sigma, kind="v", exploding=False), "")


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("name", READS)
def test_estimates_of_every_branch_are_read(name, sigma):
    read, kind = READS[name]
    given = step(guided(read), sigma, kind=kind)
    form = solve(given, "")
    assert form.roles == ("uncond", "cond")
    assert form.scale == pytest.approx(S, rel=1e-3)
    assert form.residual(given) < 1e-5
    u, c = form.branches(given)
    wanted = read(given.answers[0][B:], given.x, sigma)
    unit = 1.0 if kind == "x0" else sigma  # eps is known to the rounding of x0 / sigma
    assert torch.allclose(unit * c, unit * wanted, atol=2e-6 * max(1.0, sigma))
    assert torch.allclose(unit * cfg(u, c), unit * given.output, atol=1e-4)


REFUSED = {
    "an offset": lambda u, c, x, s: cfg(u, c) + 0.01 * x,
    "another offset": guided(lambda o, x, s: karras(0.5)(o, x, s) + 1e-3 * x),
    "data of an unknown size": guided(karras(0.7)),
    "a factor on the guided x0": lambda u, c, x, s: 0.9 * guided(karras(0.5))(u, c, x, s),
    "a clamp": lambda u, c, x, s: guided(karras(0.5))(u, c, x, s).clamp(-0.5, 0.5),
    "a factor on the network": guided(lambda o, x, s: karras(0.5)(0.9 * o, x, s)),
    "another level": guided(lambda o, x, s: karras(0.5)(o, x, 1.1 * s)),
    "one branch unread": lambda u, c, x, s: cfg(u, karras(0.5)(c, x, s)),
    "guided before it is read, rescaled": lambda u, c, x, s: karras(0.5)(
        cfg(u, c) * (c.std() / cfg(u, c).std()), x, s
    ),
    "noise": lambda u, c, x, s: guided(karras(0.5))(u, c, x, s) + 1e-3 * drawn(*x.shape, seed=9),
}


@pytest.mark.parametrize("sigma", [0.04, 0.3, 0.9])
def test_velocities_of_an_x0_are_read(sigma):
    """PRXPixelPipeline divides by at least 0.05."""
    formula = guided(lambda o, x, s: (x - o) / max(s, 0.05))
    given = step(formula, sigma, kind="velocity", exploding=False)
    form = solve(given, "")
    assert form.scale == pytest.approx(S, rel=1e-4) and form.residual(given) < 1e-5
    assert torch.allclose(cfg(*form.branches(given)), given.output, atol=1e-3)
    for other in (lambda o, x, s: (x - o) / (s + 0.1), lambda o, x, s: (x - o).clamp(-1, 1) / s):
        with pytest.raises(Unsolved):
            solve(step(guided(other), sigma, kind="velocity", exploding=False), "")


@pytest.mark.parametrize("kind", ["x0", "eps", "v"])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", REFUSED)
def test_other_estimates_are_refused(name, rows, kind):
    with pytest.raises(Unsolved):
        solve(step(REFUSED[name], 1.0, kind=kind, rows=rows), "")


def test_estimates_are_looked_for_where_the_sample_is_x0_plus_noise_only():
    with pytest.raises(Unsolved):
        solve(step(guided(karras(0.5)), 1.0)._replace(sigma=0.0), "")


def halves(first, rest, at=3, dim=1):
    """A formula of the first `at` entries of a dimension, and one of the rest."""

    def made(u, c, x, s):
        size = u.shape[dim] - at
        one, two = first(u, c, x, s), rest(u, c, x, s)
        return torch.cat([one.narrow(dim, 0, at), two.narrow(dim, at, size)], dim)

    return made


def plain(u, c, x, s):
    return cfg(u, c)


COPIES = {
    "cond": (lambda u, c, x, s: c, 1),
    "uncond": (lambda u, c, x, s: u, 0),
}


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", COPIES)
def test_guidance_of_some_channels(name, sign):
    """Lumina guides the first channels and copies the others of cond."""
    rest, copied = COPIES[name]
    given = step(lambda *of: sign * halves(plain, rest)(*of))
    form = solve(given, "")
    assert (form.region.start, form.region.length, form.copied) == (0, 3, copied)
    assert form.roles == ("uncond", "cond") and form.scale == pytest.approx(S, rel=1e-4)
    assert form.residual(given) < 1e-6
    moved = given.output.clone()
    moved[:, 3] += 1e-3
    assert form.residual(given._replace(output=moved)) > 1e-4  # the copy is checked at every step


def test_guidance_of_the_last_channels():
    given = step(halves(COPIES["cond"][0], plain, at=1))
    form = solve(given, "")
    assert (form.region.start, form.region.length, form.copied) == (1, 3, 1)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_norms_along_one_dimension_are_a_field_of_the_rule(dim):
    """JoyImageEditPipeline sets those of the channels, Qwen-Image those of the tokens."""

    def normed(u, c, x, s):
        made = cfg(u, c)
        return made * (c.norm(dim=dim, keepdim=True) / made.norm(dim=dim, keepdim=True))

    given = step(normed)
    form = solve(given, "")
    assert form.match_norm == [dim - 4] and form.scale == pytest.approx(S, rel=1e-4)
    assert form.residual(given) < 1e-5
    with pytest.raises(Unsolved):
        solve(step(lambda *of: 1.01 * normed(*of)), "")


UNEVEN = {
    "another scale": halves(plain, lambda u, c, x, s: u + 5 * (c - u)),
    "a clamp": halves(plain, lambda u, c, x, s: cfg(u, c).clamp(-0.5, 0.5)),
    "a part of cond": halves(plain, lambda u, c, x, s: 0.9 * c),
    "zero": halves(plain, lambda u, c, x, s: 0 * c),
    "the sample": halves(plain, lambda u, c, x, s: x),
    "the middle": lambda u, c, x, s: torch.cat([c[:, :1], cfg(u, c)[:, 1:3], c[:, 3:]], 1),
    "a side of the image": halves(plain, lambda u, c, x, s: c, at=4, dim=3),
    "a factor": lambda u, c, x, s: 1.2 * halves(plain, COPIES["cond"][0])(u, c, x, s),
    "a mixture": halves(plain, lambda u, c, x, s: (c + u) / 2),
}


@pytest.mark.parametrize("name", UNEVEN)
def test_other_parts_are_refused(name):
    with pytest.raises(Unsolved):
        solve(step(UNEVEN[name]), "")


FRAMES = drawn(B, 4, 2, 8, 8, seed=8)


def given_frames(x0):
    """Guidance of the frames after the first two, whose x0 is set."""

    def made(u, c, x, s):
        found = guided(scaled_flow)(u, c, x, s)
        return torch.cat([x0(found[:, :, :2], x[:, :, :2]), found[:, :, 2:]], 2)

    return made


def run(formulas, kind="x0"):
    """Two steps through RunFormula; the last form."""

    class Pipe:
        scheduler = None

    formula = RunFormula(Pipe(), GuidanceBase, against=False)
    formula._wants_uncond = lambda: True
    formula.begin()
    form = None
    for index, (made, sigma) in enumerate(zip(formulas, (9.0, 2.0), strict=False)):
        given = step(made, sigma, (4, 5, 8, 8), kind)
        form, _ = formula.at(index, given, index > 0, index + 1 == len(formulas))
    return form


def test_frames_that_are_given_are_left_to_the_pipeline():
    fixed = given_frames(lambda found, x: FRAMES)
    form = run([fixed, fixed])
    assert form.given_rest and (form.region.dim, form.region.start, form.region.length) == (2, 2, 3)
    assert form.roles == ("uncond", "cond")


MOVING = {
    "clamped": lambda found, x: found.clamp(-0.5, 0.5),
    "of another scale": lambda found, x: 1.3 * found,
    "the sample": lambda found, x: x,
    "noise": lambda found, x: FRAMES + 1e-3 * x,
}


@pytest.mark.parametrize("name", MOVING)
def test_frames_that_depend_on_the_step_are_refused(name):
    formula = given_frames(MOVING[name])
    with pytest.raises(ValueError, match="cannot replace"):
        run([formula, formula])


def test_frames_of_a_single_step_are_refused():
    with pytest.raises(ValueError, match="is not known to be given"):
        run([given_frames(lambda found, x: FRAMES)])


@pytest.mark.parametrize("calls", ["one", "another before", "another of each"])
@pytest.mark.parametrize("sigma", [0.5, 2.0])
def test_branches_of_another_latent_are_left_alone(calls, sigma):
    """CycleDiffusion and pix2pix-zero evaluate their source, or a loss, beside the two branches."""
    given = step(plain, sigma, calls=calls)
    form = solve(given, "")
    assert [role for role in form.roles if role != "idle"] == ["uncond", "cond"]
    assert form.scale == pytest.approx(S, rel=1e-4) and form.settled
    assert form.used == {"another before": (0, 2), "another of each": (4,)}.get(calls, (2,))


def test_equal_branches_of_another_latent_are_not_settled():
    given = step(plain, calls="another of each, one the same")
    form = solve(given, "")
    assert not form.settled and form.scale == pytest.approx(S, rel=1e-4)
    assert sorted(form.roles) == ["cond", "idle", "idle", "uncond"]


def test_half_precision_is_read_with_its_tolerance():
    given = step(guided(karras(0.5)), 1.0)
    half = given._replace(
        output=given.output.bfloat16(), answers=[a.bfloat16() for a in given.answers]
    )
    assert solve(half, "").scale == pytest.approx(S, rel=0.05)
    with pytest.raises(Unsolved):
        solve(step(REFUSED["a clamp"], 1.0)._replace(answers=half.answers), "")
