"""`sampler.load`: sources, what is refused before any library opens it, and that no code runs."""

import json
import logging
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sampler
from sampler.models import preflight
from sampler.models.read import quiet
from tests import tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny.sd().save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture
def model(saved, tmp_path):
    """A copy of a good folder, to be spoilt."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """An importable module, as text, that leaves a mark when it is run; and the mark's path."""
    mark = tmp_path / "was_run"
    code = f"open({str(mark)!r}, 'w').close()\nclass Evil:\n    from_pretrained = print\n"
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "evil_module.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path / "path"))
    yield code, mark
    sys.modules.pop("evil_module", None)


def refuses(source, *words, **options):
    with pytest.raises(sampler.SamplerError) as caught:
        sampler.load(source, **options)
    text = str(caught.value)
    assert caught.value.code == 6
    assert "\n" not in text and text.endswith(".")
    for word in words:
        assert word in text
    return text


def edit(path, **changes):
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps(config))


def test_the_bundled_model_is_the_default():
    engine = sampler.load()
    assert engine.sampler.name == "ddim"
    assert (engine.guidance.name, engine.guidance.scale) == ("cfg", 3.0)
    assert sampler.load("bundled").pipeline.size(None, None) == (64, 64)
    for part in ("unet", "vae", "text_encoder"):
        assert (
            getattr(engine.pipeline.pipe, part).dtype == torch.float32 or torch.cuda.is_available()
        )


def test_a_folder_gives_the_pipeline_that_was_saved(saved):
    pipe = tiny.sd()
    options = {"seeds": 3, "steps": 3, "output": "latent"}
    wanted = sampler.load(pipe).generate("a red fox", **options)
    for source in (saved, str(saved)):
        engine = sampler.load(source, device="cpu")
        assert torch.equal(engine.generate("a red fox", **options).latents, wanted.latents)
    assert engine.guidance.scale == 7.5  # StableDiffusionPipeline's own


def test_dtype_and_device(saved):
    assert sampler.load(saved, dtype="bfloat16", device="cpu").pipeline.dtype == torch.bfloat16
    assert sampler.load(saved, dtype=torch.float16, device="cpu").pipeline.dtype == torch.float16
    with pytest.raises(ValueError, match="must be one of float32"):
        sampler.load(saved, dtype="int8")
    with pytest.raises(ValueError, match="not a torch device"):
        sampler.load(saved, device="gpu")
    with pytest.raises(ValueError, match="no effect on a pipeline that is loaded"):
        sampler.load(tiny.sd(), dtype="float32")


def test_bfloat16_pipelines_run_with_float32_latents(saved):
    engine = sampler.load(saved, dtype="bfloat16", device="cpu")
    made = engine.generate("a red fox", seeds=0, steps=2, output="tensor")
    assert made.latents.dtype == torch.float32 and made.images.dtype == torch.float32
    full = sampler.load(saved, device="cpu").generate("a red fox", seeds=0, steps=2)
    gap = (made.latents - full.latents).abs().max() / full.latents.abs().max()
    assert 0 < gap < 0.1


@pytest.mark.gpu
def test_on_a_gpu_the_stored_dtype_is_kept(saved, tmp_path):
    assert sampler.load(saved).pipeline.dtype == torch.float32
    tiny.sd().to(torch.float16).save_pretrained(tmp_path / "half")
    engine = sampler.load(tmp_path / "half")
    assert engine.pipeline.dtype == torch.float16 and engine.pipeline.device.type == "cuda"


def test_a_weak_network_from_a_folder_or_a_module(saved, tmp_path):
    other = tiny.sd(seed=1).unet
    other.save_pretrained(tmp_path / "weak")
    engine = sampler.load(saved, weak=tmp_path / "weak", device="cpu")
    assert engine.pipeline.models == ("main", "weak")
    weak = engine.pipeline.networks["weak"].state_dict()
    assert all(torch.equal(weak[k], v) for k, v in other.state_dict().items())
    assert sampler.load(tiny.sd(), weak=other).pipeline.networks["weak"] is other
    refuses(saved, "does not exist", weak=tmp_path / "nowhere")
    assert sampler.load(saved, device="cpu").pipeline.models == ("main",)


def test_what_is_not_there(tmp_path):
    refuses(tmp_path / "nothing", "does not exist")
    refuses(str(tmp_path / "nothing"), "does not exist")
    refuses("./nothing/here", "does not exist")
    refuses(tmp_path, "not a diffusers pipeline", "model_index.json")
    (tmp_path / "file").write_text("x")
    refuses(tmp_path / "file", "not a diffusers pipeline")


def test_a_hub_name_is_not_fetched_unless_asked(monkeypatch, saved):
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    asked = []
    monkeypatch.setattr(
        DiffusionPipeline, "download", lambda name, **o: asked.append((name, o)) or str(saved)
    )
    refuses("someone/some-model", "download=True")
    assert asked == []
    engine = sampler.load("someone/some-model", download=True, revision="abc", device="cpu")
    assert engine.pipeline.models == ("main",)
    name, options = asked[0]
    assert name == "someone/some-model"
    assert options == {"revision": "abc", "variant": None, "use_safetensors": True}


def test_a_download_that_fails_is_one_sentence(monkeypatch):
    refuses("someone/some-model", "cannot be downloaded", download=True)


def test_classes_of_other_libraries_are_not_imported(model, trap):
    for library in ("evil_module", "os", "diffusers.utils", "../evil", None, 3):
        edit(model / "model_index.json", unet=[library, "Evil"])
        refuses(model, "'unet'", "not from diffusers")
    assert not trap[1].exists() and "evil_module" not in sys.modules


@pytest.mark.parametrize("name", [["pipeline", "Evil"], "../x", "os.system", None, 5, ""])
def test_custom_pipeline_classes_are_refused(model, trap, name):
    edit(model / "model_index.json", _class_name=name)
    refuses(model, "pipeline class")


def test_custom_pipeline_code_is_refused_and_not_run(model, trap):
    (model / "pipeline.py").write_text(trap[0])
    refuses(model, "its own code (pipeline.py)")
    (model / "pipeline.py").rename(model / "unet" / "modeling_evil.py")
    refuses(model, "its own code (modeling_evil.py)")
    assert not trap[1].exists()


@pytest.mark.parametrize("part", ["unet", "text_encoder", "tokenizer", "scheduler"])
def test_code_named_in_a_component_config_is_refused(model, trap, part):
    path = {
        "tokenizer": "tokenizer_config.json",
        "scheduler": "scheduler_config.json",
    }.get(part, "config.json")
    before = (model / part / path).read_text()
    for changes, word in (
        ({"auto_map": {"AutoModel": "evil_module.Evil"}}, "auto_map"),
        ({"nested": [{"trust_remote_code": True}]}, "trust_remote_code"),
        ({"custom_pipeline": "someone/evil"}, "custom_pipeline"),
        ({"_attn_implementation": "someone/evil"}, "_attn_implementation"),
        ({"_attn_implementation_internal": "someone/evil@main:x"}, "_attn_implementation"),
        ({"text_config": {"attn_implementation": {"": "a/b"}}}, "attn_implementation"),
        ({"_experts_implementation": "a/b"}, "_experts_implementation"),
    ):
        edit(model / part / path, **changes)
        refuses(model, word)
        (model / part / path).write_text(before)
    edit(model / part / path, _attn_implementation="sdpa", auto_map=None)
    assert preflight.check(model)[0] == "StableDiffusionPipeline"


class Payload:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


def test_pickle_weights_are_refused_and_not_opened(model, trap):
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    for suffix in ("bin", "ckpt", "pt", "pth", "pkl"):
        bad = model / "unet" / f"diffusion_pytorch_model.{suffix}"
        bad.write_bytes(pickle.dumps({"weight": Payload(trap[1])}))
        refuses(model, "pickle", "convert them to safetensors")
        bad.unlink()
    refuses(model, "no safetensors weights")
    assert not trap[1].exists()


def test_pickles_beside_safetensors_are_left_alone(model, trap):
    bad = model / "unet" / "diffusion_pytorch_model.bin"
    bad.write_bytes(pickle.dumps({"weight": Payload(trap[1])}))
    sampler.load(model, device="cpu")
    assert not trap[1].exists()


def test_broken_weights(model):
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    good = weights.read_bytes()
    for bad in (b"", b"\xff" * 64, good[:-10], good[:100], b"\x00" * 8 + good[8:]):
        weights.write_bytes(bad)
        refuses(model, "not an intact safetensors file")
    weights.write_bytes(good)
    shutil.copy(model / "vae" / weights.name, weights)  # intact, but another network's
    refuses(model, "its UNet2DConditionModel lacks the weights")


def test_a_shard_index_must_name_files_beside_it(model):
    path = model / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    for name in ("../vae/diffusion_pytorch_model.safetensors", "none.safetensors", "x.bin", 3):
        path.write_text(json.dumps({"metadata": {}, "weight_map": {"conv_in.bias": name}}))
        refuses(model, "not there")


def test_incomplete_and_malformed_folders(model):
    index = model / "model_index.json"
    good = index.read_text()
    for text in ("", "{", "[]", '"x"', "[" * 100_000):
        index.write_text(text)
        refuses(model, "model_index.json")
    index.write_text(good[:-2] + ', "x": "' + "y" * preflight.MAX_INDEX + '"}')
    refuses(model, "larger than")
    index.write_bytes(b"\xff\xfe{}")
    refuses(model, "cannot be read as JSON")
    for name, value in (("../vae", ["diffusers", "AutoencoderKL"]), ("unet", ["diffusers"])):
        index.write_text(good)
        edit(index, **{name: value})
        refuses(model, "not [library, class]")
    index.write_text(good)
    edit(index, unet=["diffusers", "eval('1')"])
    refuses(model, "the class of its component 'unet'")
    index.write_text(good)
    (model / "vae" / "config.json").write_text("not json")
    refuses(model, "config.json", "cannot be read as JSON")
    shutil.rmtree(model / "vae")
    refuses(model, "incomplete", "vae")


@pytest.mark.parametrize("library", ["os", "pipeline_utils", "deprecated/../pia", "Stable_Audio"])
def test_parts_come_from_the_libraries_or_a_pipeline_of_diffusers(model, library):
    edit(model / "model_index.json", unet=["audioldm2", "AudioLDM2UNet2DConditionModel"])
    assert preflight.check(model)[1]["unet"] == ("diffusers", "AudioLDM2UNet2DConditionModel")
    edit(model / "model_index.json", unet=[library, "UNet2DConditionModel"])
    refuses(model, "its component 'unet' comes from")


def test_a_pipeline_of_another_family_is_refused_before_it_is_opened(model, monkeypatch):
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", None)
    edit(model / "model_index.json", _class_name="FluxFillerPipeline")
    refuses(model, "FluxFillerPipeline is not a pipeline class of the installed diffusers")


def test_preflight_imports_no_torch(saved):
    code = (
        "import sys, pathlib; from sampler.models import preflight;"
        f"preflight.check(pathlib.Path({str(saved)!r}));"
        "sys.exit(bool({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_pipeline_saved_without_a_component_loads_without_it(tmp_path):
    pipe = tiny.sd3()
    pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    pipe.save_pretrained(tmp_path)
    loaded = sampler.load(tmp_path).pipeline.pipe
    assert loaded.text_encoder_3 is None and loaded.text_encoder_2 is not None


def test_loading_says_nothing_and_modules_hide_no_public_name():
    code = (
        "import importlib, pkgutil, sampler, types; sampler.load(device='cpu');"
        "found = [m.name for m in pkgutil.iter_modules(sampler.__path__)];"
        "[importlib.import_module('sampler.' + n) for n in found if n not in ('finetune', 'ui')];"
        "bad = [n for n in sampler.__all__ if isinstance(getattr(sampler, n), types.ModuleType)];"
        "assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_silence_is_narrow():
    from diffusers.utils import logging as bars

    logger = logging.getLogger("diffusers.pipelines.pipeline_utils")
    seen = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    logger.addHandler(handler)
    try:
        with quiet():
            logger.warning("Expected types for vae: AutoencoderKL, got AutoencoderTiny.")
            logger.warning("Expected types for unet: A, got B.")
            assert not bars.is_progress_bar_enabled()
        logger.warning("Expected types for vae: AutoencoderKL, got AutoencoderTiny.")
    finally:
        logger.removeHandler(handler)
    assert seen == [
        "Expected types for unet: A, got B.",
        "Expected types for vae: AutoencoderKL, got AutoencoderTiny.",
    ]
    assert bars.is_progress_bar_enabled()
