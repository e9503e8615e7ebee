"""One table of model options: `sampler.load`, configurations, the command line, the playground."""

import copy
import inspect
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny

import sampler
from sampler.cli import main
from sampler.config.model import ModelConfig, changed, flag_of, load_arguments
from sampler.config.schema import Config, PromptsConfig
from sampler.ui import export
from tests import tiny

FIELDS = [f.name for f in fields(ModelConfig)]
OTHER = {  # a value of every field that is not its default
    "path": "m", "config": "c", "revision": "r", "variant": "fp16", "vae": "v",
    "lora": ("a", "b:2"), "lora_until": 0.4, "controlnet": ("a", "b"), "ip_adapter": ("a", "b:2"),
    "student": "s", "weak": "w", "dtype": "float16", "device": "cpu",
    "attention": "native", "offload": "model", "vae_tiling": True, "vae_slicing": True,
    "prompt_weights": True, "compile": True, "grid": "karras", "drop_encoders": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "sd"
    tiny.sd().save_pretrained(folder)
    return folder


def test_load_has_the_options_of_the_table():
    arguments = set(inspect.signature(sampler.load).parameters) - {"source", "download"}
    assert arguments == {f.name for f in fields(ModelConfig) if f.metadata["load"]} - {"path"}
    assert set(OTHER) == set(FIELDS)
    assert load_arguments(ModelConfig()) == {}
    given = load_arguments(ModelConfig(**OTHER))
    assert set(given) == arguments and given["lora"] == ["a", "b:2"] and given["compile"] is True


@pytest.mark.parametrize("name", FIELDS)
def test_every_option_reaches_the_configuration_from_the_command_line(name, monkeypatch):
    from sampler.runs.source import Source

    seen = []
    monkeypatch.setattr(Source, "model", lambda self: seen.append(self.config.model) or 1 / 0)
    monkeypatch.setattr("sampler.models.student_files.student_run", lambda folder: {})
    value = OTHER[name]
    words = [flag_of(name)] if value is True else []
    for one in value if isinstance(value, tuple) else () if value is True else (value,):
        words += [flag_of(name), str(one)]
    assert main(["generate", "a fox", *words, "--dry-run", "-q"]) == 1
    assert changed(seen[0]) == {name: value}


@pytest.mark.parametrize("name", FIELDS)
def test_the_playground_exports_every_option(name):
    model = replace(ModelConfig(), **{name: OTHER[name]})
    spec = {"name": "ddim"}
    config = Config(model=model, sampler=spec, guidance={"name": "cfg"},
                    prompts=PromptsConfig(texts=("a fox",)))  # fmt: skip
    assert flag_of(name) in export.shell(config)
    assert f"{name}: " in export.yaml(config)
    loaded = export.python(config, [1], 1)
    assert name == "drop_encoders" or (repr("m") if name == "path" else f"{name}=") in loaded


def test_the_page_lists_every_option():
    page = (Path(__file__).parents[2] / "docs" / "command_line.md").read_text()
    table = page.partition("## The model")[2].partition("\n## ")[0]
    assert [name for name in FIELDS if f"`{flag_of(name)}" not in table] == []


def test_another_vae_decodes_the_images(model, tmp_path):
    from diffusers import AutoencoderKL

    pipe = tiny.sd()
    pipe.vae = tiny.sd(seed=1).vae
    pipe.vae.save_pretrained(tmp_path / "vae")
    small = tiny.sd(tiny_vae=True)
    small.save_pretrained(tmp_path / "small")
    options = {"seeds": 3, "steps": 2, "output": "tensor"}
    wanted = sampler.load(copy.deepcopy(pipe)).generate("a red fox", **options).images
    engine = sampler.load(model, vae=tmp_path / "vae", device="cpu")
    assert isinstance(engine.pipeline.pipe.vae, AutoencoderKL)
    assert torch.equal(engine.generate("a red fox", **options).images, wanted)
    engine = sampler.load(model, vae=tmp_path / "small", device="cpu")  # the VAE in a pipeline
    assert isinstance(engine.pipeline.pipe.vae, AutoencoderTiny)


def test_a_vae_in_its_original_layout_is_read_by_diffusers(model, tmp_path, monkeypatch):
    from diffusers import AutoencoderKL
    from safetensors.torch import save_file

    asked = []
    path = tmp_path / "vae.safetensors"
    save_file({"decoder.conv_in.weight": torch.zeros(1)}, path)

    def read(file, **options):
        asked.append((file, options))
        return tiny.sd(seed=1).vae

    monkeypatch.setattr(AutoencoderKL, "from_single_file", read)
    sampler.load(model, vae=path, device="cpu")
    options = {"local_files_only": True, "torch_dtype": torch.float32}
    assert asked == [(str(path), {"config": str(model), "subfolder": "vae", **options})]


@pytest.mark.parametrize(
    ("source", "options", "error", "words"),
    [
        ("model", {"vae": "nowhere"}, 6, "nowhere does not exist"),
        ("model", {"vae": "x.ckpt"}, 6, "pickle"),
        ("model", {"vae": "wide"}, 6, "latents have 8 channels, the model's 4"),
        ("ddpm", {"vae": "vae"}, 6, "DDPMPipeline has no VAE"),
        ("model", {"revision": "main"}, None, "revision applies to models of the Hub"),
        (None, {"revision": "main"}, None, "revision applies to models"),
        (None, {"variant": "fp16"}, 6, "no weights of the variant 'fp16'"),
        (None, {"config": "model"}, None, "config applies to a single file"),
        ("bundled-lcm", {"weak": "model/unet"}, None, "weak has no effect on bundled-lcm"),
        ("pipe", {"vae": "vae"}, None, "vae has no effect on a pipeline that is loaded"),
        ("pipe", {"download": True}, None, "download has no effect"),
        ("", {}, 6, "The name of the model is empty"),
        ("nowhere", {}, 6, "nowhere does not exist."),
        ("nowhere.safetensors", {}, 6, "nowhere.safetensors does not exist."),
        ("net.safetensors", {}, 6, "holds weights only: give config (--model-config)"),
        ("nowhere.ckpt", {}, 6, "nowhere.ckpt does not exist."),
        ("x.ckpt", {}, 6, "is a pickle, which can run code"),
        ("notes.txt", {}, 6, "it is a file; a model is a folder"),
        ("empty", {}, 6, "not a diffusers pipeline: it has no model_index.json"),
    ],
)
def test_options_that_do_not_fit_are_refused_by_name(
    source, options, error, words, model, tmp_path, monkeypatch
):
    from safetensors.torch import save_file

    from tests import tiny_transformers

    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(model)
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.ckpt").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("x")
    save_file({"x": torch.zeros(1)}, tmp_path / "net.safetensors")
    tiny.vae(4).save_pretrained(tmp_path / "vae")
    tiny.vae(8).save_pretrained(tmp_path / "wide")
    if source == "ddpm":
        tiny_transformers.ddpm().save_pretrained(tmp_path / "ddpm")
    source = tiny.sd() if source == "pipe" else source
    with pytest.raises(ValueError if error is None else sampler.SamplerError) as caught:
        sampler.load(source, **options)
    text = str(caught.value)
    assert words in text and "\n" not in text and text.endswith(".")
    assert getattr(caught.value, "code", None) == error


def test_the_dtype_on_a_gpu_is_that_of_the_files_that_are_read(tmp_path):
    """A folder of both variants: the plain files, although the others sort first."""
    from sampler.models.source import find_source

    tiny.sd().save_pretrained(tmp_path)
    tiny.sd().to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    assert find_source(tmp_path).network_file.name == "diffusion_pytorch_model.safetensors"
    found = find_source(tmp_path, variant="fp16").network_file.name
    assert found == "diffusion_pytorch_model.fp16.safetensors"
