"""Identity of images: the key changes exactly when something does that decides the pixels.

Over every field of the configuration's schema, over model folders in the forms that people have,
and over pipelines in memory. `EXACT` fields change key and pixels together; the others say why not.
"""

import copy
import json
import os
import shutil
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import sampler
from sampler.cli import main
from sampler.config.model import ModelConfig
from sampler.config.schema import Config
from sampler.runs import encodings, metadata
from sampler.runs.fingerprint import model_of
from sampler.workers.in_memory import model_in_memory
from tests import tiny

BASE = {"run": {"steps": 2, "seed": 1, "height": 64, "width": 64},
        "sampler": {"name": "ddim"}, "guidance": {"name": "cfg", "scale": 3.0}}  # fmt: skip
PROMPT = "a red fox"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files that people have beside a model: a LoRA, a VAE, weaker weights, prompt files."""
    from tests.training.test_lora import tuned

    root = tmp_path_factory.mktemp("identity")
    tiny.sd().save_pretrained(root / "model")
    for name in ("one", "two"):
        tuned(tiny.sd, root / name, seed=len(name) if name == "one" else 9)
    tiny.sd(seed=1).vae.save_pretrained(root / "vae")
    tiny.sd(seed=1).unet.save_pretrained(root / "weak")
    save_file(tiny.sd(seed=2).unet.state_dict(), root / "network.safetensors")
    (root / "prompts.txt").write_text("two green apples\n")
    (root / "words").mkdir()
    return root


def image(where, folder, tree, *options):
    """(key, pixels) of the first image of a run."""
    where = where / f"run{len(list(where.iterdir()))}"
    config = where.with_suffix(".json")
    config.write_text(json.dumps({"model": {"path": str(folder)}, **tree}))
    prompts = [] if "prompts" in tree else [PROMPT]
    assert main(["generate", *prompts, "-c", str(config), "-o", str(where), "-q", *options]) == 0
    (first, *_) = sorted((where / "images").iterdir())
    pixels, texts = encodings.decode(first.read_bytes())
    job = json.loads((where / "jobs.jsonl").read_text().splitlines()[0])
    if metadata.CHUNK in texts:
        assert metadata.read_record(first.read_bytes())["key"] == job["key"]
    return job["key"], pixels


@pytest.fixture(scope="module")
def base(files, tmp_path_factory):
    return image(tmp_path_factory.mktemp("base"), files / "model", BASE)


def schema():
    """Every key of the configuration: "run.steps", ...; sampler and guidance are one each."""
    hints = get_type_hints(Config)
    for name in hints:
        if name.startswith("_"):
            continue
        if is_dataclass(hints[name]):
            yield from (f"{name}.{f.name}" for f in fields(hints[name]))
        else:
            yield name


BOTH, NEITHER = "key and pixels", "neither"
FILE = "the pixels of the file, within the loss of its format"
# Changes of the key without a change of these pixels, with the reason.
ELSEWHERE = "the key: other numbers on another machine or at another size"
# {key of the configuration: (value of `BASE` changed to, what changes)}
FIELDS = {
    "version": (1, NEITHER),
    "model.path": ("copy", NEITHER),
    "model.config": ("model", BOTH),  # with the single file network.safetensors
    "model.revision": ("other", BOTH),  # of a model in the cache of the Hub
    "model.variant": ("fp16", BOTH),
    "model.vae": ("vae", BOTH),
    "model.lora": (["one"], BOTH),
    "model.lora_until": (0.5, BOTH),  # with a LoRA: below
    "model.controlnet": (["canny"], BOTH),  # both of them: tests/runs/test_adapters.py
    "model.ip_adapter": (["face"], BOTH),
    "model.student": ("bundled", BOTH),
    "model.weak": ("weak", BOTH),
    "model.dtype": ("bfloat16", BOTH),
    "model.device": ("cpu", NEITHER),
    "model.attention": ("native", ELSEWHERE),
    "model.offload": ("model", NEITHER),
    "model.vae_tiling": (True, BOTH),
    "model.vae_slicing": (True, NEITHER),
    "model.prompt_weights": (True, ELSEWHERE),  # of a prompt with weights
    "model.compile": (True, ELSEWHERE),
    "model.grid": ("karras", BOTH),
    "model.drop_encoders": (True, NEITHER),
    "inputs": ({"inputs_of_none": 1}, BOTH),  # of hosted pipelines: tests/pipelines
    "sampler": ({"name": "ab"}, BOTH),
    "guidance": ({"name": "cfg", "scale": 4.0}, BOTH),
    "run.steps": (3, BOTH),
    "run.width": (48, BOTH),
    "run.height": (48, BOTH),
    "run.n": (2, NEITHER),
    "run.seed": (2, BOTH),
    "run.batch_size": (1, NEITHER),
    "run.negative_prompt": ("a dog", BOTH),
    "run.dedupe": (False, NEITHER),
    "prompts.file": ("prompts.txt", BOTH),
    "prompts.texts": (["two green apples"], BOTH),
    "prompts.format": ("txt", NEITHER),
    "prompts.wildcards": ("words", NEITHER),
    "prompts.expand": ("random", NEITHER),
    "prompts.on_bad_row": ("skip", NEITHER),
    "prompts.extra_columns": ("keep", NEITHER),
    "output.dir": ("elsewhere", NEITHER),
    "output.format": ("jpeg", FILE),
    "output.quality": (50, FILE),
    "output.video": ("mp4", NEITHER),
    "output.fps": (8, NEITHER),
    "output.metadata": ("none", NEITHER),
    "output.name_template": ("{seed}-{index}", NEITHER),
    "output.flagged": ("blur", NEITHER),  # of an image that no safety checker flags
    "output.fsync": (False, NEITHER),
    "output.writer_threads": (1, NEITHER),
    "limits.max_jobs": (9, NEITHER),
    "limits.max_pixels": (8192, NEITHER),
    "limits.max_steps": (9, NEITHER),
    "limits.max_prompt_chars": (99, NEITHER),
    "errors.strict": (True, NEITHER),
    "errors.max_errors": (1, NEITHER),
    "errors.on_oom": ("fail", NEITHER),
    "errors.on_nonfinite": ("fail", NEITHER),
}


def test_every_key_of_the_schema_is_listed():
    assert sorted(FIELDS) == sorted(schema())


def test_the_table_of_model_options_says_the_same():
    for entry in fields(ModelConfig):
        if not entry.metadata["load"]:
            continue  # a setting of runs, not of the model
        _, what = FIELDS[f"model.{entry.name}"]
        assert (entry.metadata["identity"] == "none") <= (what == NEITHER), entry.name
        assert (entry.metadata["identity"] == "value") <= (what != NEITHER), entry.name


CHANGED = [k for k in FIELDS if k not in ("model.student", "model.revision", "model.compile",
                                          "model.config", "model.weak", "model.controlnet",
                                          "model.lora_until",
                                          "model.ip_adapter", "output.video",
                                          "inputs")]  # fmt: skip


def test_a_key_has_the_share_of_steps_with_a_lora(files, tmp_path):
    found = []
    for given in ({}, {"lora_until": 0.5}):
        model = {"path": str(files / "model"), "lora": [str(files / "one")], **given}
        found.append(image(tmp_path, files / "model", {**BASE, "model": model}))
    assert found[0][0] != found[1][0] and not np.array_equal(found[0][1], found[1][1])


@pytest.mark.parametrize("name", CHANGED)
def test_a_key_changes_with_the_pixels(name, files, base, tmp_path):
    value, what = FIELDS[name]
    section, _, key = name.partition(".")
    tree, folder = copy.deepcopy(BASE), files / "model"
    if name == "model.path":
        value = str(shutil.copytree(folder, tmp_path / "another name"))
    if name == "model.variant":
        folder = Path(shutil.copytree(folder, tmp_path / "model"))
        tiny.sd(seed=3).save_pretrained(folder, variant=value)
    if isinstance(value, str) and name != "model.offload" and (files / value).exists():
        value = str(files / value)
    elif isinstance(value, list) and (files / value[0]).exists():
        value = [str(files / value[0])]
    if not key:
        tree[section] = value
    elif section == "model":
        tree["model"] = {"path": str(folder), key: value}
    else:
        tree[section] = {**tree.get(section, {}), key: value}
    if name == "output.quality":
        tree["output"]["format"] = "webp"
    if section == "prompts" and key not in ("file", "texts"):
        tree["prompts"].setdefault("texts", [PROMPT])
    (tmp_path / "runs").mkdir()
    options = ["--batch-size", "1"] if name == "run.n" else []
    found, pixels = image(tmp_path / "runs", folder, tree, *options)
    different = pixels.shape != base[1].shape or not np.array_equal(pixels, base[1])
    assert {"key": found != base[0], "pixels": different} == {
        "key": what not in (NEITHER, FILE),
        "pixels": what in (BOTH, FILE),
    }


# Changes to the files of a folder {what: (change, whether key and pixels change)}.
def weights(part, name="diffusion_pytorch_model", scale=1.5):
    def change(folder):
        path = folder / part / f"{name}.safetensors"
        tensors = load_file(path)
        path.unlink()
        save_file({k: scale * v for k, v in tensors.items()}, path, {"format": "pt"})

    return change


def setting(file, **values):
    def change(folder):
        path = folder / file
        tree = json.loads(path.read_text())
        path.unlink()
        path.write_text(json.dumps({**tree, **values}))

    return change


def words(folder):
    """Two tokens change places."""
    path = folder / "tokenizer" / "tokenizer.json"
    tree = json.loads(path.read_text())
    vocab = tree["model"]["vocab"]
    vocab["a"], vocab["d"] = vocab["d"], vocab["a"]
    vocab["a</w>"], vocab["d</w>"] = vocab["d</w>"], vocab["a</w>"]
    path.unlink()
    path.write_text(json.dumps(tree))


def beside(name, content="x"):
    def change(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)

    return change


def other_variant(folder):
    tiny.sd(seed=3).unet.save_pretrained(folder / "unet", variant="fp16")


def again(folder):
    for path in folder.rglob("*.json"):
        os.utime(path, (1, 1))


FOLDERS = {
    "weights of the network": (weights("unet"), True),
    "weights of the VAE": (weights("vae"), True),
    "weights of the text encoder": (weights("text_encoder", "model"), True),
    "configuration of the network": (setting("unet/config.json", norm_eps=0.1), True),
    "configuration of the VAE": (setting("vae/config.json", scaling_factor=0.5), True),
    "configuration of the text encoder": (
        setting("text_encoder/config.json", hidden_act="relu"),
        True,
    ),
    "betas": (setting("scheduler/scheduler_config.json", beta_end=0.02), True),
    "prediction type": (
        setting("scheduler/scheduler_config.json", prediction_type="v_prediction"),
        True,
    ),
    "timestep spacing": (
        setting("scheduler/scheduler_config.json", timestep_spacing="trailing"),
        True,
    ),
    "vocabulary": (words, True),
    "length of texts": (setting("tokenizer/tokenizer_config.json", model_max_length=6), True),
    "times of files": (again, False),
    "notes": (beside("README.md"), False),
    "notes as json": (beside("notes.json", "{}"), False),
    "a picture's text": (beside("assets/prompt.txt"), False),
    "pickles beside": (beside("unet/diffusion_pytorch_model.bin"), False),
    "generation settings": (beside("text_encoder/generation_config.json", "{}"), False),
    "another variant beside": (other_variant, False),
    "a component that the index does not name": (beside("safety_checker/config.json"), False),
}


@pytest.mark.parametrize("what", FOLDERS)
def test_files_of_a_folder(what, files, base, tmp_path):
    change, changes = FOLDERS[what]
    folder = Path(shutil.copytree(files / "model", tmp_path / "model"))
    before = model_of(ModelConfig(path=str(folder)), fast=True).identity
    change(folder)
    (tmp_path / "runs").mkdir()
    key, pixels = image(tmp_path / "runs", folder, BASE)
    assert (key != base[0], not np.array_equal(pixels, base[1])) == (changes, changes)
    assert (model_of(ModelConfig(path=str(folder)), fast=True).identity != before) == changes


def identity(**options):
    given = {k: str(v) if isinstance(v, Path) else v for k, v in options.items()}
    return model_of(ModelConfig(**given)).identity


def test_a_single_file_and_the_folder_of_its_configurations(files, tmp_path):
    folder = Path(shutil.copytree(files / "model", tmp_path / "model"))
    file = Path(shutil.copy(files / "network.safetensors", tmp_path / "network.safetensors"))
    moved = Path(shutil.copy(file, tmp_path / "renamed.safetensors"))
    first = identity(path=file, config=folder)
    assert first == identity(path=moved, config=files / "model")
    weights("unet")(folder)  # not read
    assert first == identity(path=file, config=folder)
    for change in (weights("vae"), setting("unet/config.json", norm_eps=0.1), words):
        before = identity(path=file, config=folder)
        change(folder)
        assert identity(path=file, config=folder) != before
    tensors = load_file(file)
    save_file({k: v + 1 for k, v in tensors.items()}, file)
    assert identity(path=file, config=files / "model") != first
    save_file({**tensors, "first_stage_model.x": torch.zeros(1)}, file)  # all weights in the file
    whole = identity(path=file, config=folder)
    weights("vae")(folder)
    weights("text_encoder", "model")(folder)
    assert identity(path=file, config=folder) == whole


def test_shards(files, tmp_path):
    folder = Path(shutil.copytree(files / "model", tmp_path / "model"))
    shutil.rmtree(folder / "unet")
    tiny.sd().unet.save_pretrained(folder / "unet", max_shard_size="100KB")
    before = identity(path=folder)
    last = sorted((folder / "unet").glob("*-of-*.safetensors"))[-1]
    tensors = load_file(last)
    save_file({k: v + 1 for k, v in tensors.items()}, last, {"format": "pt"})
    assert identity(path=folder) != before


def test_loras_vaes_students_and_weak_networks(files, tmp_path):
    model, one, two = files / "model", files / "one", files / "two"
    plain = identity(path=model)
    given = [
        (f"{one}",), (f"{one}:0.5",), (f"{two}",), (f"{one}", f"{two}"), (f"{two}", f"{one}"),
        (f"{one}", f"{one}"),
    ]  # fmt: skip
    found = [identity(path=model, lora=loras) for loras in given]
    assert all(found.count(x) == 1 and x != plain for x in found)
    moved = shutil.copytree(one, tmp_path / "moved")
    assert identity(path=model, lora=(f"{moved}:1",)) == found[0]
    assert identity(path=model, lora=(str(one / "pytorch_lora_weights.safetensors"),)) == found[0]

    folder = Path(shutil.copytree(model, tmp_path / "model"))
    vae = Path(shutil.copytree(files / "vae", tmp_path / "vae"))
    first = identity(path=folder, vae=vae)
    weights("vae")(folder)  # not read
    assert identity(path=folder, vae=vae) == first != plain
    setting("config.json", scaling_factor=0.5)(vae)
    assert identity(path=folder, vae=vae) != first

    weak = Path(shutil.copytree(files / "weak", tmp_path / "weak"))
    first = identity(path=model, weak=weak)
    weights("")(weak)
    assert plain != first != identity(path=model, weak=weak)

    from sampler.models.student_files import BUNDLED

    student = Path(shutil.copytree(BUNDLED, tmp_path / "student"))
    first = identity(student=student)
    assert identity() != first == identity(student=BUNDLED)
    setting("manifest.json", timesteps=[999, 500])(student)
    assert identity(student=student) != first


def test_revisions_of_a_hub_model(files, tmp_path, monkeypatch):
    """Two commits in the local cache, one behind the branch main."""
    from huggingface_hub import constants

    root = tmp_path / "hub" / "models--someone--fox"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    old, new = "a" * 40, "b" * 40
    for commit in (old, new):
        shutil.copytree(files / "model", root / "snapshots" / commit)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(new)
    same = identity(path="someone/fox", revision=old)
    assert same == identity(path="someone/fox") == identity(path="someone/fox", revision=new)
    weights("unet")(root / "snapshots" / new)
    assert identity(path="someone/fox") != identity(path="someone/fox", revision=old) == same


def lora(weight):
    def change(pipe, files):
        from sampler.models.lora import apply_loras

        apply_loras(pipe, [(files / "one", weight)])

    return change


def attribute(part, **values):
    def change(pipe, files):
        target = getattr(pipe, part)
        target.register_to_config(**values)

    return change


def tokens(pipe, files):
    pipe.tokenizer.model_max_length = 6


def tiling(pipe, files):
    pipe.vae.enable_tiling()


def used(pipe, files):
    """Calls leave padding and truncation in tokenizers, and slices in VAEs."""
    pipe.vae.enable_slicing()
    pipe(PROMPT, num_inference_steps=1, output_type="latent")


def offloaded(pipe, files):
    from accelerate import cpu_offload

    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        cpu_offload(part, execution_device=torch.device("cpu"))


def parameter(pipe, files):
    pipe.unet.conv_in.bias.data += 1


IN_MEMORY = {
    "a parameter": (parameter, True),
    "a LoRA": (lora(1.0), True),
    "the same LoRA, weaker": (lora(0.5), True),
    "configuration of the VAE": (attribute("vae", scaling_factor=0.5), True),
    "configuration of the scheduler": (attribute("scheduler", beta_end=0.02), True),
    "length of texts": (tokens, True),
    "VAE tiling": (tiling, True),
    "having been used": (used, False),
    "offloading": (offloaded, False),
    "nothing": (lambda pipe, files: None, False),
}


@pytest.fixture(scope="module")
def in_memory(files):
    pipes = {name: tiny.sd() for name in IN_MEMORY}
    for name, (change, _) in IN_MEMORY.items():
        change(pipes[name], files)
    return {name: model_in_memory(sampler.load(pipe)).identity for name, pipe in pipes.items()}


@pytest.mark.parametrize("name", IN_MEMORY)
def test_pipelines_in_memory(name, in_memory):
    same = [other for other in IN_MEMORY if in_memory[other] == in_memory[name]]
    expected = [name] if IN_MEMORY[name][1] else [n for n in IN_MEMORY if not IN_MEMORY[n][1]]
    assert same == expected


def test_further_networks_in_memory(files):
    plain = model_in_memory(sampler.load(tiny.sd())).identity
    weak = model_in_memory(sampler.load(tiny.sd(), weak=tiny.sd(seed=1).unet)).identity
    other = model_in_memory(sampler.load(tiny.sd(), weak=tiny.sd(seed=2).unet)).identity
    student = model_in_memory(sampler.load("bundled-student", device="cpu")).identity
    bundled = model_in_memory(sampler.load(device="cpu")).identity
    weighted = sampler.load(tiny.sd())
    weighted.pipeline.prompt_weights = object()  # that the library compel is there or not
    found = [plain, weak, other, student, bundled, model_in_memory(weighted).identity]
    assert all(found.count(one) == 1 for one in found)
