"""Configuration: strict YAML, strict schema, and which layer wins."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sampler.cli.report import printable
from sampler.config import layers
from sampler.config import yaml as strict_yaml
from sampler.config.schema import Config, validated
from sampler.core.errors import SamplerError


def value(text):
    return strict_yaml.parse(text, "f.yaml")[0]


def problem(call, *arguments):
    with pytest.raises(SamplerError) as caught:
        call(*arguments)
    assert caught.value.code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def resolved(files=(), environment=None, sets=(), options=None):
    return layers.resolve(
        [*map(layers.read_file, files), *layers.from_environment(environment or {})],
        layers.from_sets(sets),
        layers.from_options(options or {}),
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-4", 1e-4),
        ("-1.5E+3", -1500.0),
        (".5", 0.5),
        ("7", 7),
        ("-3", -3),
        ("010", 10),
        ("0x10", "0x10"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2026-01-31", "2026-01-31"),
        ("true", True),
        ("false", False),
        ("yes", "yes"),
        ("on", "on"),
        ("True", "True"),
        ("null", None),
        ("~", None),
        ("", None),
        ("'true'", "true"),
        ("nan", "nan"),
        ("[1, [a, 2.0]]", [1, ["a", 2.0]]),
        ("a: &x [1]\nb: *x", {"a": [1], "b": [1]}),
        ("<<: {a: 1}", {"<<": {"a": 1}}),
        ('{"a": {"b": [1, 2.5, "c"]}}', {"a": {"b": [1, 2.5, "c"]}}),
    ],
)
def test_plain_values(text, expected):
    found = value(text)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3", "f.yaml:3: the key 'a' is given twice"),
        ("a:\n  !!python/object/apply:os.system [ls]", "f.yaml:2: tags"),
        ("!!str 3", "tags"),
        ("a: .nan", "f.yaml:1: .nan is not a finite number"),
        ("- 1\n- -.inf", "f.yaml:2: -.inf is not a finite number"),
        ("1e999", "not a finite number"),
        ("1: 2", "a key must be text"),
        ("? [1]\n: 2", "a key must be text"),
        ("a: [1", "f.yaml:1: while parsing a flow sequence"),
        ("a: 1\n b: 2", "f.yaml:2"),
        ("--- 1\n--- 2", "another document"),
        ("\x00", "unacceptable character"),
        ("[" * 33 + "]" * 33, "depth 32"),
        ("- 1\n" * 10_001, "10000 values"),
        ("- &a 1\n" + "- *a\n" * 101, "100 aliases"),
        ("&a [*a]", "endless"),
        ("x: " + "9" * 41, "40 digits"),
        ("#" * 2**20 + "\n1", "larger than 1 MiB"),
        ("a: *b", "undefined alias"),
    ],
)
def test_what_yaml_must_not_hold(text, words):
    assert words in problem(value, text)


def test_a_bomb_of_aliases_is_refused_quickly():
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
    )
    assert "aliases make the file too large" in problem(value, bomb)


@settings(max_examples=300, deadline=None)
@given(
    st.text(
        alphabet=st.sampled_from(list("ab:-[]{}&*!#'\"|>?,.~ \n\t01e\x00\ud800%@`")), max_size=60
    )
)
def test_any_text_is_a_value_or_one_sentence(text):
    try:
        json.dumps(value(text), allow_nan=False)
    except SamplerError as error:
        assert error.code == 2 and "\n" not in str(error)


def test_the_defaults_are_complete():
    assert resolved() == Config()
    assert validated({}, {}) == Config()


def test_layers_win_in_the_documented_order(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("run: {steps: 1, n: 1, seed: 1}\noutput: {dir: one}\nmodel: {device: x}")
    second.write_text("run: {steps: 2, n: 2}\noutput: {dir: two}")
    environment = {"SAMPLER_OUT": "three", "SAMPLER_DEVICE": "", "HOME": "/"}
    config = resolved([first, second], environment, ["run.n=3"], {"-n": ("run.n", 4)})
    assert (config.run.steps, config.run.n, config.run.seed) == (2, 4, 1)
    assert (config.output.dir, config.model.device) == ("three", "x")
    assert resolved([first, second], environment, ["run.n=3", "output.dir=four"]).run.n == 3
    assert resolved([second, first]).run.steps == 1
    assert resolved([first], environment, ["output.dir=four"]).output.dir == "four"


def test_strategies_merge_by_field_until_the_name_changes(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("sampler: {name: ab, order: 2}\nguidance: {name: cfg, scale: 3}")
    assert resolved([file], sets=["guidance.rescale=0.5"]).guidance == {
        "name": "cfg",
        "scale": 3,
        "rescale": 0.5,
    }
    assert resolved([file], options={"--sampler": ("sampler", "ddim")}).sampler == {"name": "ddim"}
    both = resolved([file], sets=["sampler.eta=0.5"], options={"--sampler": ("sampler", "ddim")})
    assert both.sampler == {"name": "ddim", "eta": 0.5}
    assert resolved([file], sets=["sampler=ab"]).sampler == {"name": "ab", "order": 2}
    named = resolved([file], sets=["sampler=ab"], options={"--sampler": ("sampler", "ddim")})
    assert named.sampler == {"name": "ddim"}


def test_fields_without_a_name_are_kept_for_the_default():
    assert resolved(sets=["guidance.rescale=0.5"]).guidance == {"rescale": 0.5}


def test_a_prompt_file_is_relative_to_its_configuration(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("prompts: {file: p.txt}")
    assert resolved([file]).prompts.file == str(tmp_path / "p.txt")
    assert resolved([file], sets=["prompts.file=q.txt"]).prompts.file == "q.txt"
    file.write_text("prompts: [a fox, a dog]")
    assert resolved([file]).prompts.texts == ("a fox", "a dog")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("run:\n  stpes: 3", "a.yaml:2: run.stpes: unknown key (did you mean 'steps'?)"),
        ("rum: {}", "a.yaml:1: rum: unknown key (did you mean 'run'?)"),
        ("run: {steps: 0}", "run.steps = 0 must be an integer from 1 to 1000"),
        ("run: {steps: 1001}", "must be an integer from 1 to 1000"),
        ("run: {steps: 2.5}", "must be an integer from 1 to 1000"),
        ("run: {steps: true}", "must be an integer from 1 to 1000"),
        ("run: {steps: '20'}", "must be an integer from 1 to 1000"),
        ("run: {n: 0}", "run.n = 0"),
        ("run: {seed: -1}", "run.seed = -1"),
        ("run: {seed: 9223372036854775808}", "run.seed"),
        ("run: {width: 7}", "run.width = 7"),
        ("run: {batch_size: 0}", "must be 'auto', or an integer of at least 1"),
        ("run: 3", "run = 3 must be a mapping (key: value)"),
        ("model: {dtype: fp16}", "one of 'auto', 'float32', 'float16', 'bfloat16'"),
        ("version: 2", "version = 2 must be 1"),
        ("\n\nsampler: abb", "a.yaml:3: Unknown sampler 'abb' (did you mean 'ab'?)"),
        ("guidance: {name: cfg, scal: 3}", "has no field 'scal' (did you mean 'scale'?)"),
        ("guidance: {name: cfg, scale: high}", "scale = 'high'"),
        ("guidance: {name: cfg, scale: .nan}", "not a finite number"),
        ("guidance: {name: cfg, scale: -1}", "scale = -1"),
        ("sampler: [ab]", "A sampler is a name"),
        ("sampler: {order: 2, name: 3}", "needs 'name'"),
        ("prompts: [1]", "prompts.texts.0 = 1 must be a text"),
        ("- 1", "is a mapping"),
        ("3", "is a mapping"),
    ],
)
def test_a_bad_file_is_one_sentence_with_its_place(tmp_path, text, words):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    message = problem(resolved, [file])
    assert words in message
    assert message.startswith(str(file))


def test_unreadable_files_are_named(tmp_path):
    assert "missing.yaml: no such file" in problem(layers.read_file, tmp_path / "missing.yaml")
    assert "is a directory" in problem(layers.read_file, tmp_path)
    file = tmp_path / "latin.yaml"
    file.write_bytes(b"run:\n  n: 1 # caf\xe9")
    assert "latin.yaml:2: not UTF-8" in problem(layers.read_file, file)
    file.write_bytes(b"\xef\xbb\xbfversion: 1")
    assert layers.read_file(file).tree == {"version": 1}


@pytest.mark.parametrize("text", ["run.n", "=3", "run..n=3", ".=1"])
def test_a_set_is_key_equals_value(text):
    assert "a.b=value" in problem(layers.from_sets, [text])


def test_sets_name_themselves_in_errors():
    assert problem(resolved, (), None, ["run.stpes=3"]).startswith("--set: run.stpes: unknown key")
    assert problem(resolved, (), None, (), {"--steps": ("run.steps", 0)}).startswith("--steps:")
    assert problem(resolved, (), {"SAMPLER_OUT": "a"}, ["output=3"]).startswith("--set:")


def test_messages_cannot_steer_the_terminal():
    assert printable("a\x1b[31mb\u202ec") == "a?[31mb?c"
