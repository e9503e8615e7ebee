"""A third party's distribution: docs/examples as a wheel of its own, found by its entry points."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sampler
from sampler.rewards.scoring import score
from sampler.runs.metadata import read_record
from tests.analytic import sigma_grid
from tests.laws.world import Counting, cond, noise, run

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "docs" / "examples"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the installed wheel, and with a distribution whose strategies do not load."""
    folder = tmp_path_factory.mktemp("plugins")
    shutil.copytree(EXAMPLES, folder / "source", ignore=shutil.ignore_patterns("*.egg-info"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    build = ["wheel", *offline, "--no-build-isolation", "-w", str(folder), str(folder / "source")]
    subprocess.run([*pip, *build], check=True, timeout=300)
    (wheel,) = folder.glob("*.whl")
    target = folder / "site"
    install = ["install", *offline, "--target", str(target), str(wheel)]
    subprocess.run([*pip, *install], check=True, timeout=300)
    broken = target / "halfway-0.1.dist-info"
    broken.mkdir()
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: halfway\nVersion: 0.1\n")
    (broken / "entry_points.txt").write_text(
        "[sampler.samplers]\nunfinished = halfway:Unfinished\n"
        "[sampler.rewards]\nabsent = no_such_module_here:Thing\n"
    )
    (target / "halfway.py").write_text("class Unfinished:\n    pass\n")
    return target


def python(site, code, folder):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(site)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_each_strategy_is_one_small_file():
    files = [path for path in (EXAMPLES / "sampler_extras").glob("*.py") if path.stat().st_size]
    assert len(files) == 3
    assert all(len(path.read_text().splitlines()) <= 25 for path in files)


def test_they_are_listed_and_a_broken_one_is_told_with_its_distribution(site, tmp_path):
    code = (
        "from sampler.cli import main\n"
        "for kind in ('samplers', 'guidance', 'rewards'):\n"
        "    assert main(['list', kind, '--json']) == 0"
    )
    done = python(site, code, tmp_path)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    listed = {(e["kind"], e["name"]): e for e in events if e["t"] == "entry"}
    assert {("sampler", "ddim"), ("guidance", "cfg"), ("reward", "brightness")} <= set(listed)
    plugged = listed["sampler", "extrapolated_ddim"]
    assert plugged["fields"] == [{"name": "gamma", "type": "float", "default": 2.0, "range": ""}]
    assert "2306.04848" in plugged["reference"] and plugged["summary"].startswith("DDIM along")
    assert {("guidance", "cfg_plus_plus"), ("reward", "sharpness")} <= set(listed)
    told = done.stderr.splitlines()
    assert len(told) == 2, told
    assert "'unfinished' of halfway failed to load" in told[0] and "dataclass" in told[0]
    assert "'absent' of halfway failed to load" in told[1] and "no_such_module_here" in told[1]


def test_they_are_used_by_name_and_fields_are_checked(site, tmp_path):
    code = (
        "from sampler.cli import main\n"
        "call = ['generate', 'a fox', '--steps', '3', '--seed', '1', '-q']\n"
        "ours = [*call, '--guidance', 'cfg_plus_plus', '--sampler', 'extrapolated_ddim']\n"
        "assert main([*ours, '--set', 'sampler.gamma=1.5', '-o', 'out']) == 0\n"
        "assert main([*ours, '--set', 'sampler.gama=1', '-o', 'wrong']) == 2\n"
        "assert main([*call, '--sampler', 'extrapolated_dimd', '-o', 'wrong']) == 2\n"
        "assert main([*call, '--sampler', 'unfinished', '-o', 'wrong']) == 2\n"
        "tune = ['finetune', '--reward', 'sharpness', '--prompts', 'p.txt', '-o', 'tuned']\n"
        "assert main([*tune, '--dry-run', '--set', 'fit.batch=1', '--set', 'fit.steps=2']) == 0"
    )
    (tmp_path / "p.txt").write_text("a fox on a green background\n")
    done = python(site, code, tmp_path)
    image, *tuned = done.stdout.splitlines()
    record = read_record((tmp_path / image).read_bytes())["record"]
    assert record["sampler"] == {"name": "extrapolated_ddim", "gamma": 1.5}
    assert record["guidance"] == {"name": "cfg_plus_plus", "lam": 0.6}
    assert tuned[1].startswith("Dry run: ")
    wrong, name, broken = [line for line in done.stderr.splitlines() if "sampler: " in line]
    assert "has no field 'gama' (did you mean 'gamma'?)" in wrong
    assert "(did you mean 'extrapolated_ddim'?)" in name
    assert "'unfinished' of halfway failed to load" in broken
    assert not (tmp_path / "wrong").exists() and not (tmp_path / "tuned").exists()


def test_they_obey_the_laws(site):
    """The registry of another process names them too, so the law tests find them by themselves."""
    laws = [sys.executable, "-m", "pytest", "tests/laws", "-n", "0", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*laws, "-k", "extrapolated_ddim or cfg_plus_plus", "--durations=0"],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(site)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    for law in ("test_samplers.py::test_observed_order", "test_guidance.py::test_gradients_flow"):
        assert law in done.stdout


@pytest.fixture
def plugged(site, monkeypatch):
    monkeypatch.syspath_prepend(str(site))
    from sampler_extras.cfg_plus_plus import CFGPlusPlus
    from sampler_extras.extrapolated_ddim import ExtrapolatedDDIM
    from sampler_extras.sharpness import Sharpness

    return ExtrapolatedDDIM, CFGPlusPlus, Sharpness


def test_the_equations_are_those_of_the_papers(plugged):
    estimation, plus_plus, _ = plugged
    levels, x = sigma_grid(6), noise(2)
    for gamma, same in ((1.0, "ddim"), (1.5, {"name": "ab", "order": 2})):
        ours = run(estimation(gamma), "none", levels, x)
        torch.testing.assert_close(ours, run(same, "none", levels, x), rtol=1e-9, atol=1e-9)
    now, after = sampler.Level(500, 0.8, 0.6), sampler.Level(0, 0.96, 0.28)
    engine, span = sampler.Engine(Counting().denoiser), sampler.Span(0, now, after)
    branches = plus_plus().plan(x, span, cond(2), ())
    preds = engine.denoiser(x, span, branches, [0, 0])
    c, u = (sampler.settle(preds[name].eps) for name in ("cond", "uncond"))
    expected = 0.96 * (x - 0.6 * (u + 0.6 * (c - u))) / 0.8 + 0.28 * u
    made = engine.run(x, (now, after), cond(2), "ddim", plus_plus())
    torch.testing.assert_close(made, expected, rtol=1e-9, atol=1e-9)


def test_the_reward_is_the_variance_of_the_laplacian_of_each_row(plugged):
    from scipy.ndimage import laplace

    reward = plugged[2]()
    images = torch.rand(3, 3, 20, 24, dtype=torch.float64, generator=torch.manual_seed(1))
    images.requires_grad_()
    scores = score(reward, images, ["a"] * 3)
    luma = torch.einsum("bchw,c->bhw", images.detach(), images.new_tensor([0.299, 0.587, 0.114]))
    expected = [laplace(row.numpy())[1:-1, 1:-1].var() for row in luma]
    torch.testing.assert_close(scores.detach(), images.new_tensor(expected).detach())
    (gradient,) = torch.autograd.grad(scores[0], images)
    assert gradient[0].isfinite().all() and gradient[0].abs().sum() > 0
    assert not gradient[1:].any()
