"""The benchmark's own table, and its numbers where they can be known."""

import csv
import json
from functools import partial

import pytest
import torch
from sampler_kernels import use_backend
from sampler_kernels.choice import requested
from typer.testing import CliRunner

from sampler.cli.commands import parser
from sampler.core.benchmark import CASES, BenchmarkStep, cost
from scripts.bench import gpu, gpu_networks
from scripts.bench import kernels as bench
from scripts.bench.meters import Dry
from scripts.bench.tables import Table, fill


def test_the_command_shows_every_case():
    shown = CliRunner().invoke(parser(), ["bench", "--kernels"])
    assert shown.exit_code == 0 and all(case.name in shown.stdout for case in CASES)
    lines = CliRunner().invoke(parser(), ["bench", "--kernels", "--json"]).stdout.splitlines()
    rows = {row["step"]: row for row in map(json.loads, lines)}
    assert rows["CFG + DDIM"]["kernels"] == 1 and rows["APG + DDIM"]["kernels"] == 3


def test_cost_counts_the_flops_of_one_call():
    a = torch.ones(100, 200)
    result, row = cost(lambda: a @ a.T)
    assert result.shape == (100, 100)
    assert row["GFLOP"] == round(2 * 100 * 200 * 100 / 1e9, 2) and row["peak MiB"] > 1


def test_the_gpu_part_runs_on_a_cpu_too():
    """Every line that a GPU machine would run, but for events, graphs and compilation."""
    tasks = list(gpu.gpu_tasks(Dry(), {gpu.SDXL: (1, 8, 8)}, repeats=(2, 1)))
    rows = [measure() for _, measure in tasks]
    assert [row["case"] for row in rows] == [case.name for case in CASES]
    for (key, _), row in zip(tasks, rows, strict=True):
        assert key == (row["case"], row["size"])
        stock = row["case"] in ("CFG + DDIM", "APG + DDIM")
        assert (row["diffusers µs"] != "") == (row["diffusers host µs"] != "") == stock
        times = [v for k, v in row.items() if k.endswith("µs") and "diffusers" not in k]
        assert len(times) == 9 and all(v > 0 for v in times)
        assert row["launches"] == (1 if row["case"].startswith("CFG +") else 3)
        assert row["elements"] == 64 and row["bytes"] >= 12 * 64


def test_torch_compile_is_timed_at_two_sizes_only():
    """A compilation takes 5 to 10 seconds, and a call has ten minutes."""
    (_, measure), *_ = gpu.gpu_tasks(Dry(), {"SD 1.5, 512²": (1, 8, 8)}, repeats=(1, 1))
    assert measure()["compiled reference µs"] == ""


def test_large_latents_are_for_two_cases():
    keys = [key for key, _ in gpu.gpu_tasks(Dry())]
    assert len(keys) == 5 * len(CASES) + 2 and keys[-1] == ("APG + DDIM", gpu.BIG)


TINY = gpu_networks.Network(
    "tiny", (4, 8, 8), lambda: torch.nn.Conv2d(4, 4, 3, padding=1), lambda module, x: module(x)
)


def test_whole_steps_are_timed_with_and_without_fusion():
    backends = []

    class Clock(Dry):
        def microseconds(self, fn):
            fn()
            backends.append(requested())
            with use_backend("auto"):
                return 1000.0 if fn.args[0] == "triton" else 2000.0

    rows = [measure() for _, measure in gpu_networks.network_tasks(Clock(), [TINY], 2)]
    assert [row["case"] for row in rows] == [case.name for case in gpu_networks.CASES]
    for row in rows:
        assert (row["fused ms"], row["reference ms"]) == (1.0, 2.0)
        assert row["gain"] == row["gain in a graph"] == "50.000%"
        assert row["parameters"] == 4 * 4 * 9 + 4
    assert len(backends) == 2 * 2 * 2 * 2  # cases, (called, graph), pairs, sides


def test_the_step_of_a_network_uses_what_it_predicts():
    """CFG with DDIM on the two halves of the output, as plain torch has it."""
    case, module = gpu_networks.CASES[0], TINY.build().to(torch.bfloat16)
    step = BenchmarkStep(case, (1, *TINY.shape))
    with torch.no_grad():
        mean = gpu_networks._step(TINY, module, step)[0]
        out = module(step.x.to(torch.bfloat16).repeat(2, 1, 1, 1)).float()
    guided = out[1:] + 7.5 * (out[:1] - out[1:])
    (_, a, s), (_, b, r) = step.span.now, step.span.next
    expected = b * (a * step.x - s * guided) + r * (a * guided + s * step.x)
    assert torch.allclose(mean, expected, atol=1e-4)


@pytest.mark.parametrize("network", gpu_networks.NETWORKS, ids=lambda n: n.name)
def test_the_networks_have_the_parameters_of_their_models(network):
    """SD 1.5 860 M, SDXL 2.57 G, DiT-S/2 33 M; and a step gives an output of the latents' shape."""
    right = {"SD 1.5, 512²": 859_520_964, "SDXL, 1024²": 2_567_463_684}
    with torch.device("meta"):
        module = network.build()
        out = network.evaluate(module, torch.zeros(2, *network.shape))
    count = sum(p.numel() for p in module.parameters())
    assert count == right.get(network.name, count) and (count > 32e6)
    assert out.shape == (2, *network.shape)


def test_rows_are_on_disk_when_a_later_one_fails(tmp_path):
    def fails():
        raise RuntimeError("the call was cut")

    table = Table(tmp_path / "a" / "rows.csv", "made here", ("case",))
    with pytest.raises(RuntimeError):
        list(fill(table, [(("x",), lambda: {"case": "x", "µs": 1.5}), (("y",), fails)], 60))
    again = Table(tmp_path / "a" / "rows.csv", "made here", ("case",))
    assert again.rows == [{"case": "x", "µs": "1.5"}]
    tasks = [(("x",), fails), (("y",), lambda: {"case": "y", "µs": 2})]
    assert [row["case"] for row in fill(again, tasks, 60)] == ["y"]
    assert (tmp_path / "a" / "rows.csv").read_text(encoding="utf-8").splitlines() == [
        "# made here", "case,µs", "x,1.5", "y,2"
    ]  # fmt: skip
    with pytest.raises(SystemExit, match="made by 'made here', not by 'elsewhere'"):
        Table(tmp_path / "a" / "rows.csv", "elsewhere", ("case",))


def test_nothing_is_begun_that_may_not_end_in_time(tmp_path, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("scripts.bench.tables.time.monotonic", lambda: now[0])

    def measure(name):
        now[0] += 100
        return {"case": name}

    tasks = [((n,), lambda n=n: measure(n)) for n in "abcd"]
    table = Table(tmp_path / "rows.csv", "here", ("case",))
    assert [row["case"] for row in fill(table, tasks, 250)] == ["a", "b"]
    assert "2 rows are left; call again" in capsys.readouterr().out
    assert [row["case"] for row in fill(table, tasks, 250)] == ["c", "d"]


def test_the_command_measures_what_the_filters_name(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GPU_SIZES", {gpu.SDXL: (1, 8, 8), gpu.BIG: (1, 8, 8)})
    monkeypatch.setattr(gpu_networks, "NETWORKS", (TINY,))
    monkeypatch.setattr(gpu, "gpu_tasks", partial(gpu.gpu_tasks, repeats=(1, 1)))
    whole = partial(gpu_networks.network_tasks, pairs=1)
    monkeypatch.setattr(gpu_networks, "network_tasks", whole)
    out = ["--out", str(tmp_path)]
    bench.main(["--only", "gpu", "--sizes", "sdxl", "--cases", "APG", *out], Dry())
    bench.main(["--only", "networks", "--networks", "tiny", *out], Dry())

    def read(name):
        note, *lines = (tmp_path / name).read_text(encoding="utf-8").splitlines()
        assert torch.__version__ in note
        return list(csv.DictReader(lines))

    rows = read("kernels_cpu.csv")
    assert {row["case"] for row in rows} == {c.name for c in CASES if "APG" in c.name}
    assert {row["size"] for row in rows} == {gpu.SDXL}
    assert {row["network"] for row in read("kernels_cpu_networks.csv")} == {"tiny"}
    assert read("kernels_cpu_bars.csv")
    with pytest.raises(SystemExit, match="--cases nothing: no such name"):
        bench.main(["--only", "gpu", "--cases", "nothing", *out], Dry())


def test_gpu_parts_are_refused_without_a_gpu(tmp_path):
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="--only gpu needs a CUDA device"):
            bench.main(["--only", "gpu", "--out", str(tmp_path)])


def test_the_bars_are_read_off_the_rows():
    row = {"of copy": 0.87, "diffusers host µs": 90.0, "ours in a graph µs": "5.0"}
    row |= {"compiled reference in a graph µs": 4.5, "ours host µs": 60}
    rows = [{**row, "case": case, "size": size} for case in ("CFG + DDIM", "APG + DDIM")
            for size in (gpu.BIG, gpu.SDXL)]  # fmt: skip
    rows[-1]["compiled reference in a graph µs"] = ""
    found = {
        (b["case"], b["size"], b["bar"].split(" >=")[0]): b["reached"] for b in bench.bars(rows)
    }
    assert not found["CFG + DDIM", gpu.BIG, "copy / ours"]
    assert found["APG + DDIM", gpu.BIG, "copy / ours"]
    assert found["APG + DDIM", gpu.SDXL, "diffusers / ours, host"]
    assert not found["CFG + DDIM", gpu.SDXL, "compiled / ours, graphs"]
    assert ("APG + DDIM", gpu.SDXL, "compiled / ours, graphs") not in found


def test_errors_counts_and_tables(tmp_path, capsys):
    assert [row["case"] for row in bench.errors()] == [case.name for case in CASES]
    bench._write(tmp_path / "a" / "counts.csv", list(bench.counts()))
    note, *lines = (tmp_path / "a" / "counts.csv").read_text(encoding="utf-8").splitlines()
    assert note.startswith("# python -m scripts.bench.kernels; ") and torch.__version__ in note
    assert [row["case"] for row in csv.DictReader(lines)] == [case.name for case in CASES]
    assert "APG + GHVB" in capsys.readouterr().out


def test_a_wrong_kernel_stops_the_benchmark(monkeypatch):
    monkeypatch.setattr(
        bench, "_double", lambda v: v.double() * 1.00001 if hasattr(v, "dtype") else v
    )
    with pytest.raises(SystemExit, match="CFG . DDIM.*no times are taken"):
        list(bench.errors())
