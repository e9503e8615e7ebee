"""Prompt files of every kind: what they hold, and what is told of bad ones."""

import gc
import io
import itertools
import json
import os
import sys
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sampler.core.errors import SamplerError
from sampler.runs import lines
from sampler.runs.axes import parse_axis, sweep
from sampler.runs.planner import Planner
from sampler.runs.tables import RawLine, read_table
from tests.runs.stub import MODEL, defaults


def read(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    return list(read_table(tmp_path / name))


def planned(path, kind):
    planner = Planner(MODEL, defaults(), 4)
    return list(planner.jobs(read_table(path, kind)))


def test_rows_of_every_kind_are_the_same_jobs(tmp_path):
    rows = [
        {"prompt": "a, fox", "seed": 3, "steps": 5, "scale": 2.0, "tag": "x", "sampler.eta": 0.5},
        {"prompt": 'say "hi"', "seed": 4, "steps": 5, "scale": 2.5, "tag": "y", "sampler.eta": 0.0},
    ]
    names = list(rows[0])
    csv = ",".join(names) + "\n" + "".join(
        ",".join('"' + str(value).replace('"', '""') + '"' for value in row.values()) + "\n"
        for row in rows
    )  # fmt: skip
    (tmp_path / "p.csv").write_text("\ufeff" + csv)
    (tmp_path / "p.tsv").write_text(csv.replace('","', '"\t"').replace(",", "\t", len(names) - 1))
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    expected = planned(tmp_path / "p.jsonl", "jsonl")
    assert [job.seed for job in expected] == [3, 4]
    assert planned(tmp_path / "p.csv", "csv") == expected
    assert planned(tmp_path / "p.tsv", "tsv") == expected
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    assert planned(tmp_path / "p.parquet", "parquet") == expected


def test_text_files_are_the_lines_that_say_something(tmp_path):
    data = "\ufeff# a comment\n a fox \r\n\n\ta dog, „groß“\n  # no\nlast".encode()
    rows = read(tmp_path, "p.txt", data)
    assert [cells["prompt"] for _, cells, *_ in rows] == ["a fox", "a dog, „groß“", "last"]
    assert [where.rpartition(":")[2] for where, *_ in rows] == ["2", "4", "6"]
    assert lines.read_prompts(tmp_path / "p.txt") == ["a fox", "a dog, „groß“", "last"]


RECOGNISED = [
    (b"one\ntwo, prompt-like\n", ["one", "two, prompt-like"]),
    (b"{a|b} fox\n", ["{a|b} fox"]),
    (b'\n{"prompt": "a\\u00e9"}\n{"prompt": "b"}\n', ["a\u00e9", "b"]),
    ('\ufeffprompt,seed\n"a, b",3\n'.encode(), ["a, b"]),
    (b'seed\t"prompt"\n3\ta\n', ["a"]),
    (b"prompt\na\n", ["a"]),
]


@pytest.mark.parametrize(("data", "prompts"), RECOGNISED)
def test_standard_input_and_pipes_are_recognised_by_their_first_line(monkeypatch, data, prompts):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert [cells["prompt"] for _, cells, *_ in read_table("-")] == prompts
    reading, writing = os.pipe()  # what a shell passes for <(...)
    os.write(writing, data)
    os.close(writing)
    assert [cells["prompt"] for _, cells, *_ in read_table(f"/dev/fd/{reading}")] == prompts
    os.close(reading)


def test_a_format_overrides_the_first_line(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"prompt\na\n")))
    assert [cells["prompt"] for _, cells, *_ in read_table("-", "txt")] == ["prompt", "a"]


def test_parquet_comes_from_standard_input(monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "a\n" * 99, "seed": 3}]), buffer)
    for kind in (None, "parquet"):
        buffer.seek(0)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(buffer.getvalue())))
        assert [line.cells for line in read_table("-", kind)] == [{"prompt": "a\n" * 99, "seed": 3}]


@pytest.mark.parametrize("read", [1, 3000])
@pytest.mark.parametrize("name", ["p.parquet", "p.csv", "p.jsonl"])
def test_files_are_closed_whether_read_to_the_end_or_not(tmp_path, name, read):
    if name == "p.parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        table = pyarrow.Table.from_pylist([{"prompt": "a"}] * 3000)
        parquet.write_table(table, tmp_path / name)
    else:
        rows = "prompt\n" + "a\n" * 3000 if name == "p.csv" else '{"prompt": "a"}\n' * 3000
        (tmp_path / name).write_text(rows)
    with warnings.catch_warnings(record=True, action="always") as found:
        lines = read_table(tmp_path / name)
        assert len(list(itertools.islice(lines, read))) == read
        del lines
        gc.collect()
    assert [str(one.message) for one in found if one.category is ResourceWarning] == []


def test_text_files_hold_prompts_of_several_lines(tmp_path):
    data = b"# set 1\n\n---\na fox\n  in the snow\n# no\n---\n\n---\na dog --w 64\n---\n"
    rows = read(tmp_path, "p.txt", data)
    assert [cells for _, cells, *_ in rows] == [
        {"prompt": "a fox\nin the snow"}, {"prompt": "a dog", "width": "64"}]  # fmt: skip
    assert [where.rpartition(":")[2] for where, *_ in rows] == ["4", "10"]
    rows = read(tmp_path, "p.txt", b"---\na\ncaf\xe9\n---\nb\n")
    assert "p.txt:3: not UTF-8" in str(rows[0].cells) and rows[1].cells == {"prompt": "b"}
    rows = read(tmp_path, "p.txt", b"a\n---\nb\n")
    assert ":2: --- is a separator only if the file begins with it" in str(rows[1].cells)


OPTION_LINES = [
    ("a fox -- a dog, state-of-the-art", {"prompt": "a fox -- a dog, state-of-the-art"}),
    ("a dog's tail --n blurry, dark --w 512 --h 768 --s 28 --l 7.5 --d 42",
     {"prompt": "a dog's tail", "negative_prompt": "blurry, dark", "width": "512",
      "height": "768", "steps": "28", "scale": "7.5", "seed": "42"}),
    ('--prompt "a fox --in snow" --negative_prompt "it\'s dark" --steps 28 --cfg_scale 7',
     {"prompt": "a fox --in snow", "negative_prompt": "it's dark", "steps": "28", "scale": "7"}),
    ("--prompt a red fox --batch_size 2 --n_iter 3 --sampler_name ddim --seed -1",
     {"prompt": "a red fox", "n": "6", "sampler": "ddim", "seed": "-1"}),
]  # fmt: skip


@pytest.mark.parametrize(("text", "cells"), OPTION_LINES[:2] + OPTION_LINES[3:])
def test_lines_may_hold_the_options_of_other_tools(tmp_path, text, cells):
    (row,) = read(tmp_path, "p.txt", text.encode())
    assert row.cells == cells and row.text


def test_settings_that_only_runs_read_are_noted_elsewhere(tmp_path, recwarn):
    (tmp_path / "p.csv").write_text("prompt,seed,tag\na,1,x\n")
    (tmp_path / "p.txt").write_text("a fox\n")
    assert lines.read_prompts(tmp_path / "p.txt") == ["a fox"] and not recwarn
    assert lines.read_prompts(tmp_path / "p.csv") == ["a"]
    assert "only the prompts are used here, not seed, tag" in str(recwarn[0].message)


def test_blank_rows_and_columns_of_spreadsheets_are_no_prompts(tmp_path):
    (tmp_path / "p.csv").write_text("prompt,seed,,\na fox,1,,\n,,,\n  ,,,\n\na dog,2,, \n")
    assert [(job.prompt, job.seed) for job in planned(tmp_path / "p.csv", "csv")] == [
        ("a fox", 1), ("a dog", 2)]  # fmt: skip
    rows = [{"prompt": "a fox", "seed": 1}, {"prompt": None, "seed": None},
            {"prompt": "a dog", "seed": 2}]  # fmt: skip
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [job.prompt for job in planned(tmp_path / "p.jsonl", "jsonl")] == ["a fox", "a dog"]


def test_files_as_pandas_writes_them_are_read_as_they_are_meant(tmp_path):
    """Integers in columns with gaps are floats, and gaps are nulls, also inside of settings."""
    row = {"prompt": "a", "seed": 42.0, "steps": 5.0, "width": None, "scale": 2.0,
           "sampler": {"name": "ab", "order": 3.0}, "guidance.rescale": None}  # fmt: skip
    plain = {"prompt": "a", "seed": 42, "steps": 5, "scale": 2.0,
             "sampler": {"name": "ab", "order": 3}}  # fmt: skip
    nulls = {**row, "sampler": {"name": "ab", "order": 3.0, "eta": None}}
    (tmp_path / "plain.jsonl").write_text(json.dumps(plain))
    expected = planned(tmp_path / "plain.jsonl", "jsonl")
    (tmp_path / "p.jsonl").write_text(json.dumps(nulls))
    assert planned(tmp_path / "p.jsonl", "jsonl") == expected
    (tmp_path / "p.csv").write_text(
        "prompt,seed,steps,width,scale,sampler,sampler.order\na,42.0,5.0,,2.0,ab,3\n"
    )
    assert planned(tmp_path / "p.csv", "csv") == expected
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    other = {"prompt": "b", "seed": float("nan"), "sampler": {"name": "ddim", "eta": 0.5}}
    parquet.write_table(pyarrow.Table.from_pylist([row, other]), tmp_path / "p.parquet")
    found = planned(tmp_path / "p.parquet", "parquet")
    assert found[:1] == expected and [job.prompt for job in found] == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("p.txt", b"fine\ncaf\xe9", ":2: not UTF-8"),
        ("p.txt", b"a --ar 16:9", ":1: --ar is not an option of prompt lines; known: n, w, h"),
        ("p.txt", b"a --step 3", "(did you mean 'steps'?); a jsonl file takes it as text"),
        ("p.txt", b"a --w", ":1: --w needs a value"),
        ("p.txt", b"a --w 64 --width 64", ":1: --width: width is given twice"),
        ("p.txt", b"a --w wide", ":1: width = 'wide' must be an integer"),
        ("p.txt", b"a --n_iter two", ":1: --n_iter takes an integer, not 'two'"),
        ("p.txt", b'--prompt "a', ":1: a quote is never closed"),
        ("p.txt", b"--steps 3", ":1: prompt: the line has settings but no prompt"),
        ("p.txt", b"x" * (2**20 + 1), ":1: the line is longer than 1 MiB"),
        ("p.csv", b'prompt,seed\n"a,1\nb,2\n', ":2: a quote is never closed"),
        ("p.csv", b'prompt\n"a"b\n', ":2: "),
        ("p.csv", b"prompt,seed\na\n", ":2: 1 cells, but the header has 2"),
        ("p.csv", b"promt,seed\na,1\n", "did you mean 'promt'"),
        ("p.csv", b'"a\n\x00"\n', "known: a\\n\\x00."),
        ("p.csv", b"prompt,prompt\na,1\n", "given twice"),
        ("p.csv", b"", "the file is empty"),
        ("p.csv", b"prompt,seed\nb,1\na,x\n", ":3: seed = 'x' must be an integer from -1 to"),
        ("p.csv", b"prompt,seed\na,1\n,2\n", ":3: prompt: the line has settings but no prompt"),
        ("p.csv", b"prompt,,\na,,x\n", ":2: cell 3 is 'x', but its column has no name"),
        ("p.csv", b"prompt,seed\na,1e17\n", ":2: seed: 1e17 is a float above 2^53"),
        ("p.csv", b"prompt,steps\na,2.5\n", ":2: steps = '2.5' must be an integer"),
        ("p.jsonl", b'{"prompt": "a", "seed": 1e17}\n', "seed: 1e+17 is a float above 2^53"),
        ("p.jsonl", b'{"prompt": "a", "seed": 1.5}\n', "seed = 1.5 must be an integer"),
        ("p.jsonl", b'{"prompt": null, "seed": 1}\n', "the line has settings but no prompt"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": }\n', ":2: not a JSON line"),
        ("p.jsonl", b'{"prompt": "a", "scale": NaN}\n', "NaN is not a finite number"),
        ("p.jsonl", b'{"prompt": "a", "prompt": "b"}\n', "'prompt' is given twice"),
        ("p.jsonl", b"[1]\n", "must be one object"),
        ("p.jsonl", b"[" * 100_000 + b"\n", ":1: "),
        ("p.jsonl", b'{"prompt": "\\ud800"}\n', "U+D800"),
        ("p.jsonl", b'{"prompt": 5}\n', "prompt = 5 must be a text"),
        ("p.parquet", b"PAR1 no", "not a readable parquet"),
        ("p.doc", b"a", "prompt files are txt"),
    ],
)
def test_bad_files_are_one_sentence_with_its_place(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(SamplerError) as caught:
        planned(tmp_path / name, name.partition(".")[2])
    assert words in str(caught.value) and caught.value.code == 2, str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_files(tmp_path):
    for name in ("p.csv", "p.parquet"):
        with pytest.raises(SamplerError, match="no such file"):
            list(read_table(tmp_path / name))


LINES = st.lists(
    st.one_of(
        st.binary(max_size=30),
        st.sampled_from([b"prompt,seed", b'{"prompt": "a"}', b'"', b"a,1", b'{"prompt":1e999}',
                         b"\xef\xbb\xbf", b"__a__ {b|c}", b'{"sampler":{"name":[]}}']),
    ),
    max_size=5,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(LINES, st.sampled_from(["txt", "csv", "tsv", "jsonl"]))
def test_any_bytes_are_jobs_or_one_sentence(tmp_path_factory, lines, kind):
    path = tmp_path_factory.mktemp("fuzz") / f"p.{kind}"
    path.write_bytes(b"\n".join(lines))
    try:
        jobs = planned(path, kind)
    except SamplerError as error:
        assert error.code == 2 and "\n" not in str(error)
    else:
        assert jobs


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("steps=1,2, 3", (1, 2, 3)),
        ("steps=1..4", (1, 2, 3, 4)),
        ("steps=1..10:4", (1, 5, 9)),
        ("steps=4..1", (4, 3, 2, 1)),
        ("scale=0..1#5", (0.0, 0.25, 0.5, 0.75, 1.0)),
        ("scale=0.1..0.3:0.1", (0.1, 0.2, 0.3)),
        ("prompt/cat=a\\, b,c", ("a, b", "c")),
        ("guidance=cfg,apg", ("cfg", "apg")),
        ("guidance.scale=1,7.5", (1, 7.5)),
        ("prompt=1..2", ("1..2",)),
    ],
)
def test_axes(text, values):
    axis = parse_axis(text)
    assert axis.name == text.partition("=")[0] and axis.values == values
    assert [type(v) for v in axis.values] == [type(v) for v in values]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps", "NAME=VALUES"),
        ("stesp=1", "did you mean 'steps'"),
        ("steps=1,1", "given twice"),
        ("steps=1..5:0", "never reaches"),
        ("steps=1..5:-1", "never reaches"),
        ("steps=1..999999", "more than 10000"),
        ("scale=0..1#1", "N from 2"),
    ],
)
def test_bad_axes(text, words):
    with pytest.raises(SamplerError, match=words.replace(".", r"\.")):
        parse_axis(text)


def test_a_sweep_is_every_combination_replacing_at_once():
    axes = [parse_axis("steps=2,3"), parse_axis("prompt/a cat=a dog,a cat and a dog"),
            parse_axis("prompt/a dog=a fox")]  # fmt: skip
    rows = list(sweep([RawLine("f:1", {"prompt": "a cat, a dog"})], axes))
    assert [(c["steps"], c["prompt"]) for _, c, *_ in rows] == [
        (2, "a dog, a fox"), (2, "a cat and a dog, a fox"),
        (3, "a dog, a fox"), (3, "a cat and a dog, a fox"),
    ]  # fmt: skip
    planner = Planner(MODEL, defaults(seed=0), 4)
    jobs = list(planner.jobs(rows))
    assert [dict(job.axes)["steps"] for job in jobs] == [2, 2, 3, 3]
    assert {job.seed for job in jobs} == {0}
    with pytest.raises(SamplerError, match="not in the prompt"):
        list(sweep([RawLine("f:1", {"prompt": "x"})], axes))
    with pytest.raises(SamplerError, match="given twice"):
        list(sweep([], [axes[0], axes[0]]))
