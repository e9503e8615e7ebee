"""Videos and sounds of hosted pipelines as files of a run folder."""

import io
import json
import wave
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline
from diffusers.pipelines.pipeline_utils import AudioPipelineOutput
from diffusers.pipelines.wan import pipeline_wan_i2v
from PIL import Image, ImageSequence

import sampler
from sampler.cli import main
from sampler.runs.encodings import Encoding
from sampler.runs.media import Sound, decode_wav, encode_wav
from sampler.runs.metadata import read_metadata
from tests.classic.stand_ins import stand_ins
from tests.classic.table import TINY
from tests.guidance.stock_hosted import half_mask, image_to_video, picture
from tests.tiny_transformers import ddim, wan

pytestmark = pytest.mark.filterwarnings("ignore")
SIZE = {"height": 16, "width": 32}
FRAMES = np.arange(4 * 16 * 32 * 3).reshape(4, 16, 32, 3).astype(np.uint8)


def frames_of(path):
    with Image.open(path) as file:
        return [np.asarray(f.convert("RGB"), dtype=int) for f in ImageSequence.Iterator(file)]


@pytest.fixture
def ftfy(monkeypatch):
    """Stand-in for a package that this class of diffusers uses without asking for it."""
    fixed = SimpleNamespace(fix_text=lambda text: text)
    monkeypatch.setattr(pipeline_wan_i2v, "ftfy", fixed, raising=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("video") / "model"
    image_to_video().save_pretrained(folder)
    picture(size=(32, 16)).save(folder.parent / "start.png")
    return folder


def generate(model, *more):
    line = ["generate", "a fox", "--seed", 3, "--steps", 2, "--guidance", "cfg", "--scale", 5]
    line += ["--sampler", "ddim", "--width", 32, "--height", 16, "--device", "cpu", "-q"]
    line += ["--model", model, "--input", f"image={model.parent / 'start.png'}", "-o", "run"]
    return main([*map(str, [*line, "--input", "num_frames=5", *more])])


def test_an_image_becomes_a_video_on_the_command_line(model, tmp_path, monkeypatch, ftfy):
    monkeypatch.chdir(tmp_path)
    assert generate(model) == 0
    (path,) = Path("run/images").iterdir()
    found = frames_of(path)
    with Image.open(path) as file:
        file.seek(1)
        file.load()
        assert file.info["duration"] == 62 and path.suffix == ".webp"
    made = image_to_video()(
        prompt="a fox", image=picture(size=(32, 16)), num_frames=5, num_inference_steps=2,
        guidance_scale=5.0, generator=torch.Generator().manual_seed(3), output_type="pil", **SIZE,
    ).frames[0]  # fmt: skip
    wanted = [np.asarray(frame, dtype=int) for frame in made]
    assert len(found) == len(wanted) == 5
    assert max(np.abs(a - b).max() for a, b in zip(found, wanted, strict=True)) <= 1
    assert read_metadata(path.read_bytes())["record"]["prompt"] == "a fox"
    assert main(["replay", str(path), "-o", "again.webp", "-q"]) == 0
    assert Path("again.webp").read_bytes() == path.read_bytes()
    assert main(["verify", "run"]) == 0 and main(["gallery", "run"]) == 0
    path.unlink()
    assert generate(model) == 0 and len(frames_of(path)) == 5


def test_a_video_of_an_adapter_is_stored_by_the_stock_call(tmp_path):
    engine = sampler.load(wan())
    engine.pipeline.frames = 5
    settings = {"seeds": 3, "steps": 2, "guidance": {"name": "cfg", "scale": 5.0}, **SIZE}
    stored = engine.generate("a fox", out=tmp_path / "run", **settings)
    plain = engine.generate("a fox", **settings)
    for a, b in zip(stored.images[0], plain.images[0], strict=True):
        assert np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max() <= 1


@pytest.mark.parametrize("name", ["QwenImage21Pipeline", "QwenImageLayeredPipeline"])
def test_images_with_alpha_are_stored_with_it(tmp_path, name):
    recipe = TINY[name]
    pipe = recipe.build(name)
    inputs = {**recipe.inputs(type(pipe)), "image": str(tmp_path / "clear.png")}
    picture(1).convert("RGBA").save(tmp_path / "solid.png")
    clear = picture(1).convert("RGBA")
    clear.putalpha(half_mask())
    clear.save(inputs["image"])
    size = {"height": 64, "width": 64} if name == "QwenImage21Pipeline" else {}
    call = {"seeds": 1, "steps": 2, "sampler": "ddim", "inputs": inputs, **size}
    engine = sampler.load(pipe)
    with stand_ins(type(pipe)):
        plain = engine.generate("a red fox", **call).images[0]
        stored = engine.generate("a red fox", **call, out=tmp_path / "run").images[0]
        call["inputs"]["image"] = str(tmp_path / "solid.png")
        solid = engine.generate("a red fox", **call).images[0]
        call["inputs"]["image"] = picture(1)
        given = engine.generate("a red fox", **call).images[0]
    assert _different(solid, plain) and not _different(solid, given)  # the input's alpha is read
    pairs = [*zip(plain, stored, strict=True)] if isinstance(plain, list) else [(plain, stored)]
    for one, other in pairs:
        assert one.mode == other.mode == "RGBA"
        assert not _different(one, other) and np.asarray(one)[..., 3].std() > 1


def _different(one, other):
    return bool((np.asarray(one) != np.asarray(other)).any())


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.delattr(pipeline_wan_i2v, "ftfy", raising=False)
    engine = sampler.load(image_to_video())
    inputs = {"image": picture(size=(32, 16)), "num_frames": 5}
    with pytest.raises(sampler.SamplerError, match="needs the package ftfy, which is not"):
        engine.generate("a fox", seeds=1, steps=2, inputs=inputs, **SIZE)


def test_mp4_is_refused_without_its_library_before_anything_is_loaded(
    model, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sampler.runs.media.find_spec", lambda name: None)
    assert generate(model, "--set", "output.video=mp4") == 2
    assert "needs the extra video" in capsys.readouterr().err and not Path("run").exists()


def test_mp4_holds_the_frames_and_the_texts():
    av = pytest.importorskip("av")
    smooth = np.repeat(FRAMES[:, :1], 16, axis=1)
    data = Encoding(video="mp4", fps=8).encode(smooth, {"sampler": "{}"})
    assert data == Encoding(video="mp4", fps=8).encode(smooth, {"sampler": "{}"})
    with av.open(io.BytesIO(data)) as file:
        found = [f.to_ndarray(format="rgb24") for f in file.decode(video=0)]
        assert file.metadata["sampler"] == "{}" and file.streams.video[0].average_rate == 8
    assert len(found) == 4 and found[0].shape == (16, 32, 3)
    with pytest.raises(sampler.SamplerError, match="both sides must be even"):
        Encoding(video="mp4").encode(smooth[:, :, :31], {})


class AudioPipeline(DDIMPipeline):
    """Sounds of a tiny network: two channels of the samples of its images."""

    sample_rate = 8000

    def __call__(self, num_inference_steps=2, generator=None, return_dict=True):
        made = super().__call__(
            batch_size=len(generator), generator=generator, output_type="np",
            num_inference_steps=num_inference_steps,
        ).images  # fmt: skip
        return AudioPipelineOutput(audios=made.reshape(len(made), 2, -1) * 2 - 1)


def test_sounds_are_wav_files(tmp_path):
    pipe = ddim()
    engine = sampler.load(AudioPipeline(**pipe.components))
    stored = engine.generate(["", ""], seeds=[1, 2], steps=2, guidance="none", out=tmp_path / "run")
    plain = engine.generate(["", ""], seeds=[1, 2], steps=2, guidance="none")
    paths = sorted((tmp_path / "run" / "images").iterdir())
    assert [path.suffix for path in paths] == [".wav", ".wav"]
    for path, sound, values in zip(paths, stored.images, plain.images, strict=True):
        assert sound.rate == 8000 and sound.samples.shape == values.shape
        assert np.abs(sound.samples - values).max() <= 1 / 32767
        with wave.open(str(path)) as file:
            assert (file.getnchannels(), file.getframerate(), file.getsampwidth()) == (2, 8000, 2)
        journal = (tmp_path / "run" / "jobs.jsonl").read_text().splitlines()
        assert json.loads(journal[paths.index(path)])["key"].encode() in path.read_bytes()
    AudioPipeline.sample_rate = None
    with pytest.raises(ValueError, match="AudioPipeline does not say its sample rate"):
        engine.generate("", seeds=1, steps=2, guidance="none", out=tmp_path / "two")


def test_a_saved_model_of_sound_is_run_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "AudioLDM2Pipeline"  # whose parts are in part classes of its own folder of diffusers
    TINY[name].build(name).save_pretrained("model")
    line = "generate rain --negative noise --seed 3 --steps 2 --sampler ab --guidance apg"
    line += " --scale 3 --model model --input audio_length_in_s=0.01 --device cpu -q -o run"
    assert main(line.split()) == 0
    plain = sampler.load("model", device="cpu").generate(
        "rain", negative="noise", seeds=3, steps=2, sampler="ab",
        guidance={"name": "apg", "scale": 3}, inputs={"audio_length_in_s": 0.01},
    )  # fmt: skip
    (path,) = Path("run/images").iterdir()
    sound = decode_wav(path.read_bytes())
    assert path.suffix == ".wav" and sound.rate == 16000 and sound.samples.std() > 1e-3
    assert np.abs(sound.samples - np.clip(plain.images[0], -1, 1)).max() <= 1 / 32767


def test_a_wav_is_read_back_within_half_a_level():
    values = np.linspace(-1.2, 1.2, 201)[None].repeat(2, 0)
    sound = decode_wav(encode_wav(Sound(values, 16000), {"sampler": "ä" * 3}))
    assert sound.rate == 16000
    assert np.abs(sound.samples - values.clip(-1, 1)).max() <= 0.5 / 32767 + 1e-12
