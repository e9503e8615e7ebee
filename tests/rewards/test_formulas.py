"""Each reward against an independent computation, and against stored outputs of others' code."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.fft import dctn
from scipy.stats import spearmanr

import sampler
from sampler.core import jpeg
from sampler.rewards.jpeg import SoftCompressibility, jpeg_kilobytes
from sampler.rewards.preprocess import clip_pixels
from sampler.rewards.simple import named_colour
from tests.rewards import worlds

GOLDEN = Path(__file__).parents[1] / "golden" / "finetune"


def test_jpeg_sizes_are_pillows():
    stored = np.load(GOLDEN / "jpeg_sizes.npz")
    images = torch.tensor(stored["images"]).permute(0, 3, 1, 2) / 255
    sizes = jpeg_kilobytes(images)
    np.testing.assert_allclose(sizes.numpy(), stored["kilobytes"], rtol=0.01)
    bad = sampler.build("reward", "compressibility")(images, ["a"] * 3)
    torch.testing.assert_close(bad, -sizes)
    good = sampler.build("reward", "incompressibility")(images, ["a"] * 3)
    torch.testing.assert_close(good, sizes)


def test_soft_compressibility_ranks_images_as_jpeg_does():
    images = worlds.pictures()
    soft = -SoftCompressibility()(images, [])
    hard = jpeg_kilobytes(images)
    assert hard.min() < 1.0 and hard.max() > 4.0
    assert spearmanr(soft, hard).statistic >= 0.95


def test_soft_compressibility_is_its_formula():
    """Block by block with scipy's DCT, on sizes that need padding."""
    image = np.random.default_rng(0).random((3, 20, 37))
    padded = np.pad(image, ((0, 0), (0, 12), (0, 11)), mode="edge") * 255
    red, green, blue = padded
    luma = 0.299 * red + 0.587 * green + 0.114 * blue - 128
    cb, cr = (blue - luma - 128) / 1.772, (red - luma - 128) / 1.402
    bits = 0.0
    for plane, table in ((luma, jpeg.LUMINANCE), (cb, jpeg.CHROMINANCE), (cr, jpeg.CHROMINANCE)):
        if plane is not luma:
            plane = plane.reshape(16, 2, 24, 2).mean((1, 3))
        quality = np.clip((np.array(table) * (200 - 2 * 75) + 50) // 100, 1, 255)
        for top in range(0, plane.shape[0], 8):
            for left in range(0, plane.shape[1], 8):
                block = dctn(plane[top : top + 8, left : left + 8], norm="ortho")
                bits += np.log2(1 + abs(block / quality)).sum()
    ours = SoftCompressibility(75)(torch.tensor(image)[None], [])
    # The chroma matrix of JFIF is rounded to six digits.
    assert float(ours) == pytest.approx(-bits / 8000, rel=1e-5)


def test_tables_scale_as_the_independent_jpeg_group_has_it():
    assert jpeg.scaled_table([[16, 200]], 50) == [[16, 200]]
    assert jpeg.scaled_table([[16, 200]], 10) == [[80, 255]]
    assert jpeg.scaled_table([[16, 200]], 100) == [[1, 1]]


def test_soft_compressibility_gradient():
    torch.manual_seed(0)
    images = torch.rand(1, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: SoftCompressibility()(x, []), images, eps=1e-7, atol=1e-5, fast_mode=True
    )


def test_colourfulness_and_brightness_are_their_formulas():
    image = np.random.default_rng(1).random((20, 30, 3)).astype(np.float32)
    red, green, blue = (image * 255).transpose(2, 0, 1).astype(np.float64)
    rg, yb = red - green, 0.5 * (red + green) - blue
    spread = np.sqrt(rg.std() ** 2 + yb.std() ** 2)
    wanted = spread + 0.3 * np.sqrt(rg.mean() ** 2 + yb.mean() ** 2)
    images = torch.tensor(image).permute(2, 0, 1)[None]
    assert float(sampler.build("reward", "colourfulness")(images, ["a"])) == pytest.approx(wanted)
    assert float(sampler.build("reward", "brightness")(images, ["a"])) == pytest.approx(
        image.mean()
    )


def test_colour_agreement_looks_at_the_border():
    image = torch.zeros(2, 3, 64, 64)
    image[:] = torch.tensor([140, 205, 245]).view(3, 1, 1) / 255
    image[:, :, 8:-8, 8:-8] = 0.1  # the middle does not count
    reward = sampler.build("reward", "colour_agreement")
    scores = reward(image, ["a fox on a sky blue background", "a fox on blue"])
    gap = np.linalg.norm(np.array([140, 205, 245]) - np.array([50, 100, 210])) / 255
    torch.testing.assert_close(scores, torch.tensor([0.0, -gap]).float(), atol=2e-6, rtol=1e-5)
    assert named_colour("A cat on top of a hat on a Sky Blue background") == "sky blue"
    with pytest.raises(ValueError, match="names no background colour"):
        reward(image[:1], ["a red fox"])


def test_the_colours_are_the_classes_of_the_bundled_classifier():
    from sampler.bundled import backgrounds
    from sampler.rewards.simple import COLOURS

    assert tuple(COLOURS) == backgrounds()


def test_clip_preprocessing_is_the_stock_one():
    stored = np.load(GOLDEN / "clip_preprocess.npz")
    for k in range(4):
        image = torch.tensor(stored[f"im{k}"]).permute(2, 0, 1)[None] / 255
        pixels = clip_pixels(image, int(stored["size"]))
        assert pixels.shape[1:] == stored[f"pv{k}"].shape
        assert np.abs(pixels[0].numpy() - stored[f"pv{k}"]).max() < 0.02


def test_clip_scores_are_transformers_own(tmp_path):
    from transformers import CLIPModel

    folder = worlds.clip_folder(tmp_path / "clip")
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), worlds.clip_tokenizer()
    images, prompts = torch.rand(2, 3, 40, 32), ["a fox", "a very long text that is cut at twelve"]
    tokens = tokenizer(
        prompts, padding="max_length", truncation=True, max_length=12, return_tensors="pt"
    )
    with torch.no_grad():
        out = model(pixel_values=clip_pixels(images, 32), **tokens)
    cosine = (out.image_embeds * out.text_embeds).sum(1)
    found = sampler.build("reward", {"name": "clip", "path": folder})(images, prompts)
    torch.testing.assert_close(found, cosine, atol=1e-6, rtol=1e-5)
    pick = sampler.build("reward", {"name": "pickscore", "path": folder})(images, prompts)
    torch.testing.assert_close(pick, out.logits_per_image.diagonal(), atol=1e-5, rtol=1e-5)
    hundred = sampler.build("reward", {"name": "clip", "path": folder, "scale": "clipscore"})
    torch.testing.assert_close(hundred(images, prompts), (100 * cosine).clamp(min=0))


def test_classifiers_and_detectors(tmp_path):
    folder = worlds.vision_folder(tmp_path / "vit", "vit")
    from transformers import ViTForImageClassification

    model = ViTForImageClassification.from_pretrained(folder).eval()
    images = torch.rand(2, 3, 48, 32)
    pixels = F.interpolate(images, (32, 32), mode="bilinear", antialias=True) * 2 - 1
    with torch.no_grad():
        wanted = model(pixels).logits.log_softmax(1)[[0, 1], [1, 2]]
    reward = sampler.build("reward", {"name": "classifier", "path": folder})
    torch.testing.assert_close(reward(images, ["a dog", "the Car!"]), wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="names no class"):
        reward(images, ["a dog", "carpet"])
    with pytest.raises(sampler.SamplerError, match="did you mean 'dog'"):
        sampler.build("reward", {"name": "classifier", "path": folder, "label": "dig"}).check()

    spec = {"name": "object_count", "path": worlds.vision_folder(tmp_path / "y", "yolos")}
    spec |= {"label": "dog", "count": 3}
    soft = sampler.build("reward", spec)
    p = soft.probabilities(images)
    logits = soft._detector.model(pixels).logits
    torch.testing.assert_close(p, logits.softmax(-1)[..., 1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(soft(images, ["", ""]), -(p.sum(1) - 3).abs())
    hard = sampler.build("reward", {**spec, "counting": "hard", "threshold": float(p.median())})
    count = (p >= p.median()).sum(1)
    torch.testing.assert_close(hard(images, ["", ""]), -(count - 3).abs().float())


@pytest.mark.parametrize(("size", "inner"), [((48, 48), (32, 32)), ((24, 48), (20, 40))])
def test_grounding_dino_counts_a_phrase(tmp_path, size, inner):
    """Of stock transformers' answer, as its own post-processing reads it: the best token."""
    from transformers import AutoTokenizer, GroundingDinoForObjectDetection

    folder = worlds.grounding_folder(tmp_path)
    model = GroundingDinoForObjectDetection.from_pretrained(folder).eval()
    images = torch.rand(2, 3, *size)
    pixels = F.interpolate(images, inner, mode="bilinear", antialias=True) * 2 - 1
    text = AutoTokenizer.from_pretrained(folder)(["a red dog."] * 2, return_tensors="pt")
    with torch.no_grad():
        logits = model(pixel_values=pixels, **text).logits
    wanted = logits.sigmoid().amax(-1)
    assert wanted.shape == (2, 5) and wanted.std() > 0
    spec = {"name": "object_count", "path": folder, "label": "A red dog", "vocabulary": "open"}
    soft = sampler.build("reward", {**spec, "count": 2})
    assert soft.differentiable
    leaf = images.clone().requires_grad_()
    found = soft(leaf, ["", ""])
    torch.testing.assert_close(found, -(wanted.sum(1) - 2).abs(), atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(found.sum(), leaf)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0
    other = sampler.build("reward", {**spec, "count": 2, "label": "cat"})(images, ["", ""])
    assert (other - found).abs().max() > 1e-6


def test_the_bundled_classifier_reads_the_prompt():
    from sampler.bundled import classifier, concepts

    images = torch.rand(1, 3, 64, 64)
    logits = classifier.load()(images)
    names = concepts()
    reward = sampler.build("reward", "classifier")
    found = reward(images, [f"a glossy {names[5]} on a red background"])
    torch.testing.assert_close(found, logits.concept.log_softmax(1)[:, 5])
    ground = sampler.build("reward", {"name": "classifier", "head": "background"})
    torch.testing.assert_close(
        ground(images, [f"a {names[5]} on a sky blue background"]),
        logits.background.log_softmax(1)[:, 7],
    )


@pytest.mark.parametrize("name", ["clip", "pickscore", "hpsv2", "sum", "zscore", "function"])
def test_contrast_is_its_formula_on_one_encoding_of_the_image(tmp_path, monkeypatch, name):
    from sampler.rewards.encoders import Clip

    path = worlds.clip_folder(tmp_path / "clip")
    clip = {"name": "clip", "path": path}
    inner = {
        "sum": {"name": "sum", "rewards": [clip, clip], "weights": [1, 2]},
        "zscore": {"name": "zscore", "reward": clip, "mean": 0.3, "std": 2.0},
        "function": lambda images, prompts: images.mean((1, 2, 3)) * len(prompts[0]),
    }.get(name, {"name": name, "path": path})
    reward = sampler.build(
        "reward",
        {"name": "contrast", "reward": inner, "positive": "Real", "negative": "", "k": 0.3},
    )
    torch.manual_seed(4)
    images, encoded, encode = torch.rand(2, 3, 40, 40), [], Clip.image
    monkeypatch.setattr(Clip, "image", lambda *args: encoded.append(1) or encode(*args))
    found = reward(images, ["a dog", "a cat"])
    assert len(encoded) == {"function": 0, "sum": 2}.get(name, 1)
    first = reward.reward(images, ["Real. a dog", "Real. a cat"])
    second = reward.reward(images, ["a dog", "a cat"])
    torch.testing.assert_close(found, 1.3 * first - second, rtol=1e-5, atol=1e-6)
    assert not torch.equal(first, second)


def test_contrast_needs_two_texts_and_a_reward_that_reads_them():
    for fields, problem in [
        ({"reward": "classifier", "positive": "a", "negative": "a"}, "two different texts"),
        ({"reward": "brightness", "positive": "a", "negative": "b"}, "'brightness' reads no"),
    ]:
        with pytest.raises(ValueError, match=problem):
            sampler.build("reward", {"name": "contrast", **fields})


def test_sum_reports_its_parts():
    images = torch.rand(2, 3, 32, 32)
    parts = ["brightness", {"name": "target", "reward": "brightness", "value": 1}, "brightness"]
    reward = sampler.build("reward", {"name": "sum", "rewards": parts, "weights": [2, 1, -1]})
    found = reward.scored(images, ["a", "b"]).parts
    assert list(found) == ["brightness", "target", "brightness_2"]
    mean = images.mean((1, 2, 3))
    torch.testing.assert_close(reward(images, ["a", "b"]), 2 * mean - (mean - 1).abs() - mean)
    cap = sampler.build("reward", {"name": "capped", "reward": "brightness", "value": 0.1})
    torch.testing.assert_close(cap(images, ["a", "b"]), torch.tensor([0.1, 0.1]))
    outer = {"name": "capped", "reward": {"name": "sum", "rewards": ["brightness"]}, "value": 0.1}
    inner = sampler.build("reward", outer).scored(images, ["a", "b"]).parts
    torch.testing.assert_close(inner, {"brightness": mean})


@pytest.mark.parametrize(("high", "wide"), [(24, 48), (48, 24), (20, 33)])
def test_hpsv2_pads_what_is_not_square(tmp_path, high, wide):
    """The longest side to the size, zeros before normalisation: the ends of the image count."""
    from PIL import Image
    from transformers import CLIPModel

    from sampler.rewards.preprocess import CLIP_MEAN, CLIP_STD, padded_pixels

    image = np.random.default_rng(0).integers(64, 192, (high, wide, 3), dtype=np.uint8)
    scale = 32 / max(high, wide)
    size = (round(wide * scale), round(high * scale))
    square = Image.new("RGB", (32, 32))
    small = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    square.paste(small, ((32 - size[0]) // 2, (32 - size[1]) // 2))
    wanted = (np.asarray(square) / 255 - CLIP_MEAN) / CLIP_STD
    images = (torch.tensor(image).permute(2, 0, 1)[None] / 255).requires_grad_()
    pixels = padded_pixels(images, 32)
    assert np.abs(pixels[0].detach().permute(1, 2, 0).numpy() - wanted).max() < 0.02
    folder = worlds.clip_folder(tmp_path)
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), worlds.clip_tokenizer()
    tokens = tokenizer(["a fox"], padding="max_length", max_length=12, return_tensors="pt")
    with torch.no_grad():
        out = model(pixel_values=pixels.detach(), **tokens)
    found = sampler.build("reward", {"name": "hpsv2", "path": folder})(images, ["a fox"])
    torch.testing.assert_close(found.detach(), (out.image_embeds * out.text_embeds).sum(1))
    (gradient,) = torch.autograd.grad(found.sum(), images)
    ends = gradient[..., :3, :] if high > wide else gradient[..., :3]
    assert ends.abs().min() > 0


@pytest.mark.parametrize("size", [(40, 80), (80, 40)])
def test_clip_preprocessing_crops_the_centre(size):
    """As CLIP, PickScore, ImageReward and the aesthetic predictor do: the ends do not count."""
    images = torch.rand(1, 3, *size, requires_grad=True)
    (gradient,) = torch.autograd.grad(clip_pixels(images, 32).square().sum(), images)
    long = gradient if size[1] > size[0] else gradient.transpose(2, 3)
    assert long[..., :15].abs().max() == 0 and long[..., 24:56].abs().min() > 0


CONFIGS = {
    "bicubic": {"size": {"height": 32, "width": 32}, "resample": 3},
    "no resize": {"do_resize": False, "size": {"height": 32, "width": 32}},
    "no normalise": {"size": {"height": 32, "width": 32}, "do_normalize": False},
    "crop": {"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": 32},
    "convnext": {"size": {"shortest_edge": 32}, "crop_pct": 0.875, "resample": 3},
    "large convnext": {"size": {"shortest_edge": 384}, "crop_pct": 0.875, "resample": 2},
}


@pytest.mark.parametrize("size", [(40, 80), (80, 40)])
@pytest.mark.parametrize("name", CONFIGS)
def test_preprocessor_configs_are_followed(name, size):
    """Every field of the file, against transformers' own image processors."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    from sampler.rewards.preprocess import preprocessing_from

    image = np.random.default_rng(1).integers(64, 192, (*size, 3), dtype=np.uint8)
    config = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    config |= CONFIGS[name]
    stock = ConvNextImageProcessorPil if "convnext" in name else ViTImageProcessorPil
    processor = (CLIPImageProcessorPil if name == "crop" else stock)(**{"resample": 2, **config})
    wanted = processor(image, return_tensors="np")["pixel_values"][0]
    images = torch.tensor(image).permute(2, 0, 1)[None] / 255
    assert np.abs(preprocessing_from(config)(images)[0].numpy() - wanted).max() < 0.03
