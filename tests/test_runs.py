"""Prompt files, and images that are on disk whole or not at all."""

import errno
import io
import json
import os
import signal
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sampler.runs import prompts, writer
from sampler.types import SamplerError

PICTURE = Image.frombytes("RGB", (8, 8), bytes(range(192)))


def refused(call, *arguments):
    with pytest.raises(SamplerError) as caught:
        call(*arguments)
    return caught.value


def test_prompts_are_the_lines_that_say_something(tmp_path):
    file = tmp_path / "p.txt"
    file.write_bytes("\ufeff# a comment\n a fox \r\n\n\ta dog, „groß“\n  # no\nlast".encode())
    assert prompts.read_prompts(file) == ["a fox", "a dog, „groß“", "last"]


def test_prompts_come_from_standard_input_too(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\ntwo\n")))
    assert prompts.read_prompts("-") == ["one", "two"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"fine\ncaf\xe9", "p.txt:2: this is not UTF-8"),
        (b"a\x00b", "p.txt:1: the prompt holds the control character U+0000"),
        (b"ok\na\x1b[31m", "p.txt:2: the prompt holds the control character U+001B"),
        (b"x" * 20_001, "20000 characters"),
        (b"x" * (2**20 + 1), "longer than 1 MiB"),
        (b"", "there is no prompt"),
        (b"# only\n\n", "there is no prompt"),
    ],
)
def test_bad_prompt_files_name_file_and_line(tmp_path, data, words):
    file = tmp_path / "p.txt"
    file.write_bytes(data)
    error = refused(prompts.read_prompts, file)
    assert words in str(error) and error.code == 2


def test_other_files_are_refused_by_name(tmp_path):
    assert "no such file" in str(refused(prompts.read_prompts, tmp_path / "p.txt"))
    assert ".txt files" in str(refused(prompts.read_prompts, "p.csv"))
    (tmp_path / "d.txt").mkdir()
    assert "is a directory" in str(refused(prompts.read_prompts, tmp_path / "d.txt"))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80))
def test_any_bytes_are_prompts_or_one_sentence(tmp_path_factory, data):
    file = tmp_path_factory.mktemp("fuzz") / "p.txt"
    file.write_bytes(data)
    try:
        found = prompts.read_prompts(file)
    except SamplerError as error:
        assert error.code == 2 and "\n" not in str(error)
    else:
        assert found and all(text.strip() == text != "" for text in found)


def test_a_record_survives_in_the_image(tmp_path):
    record = {"prompt": "a fox — „x“\t", "seed": 2**63 - 1, "scale": 0.1, "interval": [1.0, 2]}
    data = writer.encode_png(PICTURE, record)
    assert data == writer.encode_png(PICTURE, dict(reversed(record.items())))
    file = tmp_path / "a.png"
    file.write_bytes(data)
    assert writer.read_record(file) == record
    with Image.open(file) as image:
        assert image.tobytes() == PICTURE.tobytes()
    file.write_bytes(writer.encode_png(PICTURE))
    assert writer.read_record(file) is None
    file.write_bytes(data[:60])
    assert refused(writer.read_record, file).code == 2


def test_keys_are_functions_of_the_record_alone():
    assert writer.key_of({"a": 1, "b": "é"}) == writer.key_of({"b": "e\u0301", "a": 1})
    assert writer.key_of({"a": 1}) != writer.key_of({"a": 2})
    assert len(writer.key_of({})) == 20
    with pytest.raises(ValueError):
        writer.key_of({"a": float("nan")})


def test_numbers_go_on_where_the_folder_ends(tmp_path):
    assert writer.next_index(tmp_path / "new") == 0
    for name in ("000002-0123456789.png", "000041.png", "x.png", ".tmp-1-000099-0123456789.png"):
        (tmp_path / name).touch()
    assert writer.next_index(tmp_path) == 3
    assert writer.file_name(3, "abcdef0123456789abcd") == "000003-abcdef0123.png"


def test_a_file_is_never_replaced(tmp_path):
    file = tmp_path / "new" / "a.png"
    writer.write_new(file, b"first")
    with pytest.raises(FileExistsError):
        writer.write_new(file, b"second")
    assert file.read_bytes() == b"first"
    assert os.listdir(file.parent) == ["a.png"]


def test_without_hard_links_a_file_is_not_replaced_either(tmp_path, monkeypatch):
    def link(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    writer.write_new(tmp_path / "a.png", b"first")
    with pytest.raises(FileExistsError):
        writer.write_new(tmp_path / "a.png", b"second")
    assert (tmp_path / "a.png").read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["a.png"]


@pytest.mark.parametrize("call", ["open", "fsync", "link"])
def test_a_failing_disk_leaves_nothing_behind(tmp_path, monkeypatch, call):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    if call == "link":  # a full disk refuses the link, and the rename after it
        monkeypatch.setattr(type(tmp_path), "rename", full)
    monkeypatch.setattr(os, call, full)
    error = refused(writer.write_new, tmp_path / "a.png", b"data")
    assert error.code == 5 and "no space left" in str(error)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == []


def test_a_file_in_place_of_the_folder_is_a_storage_error(tmp_path):
    (tmp_path / "out").write_text("x")
    assert refused(writer.write_new, tmp_path / "out" / "a.png", b"data").code == 5


KILLED = """
import os, signal, sys
from pathlib import Path
from sampler.runs import writer
point, path = sys.argv[1], Path(sys.argv[2])
real = getattr(os, point)
def last(*a, **k):
    if point == "unlink":
        os.kill(os.getpid(), signal.SIGKILL)
    result = real(*a, **k)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(os, point, last)
if point == "unlink":
    type(path).unlink = lambda self, **k: last()
writer.write_new(path, b"whole" * 1000)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.parametrize(
    ("point", "there"), [("open", 0), ("fsync", 0), ("link", 1), ("unlink", 1)]
)
def test_a_kill_at_any_point_leaves_the_whole_file_or_none(tmp_path, point, there):
    file = tmp_path / "a.png"
    ended = subprocess.run([sys.executable, "-c", KILLED, point, str(file)], timeout=60)
    assert ended.returncode == -signal.SIGKILL
    assert file.exists() == bool(there)
    if there:
        assert file.read_bytes() == b"whole" * 1000
    assert writer.next_index(tmp_path) == 0  # what is left over is no image
    writer.write_new(tmp_path / "b.png", b"x")


def test_nothing_here_imports_torch():
    code = (
        "import sys, sampler.runs.prompts, sampler.runs.writer; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_canonical_json_is_sorted_and_tight():
    assert writer.canonical({"b": [1, 2.5], "a": "é"}) == '{"a":"é","b":[1,2.5]}'
    assert json.loads(writer.canonical({"x": None})) == {"x": None}
