"""The budget: launches and bytes of a step, counted."""

import csv
from pathlib import Path

import pytest
import torch
from sampler_kernels import use_backend
from sampler_kernels.counting import count_launches, dry_run

from sampler.core.benchmark import APG, CASES, BenchmarkStep, Case, count
from tests.kernels.canary import buildable

METHODS = [name for name in buildable("sampler")]


@pytest.mark.parametrize("name", METHODS)
def test_cfg_with_any_sampler_is_one_launch(name):
    found = count(Case("", "cfg", name), "triton")
    assert (found.kernels, found.others) == (1, 0)


@pytest.mark.parametrize("name", METHODS)
def test_apg_with_momentum_and_any_sampler_is_three(name):
    found = count(Case("", APG, name), "triton")
    # SA-Solver combines more than the eight tensors that one launch takes.
    assert (found.kernels, found.others) == (10 if name == "sa_solver" else 3, 0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_traffic_is_the_least_possible(case):
    """Within 10 %; partial sums and coefficients are what is beyond it."""
    found = count(case, "triton")
    assert found.kernels <= (1 if case.name.startswith("CFG +") else 3)
    if case.least:
        assert case.least <= found.bytes <= 1.1 * case.least


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize(
    "given",
    [{}, {"after": "hold"}, {"after": "hold", "turn": 0.9}, {"threshold": 0.5, "refresh": 2}],
    ids=str,
)
def test_adaptive_guidance_reads_the_latents_once(given, lag):
    """Weights of rows, then step and cosines in one pass, then all decisions: no other launch."""
    case = Case("", {"name": "adaptive", "lag": lag, **given})
    step = BenchmarkStep(case, (2, 4096))
    with torch.no_grad(), use_backend("triton"), dry_run(), count_launches() as launches:
        step()
    assert [k.kernel for k in launches] == ["scalar", "both", "scalar"]
    held = 8 if "after" in given else 0  # the held direction is read and written
    assert count(case, "triton").others == 0
    assert count(case, "triton").bytes <= 1.1 * (12 + held)


def test_the_reference_is_counted_too():
    """As torch's own profiler sees it, with one conversion of each prediction to float32."""
    case = Case("", "cfg", kind="x0")
    found = count(case, "reference")
    step = BenchmarkStep(case, (2, 4096))
    seen = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    with seen as profile, torch.no_grad():
        step()
    names = ("aten::add", "aten::sub", "aten::mul", "aten::div")
    assert found.kernels == 0
    assert found.others == sum(e.count for e in profile.key_averages() if e.key in names) + 2


def test_a_counted_step_is_a_real_step():
    """A dry run gives zeros; without it the same call computes."""
    step = BenchmarkStep(CASES[0], (2, 64))
    with torch.no_grad():
        assert step()[0].abs().sum() > 0


@pytest.mark.parametrize(("rule", "kernels"), [("cfg", 1), (APG, 3), ("adaptive", 3)])
def test_predictions_in_another_layout_are_copied_once_per_step(rule, kernels):
    """channels_last, as diffusers recommends for U-Nets; each copy is counted as a launch."""
    step = BenchmarkStep(Case("", rule), (2, 4, 8, 8))
    strided = (step.c, step.u)
    with torch.no_grad(), use_backend("reference"):
        right = step()[0]
    step.c, step.u = (t.to(memory_format=torch.channels_last) for t in strided)
    with torch.no_grad(), use_backend("triton"), count_launches() as launches:
        mine = step()[0]
    kinds = [k.kernel for k in launches]
    assert kinds.count("copy") == 2 and len(kinds) == kernels + 2
    size = step.c.numel() * step.c.element_size()
    assert all(k.read == k.written == size for k in launches if k.kernel == "copy")
    assert torch.allclose(mine, right, rtol=1e-5, atol=1e-6)


def test_the_published_counts_are_these():
    root = Path(__file__).parents[2] / "docs"
    lines = (root / "figures/kernels_counts.csv").read_text(encoding="utf-8").splitlines()
    page = (root / "kernels.md").read_text(encoding="utf-8")
    published = {row["case"]: row for row in csv.DictReader(lines[1:])}
    assert list(published) == [case.name for case in CASES]
    for case in CASES:
        row, found = published[case.name], count(case, "triton")
        assert int(row["launches"]) == found.kernels
        assert abs(float(row["bytes per element"]) - found.bytes) <= 0.01 * found.bytes
        assert int(row["eager launches"]) == count(case, "reference").others
        shown = f"| {case.name} | {found.kernels} | {row['bytes per element']} |"
        assert shown in page
