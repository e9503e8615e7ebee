"""The run folder: what counts as done, other plans, verify and repair, names, the lock."""

import json
import os
import random
import subprocess
import sys
import time
from dataclasses import asdict

import pytest

from sampler.cli import main
from sampler.core import durable
from sampler.core.errors import SamplerError
from sampler.runs import journal
from sampler.runs.folder import OutputOptions, RunFolder
from sampler.runs.jobs import Model
from sampler.runs.location import default_folder
from sampler.runs.lock import Lock
from sampler.runs.names import check_template, image_name, slug
from sampler.runs.store import open_store
from sampler.runs.verify import findings
from sampler.workers.work import WorkOptions
from tests.runs.stub import engine, make, pictures, planned, prompts

TABLE = prompts(10)


@pytest.fixture
def done(tmp_path):
    """A finished run of ten images in batches of four."""
    run, tally = make(tmp_path / "run", TABLE)
    assert (tally.done, tally.failed, tally.skipped) == (10, 0, 0)
    return run


def again(run, **options):
    """Run once more and return the files that are written."""
    made = engine()
    _, tally = make(run.store.root, TABLE, made, work_options=WorkOptions(**options))
    return tally.done, made.pipeline.batches


def test_default_folders_of_plans_with_the_same_name_are_two(tmp_path):
    """Names hold 16 bits of the plan: seeds 78 and 391 of "a fox" once ended in one folder."""
    first = default_folder("a fox", "3f9a" + "0" * 60, tmp_path)
    make(first, TABLE)
    facts = json.loads((first / "run.json").read_text())
    own, other = facts["plan"], facts["plan"][:4] + "0" * 60
    here = first.rename(tmp_path / f"2026-01-31-a-fox-{own[:4]}")
    output = asdict(OutputOptions())
    assert default_folder("a fox", own, tmp_path, output) == here
    assert default_folder("a fox", own, tmp_path, {**output, "metadata": "none"}) != here
    for _ in range(2):
        second = default_folder("a fox", other, tmp_path)
        assert second != here and second.name.endswith(f"a-fox-{own[:4]}")
        second.mkdir(exist_ok=True)  # planned, or about to be
    (second / "run.json").write_text("{")
    assert default_folder("a fox", other, tmp_path).name == f"{second.name}-2"


def test_the_same_prompt_with_other_output_is_made_in_another_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = ["generate", "a fox", "--steps", "1", "-q"]
    assert main(line) == main([*line, "--metadata", "none"]) == main(line) == 0
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_a_finished_run_is_not_computed_again(done):
    assert again(done) == (0, [])
    names = sorted(pictures(done.store.root))
    assert names[0].startswith("000000-") and len(names) == 10


def test_a_batch_is_computed_whole_and_only_missing_files_are_written(done):
    before = pictures(done.store.root)
    gone = done.store.root / "images" / sorted(before)[5]
    gone.unlink()
    times = {path: path.stat().st_mtime_ns for path in gone.parent.iterdir()}
    assert again(done) == (1, [8, 8, 8]), "cond and uncond of four rows, three steps"
    assert pictures(done.store.root) == before
    assert all(path.stat().st_mtime_ns == then for path, then in times.items())


def test_each_distinct_text_is_encoded_once(tmp_path):
    made = engine()
    table = [(f"f:{k}", {"prompt": f"p{k % 3}", "seed": k}) for k in range(12)]
    make(tmp_path / "run", table, made)
    assert made.pipeline.encoded == 3


def test_done_means_recorded_and_there_with_its_size(done):
    root = done.store.root
    names = sorted(pictures(root))
    (root / "images" / names[0]).write_bytes(b"")
    with open(root / "journal.jsonl", "ab") as stream:
        stream.write(b'{"v": 1, "key": "torn')
    assert {batch: jobs for batch, jobs in done.missing().items()} == {0: [0]}
    assert again(done)[0] == 1
    assert not done.missing(check="hash") and done.results().bad == 1
    # Files are recorded in the order in which the threads that write them finish.
    records = [*journal.read([(root / "journal.jsonl").read_bytes()]).entries.values()]
    lines = (root / "journal.jsonl").read_text().splitlines()
    lost = [json.dumps(entry["key"]) for entry in records if entry["index"] in (3, 7)]
    kept = [line for line in lines if not any(key in line for key in lost)]
    assert len(lines) - len(kept) == 2
    (root / "journal.jsonl").write_text("\n".join(kept) + "\n")
    assert again(done)[0] == 2, "without a record a file is made again"


def test_the_last_record_of_a_key_wins_and_garbage_is_passed_over():
    ok = {"key": "a", "index": 0, "status": "ok", "file": "f", "bytes": 1, "sha256": "x"}
    bad = {"key": "a", "index": 0, "status": "error"}
    garbage = (
        b'\n{"key": 5}\n[]\nnull\n\xff\xfe\n{"key":"b","index":1,"status":"ok"}\n' + b"[" * 99999
    )
    data = journal.encode([ok, bad]) + garbage
    results = journal.read([data])
    assert results.entries["a"]["status"] == "error" and results.bad == 6
    assert journal.read([data, journal.encode([ok])]).entries["a"]["status"] == "ok"
    assert journal.read([journal.encode([ok]), data]).entries["a"]["status"] == "ok"


def test_another_plan_is_refused_and_told(done):
    root = done.store.root

    def refused(*arguments, **options):
        with pytest.raises(SamplerError) as caught:
            make(root, *arguments, **options)
        assert caught.value.code == 4
        return str(caught.value)

    assert "steps (3 in the folder, 5 now)" in refused(TABLE, steps=5)
    assert "batch_size" in refused(TABLE, batch_size=2)
    assert "images (10 in the folder, 4 now)" in refused(TABLE[:4])
    assert "prompt of image 9" in refused([*TABLE[:9], ("f:1", {"prompt": "other"})])
    assert "output" in refused(TABLE, output=OutputOptions("none"))
    assert again(done) == (0, [])


def test_a_folder_whose_plan_was_not_finished_is_planned_anew(done):
    (done.store.root / "run.json").unlink()
    assert again(done) == (0, []), "the same plan finds the same results"


def test_damaged_facts_are_one_sentence(done):
    for name in ("plan.json", "run.json"):
        path = done.store.root / name
        good = path.read_bytes()
        for data in (b"", b"{", b"[]", b'{"v": 1}', b'{"v": 99}', b"\xff"):
            path.write_bytes(data)
            with pytest.raises(SamplerError) as caught:
                RunFolder(done.store)
            assert caught.value.code in (2, 4) and "\n" not in str(caught.value)
        path.write_bytes(good)


def test_a_folder_of_another_version_is_refused_by_its_format(done):
    path = done.store.root / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "v": 1}))
    with pytest.raises(SamplerError, match="run folder of format 1, .* reads format 2") as caught:
        RunFolder(done.store)
    assert caught.value.code == 4


def test_random_corruptions_are_found_and_exactly_those_repaired(done):
    root, rng = done.store.root, random.Random(3)
    whole = pictures(root)
    assert list(findings(done)) == []
    for _ in range(int(os.environ.get("SAMPLER_CORRUPTIONS", 12))):
        names = rng.sample(sorted(whole), rng.randint(1, 3))
        for name in names:
            path = root / "images" / name
            data = bytearray(path.read_bytes())
            kind = rng.randrange(3)
            if kind == 0:
                path.unlink()
            elif kind == 1:
                path.write_bytes(data[: rng.randrange(len(data))])
            else:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
                path.write_bytes(data)
        assert sorted(f.what for f in findings(done)) == sorted(f"images/{n}" for n in names)
        assert again(done, check="hash")[0] == len(names)
        assert pictures(root) == whole and list(findings(done)) == []


def test_verify_sees_foreign_files_and_changed_jobs(done):
    (done.store.root / "images" / "999999-aaaaaaaaaa.png").write_bytes(b"x")
    path = done.store.root / "jobs.jsonl"
    path.write_text(path.read_text().replace("picture 3", "picture X"))
    kinds = {finding.kind for finding in findings(RunFolder(done.store))}
    assert kinds == {"unknown", "job"}


def test_names_hold_no_text_of_users_unless_asked(done):
    job, settings = done.job(3), done.groups[0]
    assert image_name(job, settings, 10) == f"images/000003-{job.key[:10]}.png"
    assert image_name(job, settings, 20_000).startswith("images/0000/000003-")
    template = "{index}-{slug}-{sampler}-{axis:x/y}"
    check_template(template)
    assert image_name(job, settings, 10, template) == "images/000003-picture-3-ddim-x.png"
    hostile = ["../{index}", "/{index}", "{index}/{key}", "{slug}", "{prompt}-{index}", ".{index}",
               "{index.__class__}", "{index!r}", "a\\{index}",
               "{axis:../x}{index}\x00"]  # fmt: skip
    for bad in hostile:
        with pytest.raises(SamplerError):
            check_template(bad)


def test_hostile_prompts_stay_inside_the_folder(tmp_path):
    parts = [
        "../",
        "/etc/passwd",
        "..\\",
        "CON",
        "\u202e",
        "a" * 300,
        "%2e%2e/",
        "{key}",
        "'; rm",
        "é",
    ]
    rng = random.Random(1)
    hostile = ["".join(rng.choices(parts, k=4)) for _ in range(60)]
    table = [(f"f:{k}", {"prompt": text, "tag": text}) for k, text in enumerate(hostile)]
    output = OutputOptions(template="{slug}-{index}")
    run, tally = make(tmp_path / "run", table, output=output, batch_size=30)
    assert tally.done == len({text for text in hostile})
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    for name in pictures(run.store.root):
        assert len(name) <= 84 and all(c in "abcdefghijklmnopqrstuvwxyz0123456789_-." for c in name)
    assert slug("Ünï — CODE/../x" * 50) == slug("uni code x" * 50).replace("code-x", "code-x")


def test_links_inside_a_run_folder_are_refused(done, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    images = done.store.root / "images"
    for path in images.iterdir():
        path.unlink()
    images.rmdir()
    images.symlink_to(outside)
    with pytest.raises(SamplerError, match="symbolic link") as caught:
        again(done)
    assert caught.value.code == 5 and list(outside.iterdir()) == []


def test_two_processes_do_not_share_a_folder(done):
    code = (
        "import sys; from pathlib import Path; from sampler.runs.lock import Lock\n"
        "from sampler.core.errors import SamplerError\n"
        "try:\n    Lock(Path(sys.argv[1])).__enter__()\n"
        "except SamplerError as error:\n    print(error, error.code)\n"
    )
    line = [sys.executable, "-c", code, str(done.store.root)]
    with Lock(done.store.root):
        told = subprocess.run(line, capture_output=True, text=True, timeout=600).stdout
        assert f"in use by process {os.getpid()}" in told and told.endswith("4\n")
    assert subprocess.run(line, capture_output=True, text=True, timeout=600).stdout == ""


def test_a_lock_of_another_host_holds_until_it_is_stale(tmp_path):
    body = json.dumps({"pid": 1, "host": "elsewhere", "group": "x"})
    (tmp_path / ".lock").write_text(body)
    with pytest.raises(SamplerError, match="on elsewhere"):
        Lock(tmp_path).__enter__()
    old = time.time() - 61
    os.utime(tmp_path / ".lock", (old, old))
    with Lock(tmp_path):
        pass


def test_temporary_files_of_killed_writers_are_removed(done):
    left = done.store.root / "images" / f"{durable.TEMPORARY}1-0"
    left.write_bytes(b"half")
    again(done)
    assert not left.exists()


def test_an_object_store_gets_one_put_per_name(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    run, tally = make("memory://bucket/run", TABLE)
    assert tally.done == 10 and not run.missing(check="hash")
    names = [path for path in memory.find("/bucket/run") if "journal" in path]
    assert len(names) == 3, "a segment per batch"
    local, _ = make(tmp_path / "local", TABLE)
    for name, data in pictures(local.store.root).items():
        assert memory.cat_file(f"/bucket/run/images/{name}") == data
    memory.rm_file(sorted(memory.find("/bucket/run/images"))[2])
    _, tally = make("memory://bucket/run", TABLE)
    assert (tally.done, tally.skipped) == (1, 9)
    memory.rm("/bucket", recursive=True)


def test_a_run_of_another_model_is_another_plan(done):
    other = Model("files:" + "7" * 64, label="other", native=(16, 16))
    with pytest.raises(SamplerError, match="model"):
        planned(open_store(done.store.root), TABLE, model=other)
