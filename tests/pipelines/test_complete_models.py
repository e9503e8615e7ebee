"""Model folders of every family: whole in every component, or refused in one sentence.

Everything but absent tensors is found without loading, when a run is planned.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sampler
from sampler.cli import main
from sampler.config.model import ModelConfig
from sampler.models.preflight import has_weights
from sampler.models.source import find_source
from sampler.models.vocabulary import vocabulary_size
from sampler.runs.fingerprint import model_of
from tests.families import FAMILIES

# The tests' tokenizer of Kolors is their own class, which cannot be saved.
NAMES = [name for name in FAMILIES if name != "Kolors"]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{family: folder}, saved when it is first asked for."""
    root = tmp_path_factory.mktemp("families")

    class Folders(dict):
        def __missing__(self, name):
            folder = root / str(len(self))
            FAMILIES[name].build().save_pretrained(folder, safe_serialization=True)
            self[name] = folder
            return folder

    return Folders()


@pytest.fixture
def model(folders, tmp_path):
    """A function that copies the folder of a family (by links: replace files, do not change)."""
    count = iter(range(1000))

    def copy(name):
        target = tmp_path / str(next(count))
        return Path(shutil.copytree(folders[name], target, copy_function=os.link))

    return copy


def parts(folder):
    index = json.loads((folder / "model_index.json").read_text())
    return {k: v for k, v in index.items() if isinstance(v, list) and v[0] is not None}


def replace(path, data):
    path.unlink()
    path.write_bytes(data)


def refused(folder, *words, **options):
    with pytest.raises(sampler.SamplerError) as caught:
        model_of(ModelConfig(path=str(folder), **options))
    text = str(caught.value)
    assert caught.value.code == 6 and "\n" not in text and text.endswith(".")
    assert all(word in text for word in words), text


def weights_of(folder):
    return sorted(folder.glob("*.safetensors"))


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_folder_is_whole(name, folders):
    source = find_source(folders[name])
    assert set(source.parts) == set(parts(folders[name]))
    assert source.unused() == []


@pytest.mark.parametrize("name", NAMES)
def test_a_component_without_its_files(name, model):
    for part, (_, cls) in parts(model(name)).items():
        folder = model(name)
        shutil.rmtree(folder / part)
        refused(folder, "incomplete", part)
        folder = model(name)
        if has_weights(cls):
            (folder / part / "config.json").unlink()
            refused(folder, f"{part} is incomplete: config.json")
            folder = model(name)
            (path,) = weights_of(folder / part)
            path.unlink()
            refused(folder, f"{part} has no safetensors weights")
            path.write_bytes(POINTER)
            refused(folder, path.name, "Git LFS pointer", "git lfs pull")
        elif part.startswith("tokenizer"):
            (folder / part / "tokenizer_config.json").unlink()
            refused(folder, f"{part} is incomplete: tokenizer_config.json")
        else:
            for path in (folder / part).iterdir():
                path.unlink()
            refused(folder, f"{part} is incomplete", "config.json")


@pytest.mark.parametrize("name", [n for n in NAMES if FAMILIES[n].prompts[0] not in ("", 3)])
def test_a_vocabulary_is_there_and_fits_its_encoder(name, model):
    for part in [p for p in parts(model(name)) if p.startswith("tokenizer")]:
        folder = model(name)
        path = folder / part / "tokenizer.json"
        whole = path.read_bytes()
        path.unlink()
        refused(folder, f"{part} has no vocabulary")
        path.write_bytes(POINTER)
        refused(folder, "tokenizer.json is a Git LFS pointer")
        path.write_bytes(b"{}")
        refused(folder, "tokenizer.json is not a readable vocabulary")
        tree = json.loads(whole)
        words = tree["model"]["vocab"]
        for changed, sentence in ((_half(words), "takes"), (type(words)(), None)):
            tree["model"]["vocab"], tree["added_tokens"] = changed, []
            path.write_text(json.dumps(tree))
            (folder / part / "tokenizer_config.json").unlink()
            (folder / part / "tokenizer_config.json").write_text("{}")
            refused(folder, "tokenizer.json", sentence or "empty vocabulary")
        for file in (folder / part).iterdir():
            file.unlink()
        refused(folder, f"{part} has no vocabulary")
        encoder = model(name)
        config = encoder / part.replace("tokenizer", "text_encoder") / "config.json"
        tree = json.loads(config.read_text())
        size = tree["vocab_size"]
        replace(config, json.dumps({**tree, "vocab_size": size // 2}).encode())
        refused(encoder, "tokens", f"takes {size // 2}")


def _half(words):
    if isinstance(words, dict):
        return {word: k for word, k in words.items() if k < len(words) // 2}
    return words[: len(words) // 2]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_one_variant_offers_it(name, model):
    folder = model(name)
    for path in folder.glob("*/*.safetensors"):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    refused(folder, "variant fp16 only", "--variant fp16")
    refused(folder, "no weights of the variant 'bf16'; it has fp16", variant="bf16")
    assert find_source(folder, variant="fp16").unused() == []
    sampler.load(folder, variant="fp16", device="cpu")
    first = next(iter(parts(folder)))
    (folder / first / "LICENSE").write_text("x")
    refused(folder, "LICENSE stops diffusers from reading a variant", variant="fp16")


@pytest.mark.parametrize("name", NAMES)
def test_tensors_that_a_component_lacks_are_not_made_up(name, model):
    for part, (_, cls) in parts(model(name)).items():
        if not has_weights(cls):
            continue
        folder = model(name)
        (path,) = weights_of(folder / part)
        tensors = load_file(path)
        key = max(tensors, key=lambda k: tensors[k].numel())
        del tensors[key]
        path.unlink()
        save_file(tensors, path, {"format": "pt"})
        with pytest.raises(sampler.SamplerError) as caught:
            sampler.load(folder, device="cpu")
        assert "lacks the weights" in str(caught.value) and "\n" not in str(caught.value), part


def test_the_libraries_may_be_silent(model, monkeypatch):
    from transformers.utils import logging

    folder = model("Stable Diffusion 1.x")
    (path,) = weights_of(folder / "text_encoder")
    tensors = load_file(path)
    tensors.pop("embeddings.position_embedding.weight")
    path.unlink()
    save_file(tensors, path, {"format": "pt"})
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with pytest.raises(sampler.SamplerError, match="lacks the weights embeddings.position"):
            sampler.load(folder, device="cpu")
    finally:
        logging.set_verbosity(before)


def test_vocabularies_of_slow_tokenizers(tmp_path):
    """Each form with its size; sentencepiece models are counted without the library."""
    from tokenizers import Tokenizer, models

    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "c": 2}))
    with pytest.raises(sampler.SamplerError, match="vocab.json goes with merges.txt"):
        vocabulary_size(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    assert vocabulary_size(tmp_path) == (3, tmp_path / "vocab.json")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<x>": 6}))
    assert vocabulary_size(tmp_path)[0] == 7
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(
        str(tmp_path / "tokenizer.json")
    )
    assert vocabulary_size(tmp_path) == (7, tmp_path / "tokenizer.json")
    for name, content, size in (
        ("vocab.txt", b"[PAD]\n[UNK]\nfox\n", 3),
        ("spiece.model", _pieces(300), 300),
        ("tokenizer.model", _pieces(2), 2),
    ):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / name).write_bytes(content)
        assert vocabulary_size(folder) == (size, folder / name)
        (folder / name).write_bytes(content[: len(content) // 2 - 1] if "model" in name else b"\n")
        with pytest.raises(sampler.SamplerError, match="vocabulary"):
            vocabulary_size(folder)


def _pieces(count):
    """A sentencepiece model of some pieces: field 1, then trainer settings (2) and a float."""
    data = b""
    for k in range(count):
        word = f"w{k}".encode()
        body = b"\x0a" + bytes([len(word)]) + word + b"\x15\x00\x00\x80\xbf"
        data += b"\x0a" + bytes([len(body)]) + body
    return data + b"\x12\x02\x18\x01"


def test_a_spoilt_folder_is_refused_before_a_run_starts(model, tmp_path, capsys):
    folder = model("Stable Diffusion 1.x")
    (folder / "tokenizer" / "tokenizer.json").unlink()
    for extra in (["--dry-run"], []):
        out = tmp_path / "run"
        assert main(["generate", "a fox", "--model", str(folder), "-o", str(out), *extra]) == 6
        assert "has no vocabulary" in capsys.readouterr().err and not out.exists()


def test_shards_are_whole(model):
    from tests import tiny

    folder = model("Stable Diffusion 1.x")
    for part, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        shutil.rmtree(folder / part)
        getattr(tiny.sd(), part).save_pretrained(folder / part, max_shard_size="100KB")
        shards = sorted((folder / part).glob("*-of-*.safetensors"))
        assert len(shards) > 1
        assert model_of(ModelConfig(path=str(folder))) and find_source(folder).unused() == []
        index = folder / part / f"{name}.safetensors.index.json"
        text = index.read_bytes()
        index.unlink()
        refused(folder, "one of several parts", "index")
        index.write_bytes(text)
        data = shards[1].read_bytes()
        shards[1].unlink()
        refused(folder, "names weights that are not there", shards[1].name)
        shards[1].write_bytes(data)
    assert torch.equal(
        *[sampler.load(f, device="cpu").generate("a fox", seeds=1, steps=2, output="latent").latents
          for f in (folder, model("Stable Diffusion 1.x"))]
    )  # fmt: skip


def test_kolors_whose_text_encoder_is_a_module_of_diffusers(tmp_path):
    """As published: ChatGLM and its sentencepiece tokenizer from diffusers.pipelines.kolors."""
    pipe = FAMILIES["Kolors"].build()
    for part in ("unet", "vae", "text_encoder", "scheduler"):
        getattr(pipe, part).save_pretrained(tmp_path / part)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.model").write_bytes(_pieces(257))
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text("{}")
    index = {
        "_class_name": "KolorsPipeline",
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["kolors", "ChatGLMModel"],
        "tokenizer": ["kolors", "ChatGLMTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert find_source(tmp_path).unused() == []
    (tmp_path / "tokenizer" / "tokenizer.model").write_bytes(_pieces(120))
    refused(tmp_path, "120 tokens", "takes 257")
