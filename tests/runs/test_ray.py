"""`--executor ray` as it is used: the command line, off a terminal, on a cluster of two nodes."""

import json
import os
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

import sampler.cli.open_run
from sampler.cli import main, progress
from sampler.runs.folder import RunFolder
from sampler.runs.store import open_store
from tests.runs.stub import pictures

ROOT = Path(__file__).parents[2]
MEMORY = 80 * 2**20  # of a node's object store; only batch numbers travel
IMAGES = 6
LINE = ["generate", "a fox", "a dog", "-n", "3", "--seed", "1", "--steps", "2", "--batch-size", "1"]
engine_of = sampler.cli.open_run.engine_of


@contextmanager
def cluster_of_two():
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": MEMORY}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'kernels'}")
        patch.setenv("OMP_NUM_THREADS", "1")
        # Actors start at niceness 15 otherwise, which on a loaded machine takes minutes.
        patch.setenv("RAY_worker_niceness", "0")
        cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        try:
            yield cluster, cluster.add_node(**node)
        finally:
            cluster.shutdown()


@pytest.fixture(scope="module")
def cluster():
    with cluster_of_two() as found:
        yield found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The images of one process."""
    where = tmp_path_factory.mktemp("whole")
    assert main([*LINE, "-q", "-o", str(where)]) == 0
    return pictures(where)


@pytest.fixture(autouse=True)
def _a_progress_line_for_everything(monkeypatch):
    """Also for what actors report before their first image."""
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)


def run(capsys, *arguments):
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def on_ray(cluster, out):
    return ["--executor", "ray", "--address", cluster[0].address, "-o", out]


@pytest.mark.slow
def test_a_run_by_address_to_its_end_and_resumed(capsys, tmp_path, cluster, whole):
    out = tmp_path / "run"
    code, stdout, err = run(capsys, *LINE, *on_ray(cluster, out))
    assert code == 0, err
    assert pictures(out) == whole
    assert len(stdout.splitlines()) == IMAGES
    assert f"0 of {IMAGES} images, 0.00 images/s, 0 failed\n" in err, "before the first image"
    assert err.splitlines()[-1] == f"{IMAGES} images in {out}."
    code, stdout, err = run(capsys, *LINE, *on_ray(cluster, out), "--json")
    assert code == 0 and "already" in err
    assert json.loads(stdout.splitlines()[-1])["skipped"] == IMAGES
    (out / "images" / min(pictures(out))).unlink()  # of one batch: actors take seconds to start
    address = ["--executor", "ray", "--address", cluster[0].address]
    code, stdout, err = run(capsys, "resume", out, *address)
    assert code == 0 and pictures(out) == whole
    assert err.splitlines()[-1] == f"1 image in {out}, {IMAGES - 1} existed."


def failing(run, model):
    """The engine of an actor, whose images cannot be decoded."""
    engine = engine_of(run, model)

    def decode(latents):
        raise RuntimeError("odd")

    engine.pipeline.decode = decode
    return engine


def meeting(run, model):
    """The engine of an actor, once two of them have come this far."""
    met = Path(os.environ["MET"])
    (met / str(os.getpid())).touch()
    deadline = time.monotonic() + 300
    while len(list(met.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    return engine_of(run, model)


@pytest.mark.slow
def test_a_run_whose_images_all_fail(capsys, tmp_path, cluster, monkeypatch):
    monkeypatch.setattr(sampler.cli.open_run, "engine_of", failing)
    line = [*LINE, "--batch-size", str(IMAGES), *on_ray(cluster, tmp_path / "run")]  # one actor
    code, stdout, err = run(capsys, *line)
    assert (code, stdout) == (3, "")
    told = err.splitlines()
    assert f"sampler: {IMAGES} images failed" in told[-1] and "internal" not in err.lower()
    assert told[-2] == f"0 images in {tmp_path / 'run'}, {IMAGES} failed."


@pytest.mark.slow
def test_a_run_resumed_with_another_model_is_refused(capsys, tmp_path, cluster):
    out = tmp_path / "run"
    assert run(capsys, *LINE[:2], "--steps", 1, "-o", out)[0] == 0
    next(out.glob("images/*.png")).unlink()
    facts = json.loads((out / "run.json").read_text())
    text = (out / "run.json").read_text()
    (out / "run.json").write_text(text.replace(facts["model"]["fingerprint"], "files:0"))
    address = ["--executor", "ray", "--address", cluster[0].address]
    code, _, err = run(capsys, "resume", out, *address)
    assert code == 6 and "another model" in err and "Traceback" not in err


@pytest.mark.slow
def test_a_node_is_removed(capsys, tmp_path, tmp_path_factory, whole, monkeypatch):
    """A batch on the lost node is made on the other; nothing is lost or made twice."""
    monkeypatch.setenv("MET", str(tmp_path_factory.mktemp("met")))
    monkeypatch.setattr(sampler.cli.open_run, "engine_of", meeting)
    out, shown = tmp_path / "run", progress.Meter._line
    with cluster_of_two() as (cluster, other):
        nodes = [other]

        def line(meter, *arguments):
            shown(meter, *arguments)
            if nodes:
                cluster.remove_node(nodes.pop(), allow_graceful=False)

        monkeypatch.setattr(progress.Meter, "_line", line)
        code, _, err = run(capsys, *LINE, *on_ray((cluster, other), out))
    assert code == 0, err
    assert pictures(out) == whole and not nodes
    assert not RunFolder(open_store(out)).missing(check="hash")


def test_an_address_where_nobody_answers(capsys, tmp_path, monkeypatch):
    import ray

    def refuse(**options):
        raise ConnectionError("nobody")

    monkeypatch.setattr(ray, "init", refuse)
    line = [*LINE, "--executor", "ray", "--address", "127.0.0.1:1", "-o", tmp_path / "run"]
    code, _, err = run(capsys, *line)
    assert code == 2 and err == (
        "sampler: No Ray cluster answers at --address 127.0.0.1:1: nobody\n"
    )
