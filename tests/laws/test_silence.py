"""Nothing that is given is ignored in silence.

Every option, column, field of a configuration, tensor of an adapter and file of a model folder
changes something that is recorded, or is refused or noted by name. The cases are made from the
tables of what exists; what is added without an example fails here.
"""

import ast
import inspect
import json
import os
import shutil
import textwrap
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sampler
from sampler.cli import main
from sampler.cli.commands import parser
from sampler.config.model import ModelConfig
from sampler.config.options import FINETUNE, GENERATE
from sampler.config.schema import Config, RunConfig
from sampler.models.lora import load_lora
from sampler.models.source import find_source
from sampler.runs.fingerprint import model_of
from sampler.runs.lines import COLUMNS
from sampler.runs.source import Source
from sampler.workers.in_memory import model_in_memory
from tests import tiny
from tests.guidance import stock_hosted
from tests.pipelines import test_lora_files as loras
from tests.pipelines.test_complete_models import NAMES, folders, model  # noqa: F401
from tests.runs import test_identity as identity
from tests.runs.test_identity import files  # noqa: F401


def commands(typer_app=None, prefix=""):
    """{name: function} of every command."""
    found, typer_app = {}, typer_app or parser()
    for entry in typer_app.registered_commands:
        found[f"{prefix}{entry.name}"] = inspect.unwrap(entry.callback)
    for group in typer_app.registered_groups:
        found |= commands(group.typer_instance, f"{group.name} ")
    return found


def nodes(function):
    """Nodes of a function's body."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    return [node for line in tree.body for node in ast.walk(line)]


def tables_read(function, seen=()):
    """Names of configuration tables that a command reads, itself or in functions that it calls."""
    found, known = set(), function.__globals__
    for node in nodes(function):
        target = None
        if isinstance(node, ast.Name):
            found.add(node.id)
            target = known.get(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            target = getattr(known.get(node.value.id), node.attr, None)
        local = inspect.isfunction(target) and target.__module__.startswith("sampler.cli.")
        if local and target not in seen:
            found |= tables_read(inspect.unwrap(target), (*seen, target))
    return found & {"GENERATE", "FINETUNE", "KEYS"}


@pytest.mark.parametrize("name", commands())
def test_every_option_is_read_by_its_command(name):
    """By name, or by `assigned` with the table of configuration keys that has its flag."""
    command = commands()[name]
    read = {node.id for node in nodes(command) if isinstance(node, ast.Name)}
    own = command.__globals__.get("KEYS", {})
    tables = {"GENERATE": GENERATE, "FINETUNE": FINETUNE, "KEYS": own}
    flags = {flag for table in tables_read(command) for flag in tables[table]}
    ignored = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        options = getattr(parameter.annotation, "__metadata__", ())
        declared = [(option.default, *(option.param_decls or ())) for option in options]
        names = [name for one in declared for name in one if isinstance(name, str)]
        given = {flag for name in names for flag in name.split("/")}
        given = given or {f"--{parameter.name.replace('_', '-')}"}
        callback = any(option.callback for option in options)
        if parameter.name not in read and not given & flags and not callback:
            ignored.append(parameter.name)
    assert ignored == []


def test_every_key_of_a_table_is_one_of_the_schema():
    keys = {*identity.schema(), "guidance.scale"}
    assert set(GENERATE.values()) | {f"model.{f.name}" for f in fields(ModelConfig)} <= keys


# Keys whose value of `test_identity.FIELDS` shows nothing alone: what they are given with.
TWO = {"prompts": {"texts": ["a fox", "a fox"]}}
GIVEN_WITH = {
    "version": ({}, 2),
    "run.dedupe": (TWO, False),
    "prompts.file": ({}, "{files}/prompts.txt"),
    "prompts.format": ({"prompts": {"file": "{files}/table.txt"}}, "csv"),
    "prompts.wildcards": ({"prompts": {"texts": ["__x__"], "expand": "all"}}, "{files}/words"),
    "prompts.expand": ({"prompts": {"texts": ["a {fox|dog}"]}}, "all"),
    "prompts.on_bad_row": ({"prompts": {"file": "{files}/bad.csv"}}, "skip"),
    "prompts.extra_columns": ({"prompts": {"file": "{files}/extra.csv"}}, "keep"),
    "output.format": ({}, "gif"),
    "limits.max_jobs": ({"run": {"n": 2}}, 1),
    "limits.max_pixels": ({}, 64),
    "limits.max_steps": ({}, 1),
    "limits.max_prompt_chars": ({}, 2),
    "model.path": ({}, "{files}/other"),
    "model.config": ({}, "{files}/model"),
    "model.revision": ({}, "main"),
    "model.variant": ({}, "fp16"),
    "model.controlnet": ({"inputs": {"control_image": "{files}/a.png"}}, ["{files}/canny"]),
    "model.ip_adapter": ({"inputs": {"ip_adapter_image": "{files}/a.png"}}, ["{files}/face"]),
}


@pytest.fixture(scope="module")
def given(files):  # noqa: F811
    (files / "table.txt").write_text("prompt,seed\na fox,3\n")
    (files / "bad.csv").write_text("prompt,steps\na fox,2\na dog,-1\n")
    (files / "extra.csv").write_text("prompt,mood\na fox,calm\n")
    (files / "words" / "x.txt").write_text("a fox\n")
    tiny.sd(seed=5).save_pretrained(files / "other")
    stock_hosted.picture().save(files / "a.png")
    stock_hosted.save_controlnet(files / "canny")
    (files / "face").mkdir()
    stock_hosted.save_ip_adapter(files / "face")
    return files


def outcome(tree, where, capsys):
    """Return the outcome of a configuration: exit code and sentence, or all that is recorded."""
    where.mkdir()
    (where / "c.json").write_text(json.dumps(tree))
    prompts = [] if "prompts" in tree else ["a fox"]
    capsys.readouterr()
    os.chdir(where)
    out = [] if "dir" in tree.get("output", {}) else ["-o", "run"]
    code = main(["generate", *prompts, "-c", "c.json", *out, "-q"])
    if code:
        return capsys.readouterr().err
    (folder,) = [path.parent for path in where.rglob("run.json")]
    recorded = {"folder": folder.name}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in (".lock", "journal.jsonl"):
            recorded[path.relative_to(folder).as_posix()] = path.read_bytes()
    return recorded


def named(tree, files):  # noqa: F811
    return json.loads(json.dumps(tree).replace("{files}", str(files)))


@pytest.mark.parametrize("name", identity.FIELDS)
def test_every_field_of_a_configuration(name, given, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    extra, value = GIVEN_WITH.get(name, ({}, identity.FIELDS[name][0]))
    if isinstance(value, str) and name.startswith("model.") and (given / value).exists():
        value = f"{{files}}/{value}" if name != "model.offload" else value
    elif isinstance(value, list) and (given / value[0]).exists():
        value = [f"{{files}}/{value[0]}"]
    value = {"model.student": str(given / "nowhere"), "model.compile": True}.get(name, value)
    base = {**identity.BASE, "model": {"path": "{files}/model"}, "errors": {"strict": False}}
    base = {k: {**base.get(k, {}), **extra.get(k, {})} for k in {**base, **extra}}
    section, _, key = name.partition(".")
    changed = {**base, section: {**base.get(section, {}), key: value} if key else value}
    if name == "model.compile":  # seconds of compilation; what it changes is its key
        models = [ModelConfig(path=str(given / "model"), compile=on) for on in (False, True)]
        assert model_of(models[0]).identity != model_of(models[1]).identity
        return
    before = outcome(named(base, given), tmp_path / "before", capsys)
    after = outcome(named(changed, given), tmp_path / "after", capsys)
    assert before != after
    if isinstance(after, str):
        assert "\n" not in after.strip() and (key or name) in after, after


VALUES = {
    "prompt": "a dog", "negative_prompt": "a cat", "seed": 7, "n": 2, "width": 32, "height": 32,
    "steps": 3, "scale": 2.0, "grid": "karras", "sampler": "ab", "guidance": "none", "tag": "x",
    "meta_mood": "calm",
    "sampler.eta": 0.5, "guidance.scale": 2.0, "guidance.rescale": 0.5,
}  # fmt: skip


def planned(row, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    config = Config(run=RunConfig(seed=1))
    source = Source(replace(config, prompts=replace(config.prompts, file=str(path))))
    run = source.plan(source.model())
    run.jobs.seek(0)
    return run.jobs.read(), run.plan.groups


def test_every_column_has_an_example():
    assert set(COLUMNS) <= set(VALUES)


@pytest.mark.parametrize("name", VALUES)
def test_every_column_of_a_prompt_file(name, tmp_path):
    row = {"prompt": "a fox"}
    assert planned({**row, name: VALUES[name]}, tmp_path) != planned(row, tmp_path)


@pytest.mark.parametrize("name", ["promt", "mood", "sampler.order", "guidance.momentum", "Steps"])
def test_unknown_columns_are_refused_by_name(name, tmp_path):
    with pytest.raises(sampler.SamplerError, match=name.rpartition(".")[2]):
        planned({"prompt": "a fox", name: 1}, tmp_path)


def kinds(tensors):
    """The last tensor of each kind: component, and what it is of its layer."""
    found = {}
    for key in tensors:
        part = "te" if "text" in key or "_te_" in key else "unet"
        kind = key.rpartition("lora")[2] if "lora" in key.rpartition(".")[2] else key.split(".", 1)
        suffix = kind if isinstance(kind, str) else ".".join(key.split(".")[-2:])
        found[part, suffix.replace("_", ".").split(".")[-2:][0]] = key
    return sorted(set(found.values()))


@pytest.mark.parametrize("form", loras.APPLIED)
def test_every_tensor_of_an_adapter(form, tmp_path):
    """Another value gives another model; without it, or with one more, the file is refused."""
    tensors = loras.APPLIED[form]

    def loaded(changed):
        path = tmp_path / "lora.safetensors"
        save_file({k: v.clone().contiguous() for k, v in changed.items()}, path)
        engine = sampler.load(tiny.sd())
        load_lora(engine, path)
        return model_in_memory(engine).fingerprint

    whole = loaded(tensors)
    for key in kinds(tensors):
        assert loaded({**tensors, key: 2 * tensors[key]}) != whole, key
        without = {k: v for k, v in tensors.items() if k != key}
        if key.endswith(".alpha"):
            assert loaded(without) != whole  # the default of the format
            continue
        with pytest.raises(sampler.SamplerError, match="without|does not fit|incomplete"):
            loaded(without)
    alpha = "lora_unet_nowhere.alpha"
    shapes = (("unet.nowhere.lora_A.weight", (2, 2)), ("emphasis", (2, 2)), (alpha, (2,)))
    for name, shape in (*shapes, (alpha, ())):
        with pytest.raises(sampler.SamplerError, match=name):
            loaded({**tensors, name: torch.ones(shape)})


def state(folder):
    """Identity of a folder and the files that are not read; or the sentence that refuses it."""
    try:
        found = model_of(ModelConfig(path=str(folder)))
    except sampler.SamplerError as error:
        return str(error)
    return found.fingerprint, tuple(find_source(folder).unused())


@pytest.mark.parametrize("name", NAMES)
def test_every_file_of_a_model_folder(name, model):  # noqa: F811
    folder = model(name)
    whole = state(folder)
    assert not isinstance(whole, str)
    for path in [p for p in sorted(folder.rglob("*")) if p.is_file()]:
        data = path.read_bytes()
        path.unlink()
        gone = state(folder)
        assert gone != whole, path
        if path.suffix == ".safetensors":
            path.write_bytes(data)
            tensors = load_file(path)
            path.unlink()
            key = max(tensors, key=lambda k: tensors[k].numel())
            save_file({**tensors, key: tensors[key] + 1}, path, {"format": "pt"})
        else:
            path.write_bytes(data + b"\n")
        assert state(folder)[0] != whole[0], path
        path.write_bytes(data)
        assert state(folder) == whole


MORE = (
    "README.md", "model.safetensors", "notes.json", "unet.ckpt", "pipeline.py", "{part}/x.bin",
    "{part}/diffusion_pytorch_model.fp16.safetensors", "{part}/model.fp16.safetensors",
    "{part}/model.onnx", "{part}/flax_model.msgpack", "{part}/modeling.py", "{part}/LICENSE",
    "{part}/extra.json", "{part}/notes.txt", "{part}/pytorch_model.bin", "more/config.json",
)  # fmt: skip


@pytest.mark.parametrize("more", MORE)
@pytest.mark.parametrize("name", ["Stable Diffusion XL", "Flux 2", "DiT"])
def test_every_further_file_is_read_or_listed(name, more, model):  # noqa: F811
    folder = model(name)
    whole = state(folder)
    for part in find_source(folder).parts if "{part}" in more else ("",):
        path = folder / more.format(part=part)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"{}")
        found = state(folder)
        listed = not isinstance(found, str) and path.relative_to(folder).as_posix() in found[1]
        assert listed or found[0] != whole[0], path
        if isinstance(found, str):
            assert path.name in found
        path.unlink()


def test_files_that_are_not_read_are_noted(model, tmp_path, capsys):  # noqa: F811
    folder = model("Stable Diffusion 1.x")
    (folder / "unet" / "diffusion_pytorch_model.ema.safetensors").write_bytes(b"x")
    line = ["generate", "a fox", "--model", str(folder), "--dry-run", "-v"]
    assert main([*line, "-o", str(tmp_path / "run")]) == 0
    assert "not read: unet/diffusion_pytorch_model.ema.safetensors" in capsys.readouterr().err


WITH_A_PIPELINE = {"source", "weak", "student", "prompt_weights"}  # have an effect on one


@pytest.mark.parametrize(
    "name", sorted(set(inspect.signature(sampler.load).parameters) - WITH_A_PIPELINE)
)
def test_arguments_of_load_without_effect_on_a_pipeline(name):
    switches = ("vae_tiling", "vae_slicing", "compile", "download")
    value = {"attention": "native", "offload": "model"}.get(name, "x")
    value = True if name in switches else value
    with pytest.raises(ValueError, match=f"{name} has no effect on a pipeline"):
        sampler.load(tiny.sd(), **{name: value})


def test_arguments_of_generate_without_effect_on_a_run_folder(tmp_path):
    engine = sampler.load(tiny.sd())
    image = torch.zeros(1, 3, 32, 32)
    for options in ({"image": image}, {"output": "tensor"}, {"graph": True}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}="):
            engine.generate("a fox", out=tmp_path / "run", **options)
    assert not Path(tmp_path / "run").exists() and shutil.disk_usage(tmp_path).total


def test_a_fine_tuning_does_not_ignore_a_field_of_the_model():
    from sampler.config.layers import Layer
    from sampler.training.recipe import resolve_recipe

    tree = {"model": {"drop_encoders": True}, "reward": "compressibility"}
    with pytest.raises(sampler.SamplerError, match="drop_encoders"):
        resolve_recipe([Layer(tree, {("model",): "c.yaml:1"})])
