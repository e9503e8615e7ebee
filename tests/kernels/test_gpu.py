"""Tests that need a GPU: rounding, races, real launch counts, graphs, bandwidth.

`python -m pytest tests/kernels/test_gpu.py -m gpu` on a machine with a CUDA or ROCm device.
"""

import pytest
import torch
from sampler_kernels import Lin, gram, settle, use_backend
from sampler_kernels.backend import backend
from sampler_kernels.counting import count_launches

from sampler.core.benchmark import CASES, BenchmarkStep

pytestmark = pytest.mark.gpu


def draw(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("shape", [(2, 4, 64, 64), (3, 4097), (1, 16, 128, 128)], ids=str)
def test_a_step_is_the_reference(case, shape):
    step = BenchmarkStep(case, shape, "cuda")
    with torch.no_grad():
        with use_backend("reference"):
            right = step()[0]
        with use_backend("triton"):
            mine, again = step()[0], step()[0]
    assert torch.equal(mine, again), "two runs differ"
    assert (mine - right).norm() <= 1e-6 * right.norm()


def test_the_gpu_computes_on_triton_by_itself():
    from sampler_kernels import fused

    assert backend(draw(2, 8)) is fused


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_rounded_to_nearest(dtype):
    x, y = draw(2, 5000, dtype=dtype), draw(2, 5000, seed=1, dtype=dtype)
    with use_backend("triton"):
        mine = (Lin.of(y) + 7.5 * (Lin.of(x) - y)).tensor(dtype)
    exact = y.double() + 7.5 * (x.double() - y.double())
    best = (exact.to(dtype).double() - exact).norm()
    assert (mine.double() - exact).norm() <= 1.05 * best


def test_rows_do_not_depend_on_the_batch():
    x, y = draw(64, 70000), draw(64, 70000, seed=1)

    def make(rows):
        products = gram(x[rows], y[rows])
        return settle(Lin.of(x[rows]) - Lin.of(y[rows]) * (products[0, 1] / products[1, 1]))

    with use_backend("triton"):
        whole = make(slice(None))
        for row in (0, 17, 63):
            assert torch.equal(whole[row : row + 1], make([row]))


def test_more_than_two_to_the_31_elements():
    rows, length = 3, 2**30
    x = torch.full((rows, length), 0.5, dtype=torch.float16, device="cuda")
    x[2, -1] = 3.0
    with use_backend("triton"):
        y = (Lin.of(x) * 2.0).tensor(torch.float16)
        assert float(gram(Lin.of(x) - Lin.ones(x) * 0.5)[0, 0][2]) == 2.5**2
    assert float(y[2, -1]) == 6.0 and float(y[2, -2]) == 1.0


@pytest.mark.parametrize(
    "name", ["CFG + DDIM", "APG + GHVB", "Adaptive CFG + DDIM", "CFG rescaled + DDIM"]
)
def test_the_profiler_sees_the_launches_that_are_counted(name):
    step = BenchmarkStep(
        next(case for case in CASES if case.name == name), (1, 4, 128, 128), "cuda"
    )
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.no_grad(), use_backend("triton"):
        step()
        with count_launches() as counted, torch.profiler.profile(activities=activities) as seen:
            step()
            torch.cuda.synchronize()
    kernels = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == len(counted) == (1 if name == "CFG + DDIM" else 3)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_step_in_a_graph_is_the_step(case):
    step = BenchmarkStep(case, (1, 4, 128, 128), "cuda")
    with torch.no_grad(), use_backend("triton"):
        right = step()[0]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()[0]
        out.zero_()
        graph.replay()
    assert torch.equal(out, right)


def test_large_steps_reach_their_share_of_a_copys_bandwidth():
    """The roofline: a quarter of a billion elements, against a copy of as many bytes."""
    from scripts.bench import gpu, meters
    from scripts.bench import kernels as bench

    sizes = {gpu.BIG: gpu.GPU_SIZES[gpu.BIG]}
    rows = [measure() for _, measure in gpu.gpu_tasks(meters.Cuda(), sizes)]
    found = [bar for bar in bench.bars(rows) if bar["bar"].startswith("copy / ours")]
    assert len(found) == 2 and all(bar["reached"] for bar in found), found
