"""The bundled model: its folder, classifier, statistics, and the pictures it makes."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import sampler
from sampler import bundled
from sampler.bundled.classifier import (
    feature_statistics,
    frechet_distance,
    load,
    reference_statistics,
)
from sampler.bundled.measures import agreement, clipped_share, extracted_features, saturation
from sampler.cli import main


@pytest.fixture(scope="module")
def classifier():
    return load()


@pytest.fixture(scope="module")
def pipeline():
    from scripts.bundled.networks import load_pipeline

    return load_pipeline()


def test_the_vocabulary_is_read_without_torch():
    code = (
        "import sys; from sampler import bundled; bundled.prompts(3); "
        "sys.exit(bool({'torch', 'diffusers'} & set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=bundled.FOLDER.parents[1]).returncode == 0
    )
    assert [len(bundled.concepts()), len(bundled.styles()), len(bundled.backgrounds())] == [
        128,
        4,
        12,
    ]


def test_prompts_are_fixed_and_pair_every_concept_with_every_background():
    listed = bundled.prompts(12 * 128)
    assert len({(prompt.concept, prompt.background) for prompt in listed}) == 12 * 128
    assert listed[48].text == "a red apple on a white background"
    assert bundled.prompts(3, start=7) == listed[7:10]
    styled = bundled.prompts(4 * 128, styled=True)
    assert len({(prompt.concept, prompt.style) for prompt in styled}) == 4 * 128
    assert styled[48].text == "a glossy red apple on a white background"


def test_the_folder_is_small_and_holds_no_pickle():
    files = [path for path in bundled.FOLDER.rglob("*") if path.is_file()]
    files = [path for path in files if "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= 32e6
    known = {".safetensors", ".json", ".py", ".md", ".txt", ".png"}
    assert {path.suffix for path in files} <= known
    weights = [path for path in files if path.suffix == ".safetensors"]
    folders = {path.parent.relative_to(bundled.FOLDER).as_posix() for path in weights}
    parts = {"pipeline/unet", "pipeline/vae", "pipeline/text_encoder", "weak", "lcm", "."}
    parts |= {"classifier", "judge", "student", "sd3/transformer", "sd3/vae"}
    parts |= {"sd3/text_encoder", "sd3/text_encoder_2"}
    assert folders == parts
    for path in weights:
        assert all(value.isfinite().all() for value in load_file(path).values())
    for path in files:
        if path.suffix in {".json", ".md"}:
            assert "/work" not in path.read_text(encoding="utf-8")


def test_the_card_names_sources_and_licences():
    card = (bundled.FOLDER / "README.md").read_text(encoding="utf-8")
    for commit in ("7a40f1a2d064", "41e31b110b4e", "437784e59a5d"):
        assert commit in card
    assert "MIT" in card and "Apache-2.0" in card
    assert len(list((bundled.FOLDER / "licenses").glob("*.txt"))) == 5


def test_the_classifier_takes_any_size_and_gives_gradients(classifier):
    images = torch.rand(2, 3, 96, 80, requires_grad=True)
    logits = classifier(images)
    assert [tuple(head.shape) for head in logits] == [(2, 128), (2, 4), (2, 12)]
    assert classifier.features(images).shape == (2, 160)
    logits.concept.log_softmax(1)[:, 0].sum().backward()
    assert images.grad.isfinite().all() and images.grad.abs().max() > 0
    assert not any(parameter.requires_grad for parameter in classifier.parameters())
    flat = torch.full((1, 3, 64, 64), 0.5)
    torch.testing.assert_close(
        classifier.features(flat), classifier.features(torch.full((1, 3, 128, 128), 0.5))
    )


def test_classifier_row_does_not_depend_on_its_batch(classifier):
    images = torch.rand(3, 3, 64, 64)
    alone = classifier.features(images[1:2])
    torch.testing.assert_close(classifier.features(images)[1:2], alone, rtol=1e-4, atol=1e-5)


def test_reference_statistics_are_a_covariance():
    mean, covariance = reference_statistics()
    assert mean.shape == (160,) and covariance.shape == (160, 160)
    assert mean.isfinite().all() and mean.min() >= 0  # means of ReLU outputs
    torch.testing.assert_close(covariance, covariance.T)
    assert torch.linalg.eigvalsh(covariance).min() > -1e-4


def test_frechet_distance_of_known_gaussians():
    mean, eye = torch.zeros(3), torch.eye(3)
    assert frechet_distance(mean, eye, mean, eye) == pytest.approx(0, abs=1e-9)
    # Commuting covariances: |m|^2 + sum (a - b)^2 over the standard deviations.
    scaled = torch.diag(torch.tensor([4.0, 9.0, 0.0]))
    assert frechet_distance(mean, eye, mean + 2, scaled) == pytest.approx(12 + 1 + 4 + 1)
    draw = torch.Generator().manual_seed(0)
    first, second = (
        feature_statistics(torch.randn(50, 3, generator=draw) @ torch.rand(3, 3, generator=draw))
        for _ in range(2)
    )
    # Equation 6 written with the symmetric root of C1^(1/2) C2 C1^(1/2).
    values, vectors = torch.linalg.eigh(first.covariance)
    root = vectors * values.sqrt() @ vectors.T
    trace = torch.linalg.eigvalsh(root @ second.covariance @ root).sqrt().sum()
    spread = first.covariance.trace() + second.covariance.trace() - 2 * trace
    expected = (first.mean - second.mean).square().sum() + spread
    assert frechet_distance(*first, *second) == pytest.approx(float(expected))


def test_saturation_and_clipping():
    images = torch.full((1, 3, 2, 2), 0.5)
    images[:, 0, 0, 0] = 1.0
    assert saturation(images) == pytest.approx(0.5 / 4)
    assert clipped_share(images) == pytest.approx(1 / 12)


def test_generated_images_agree_with_their_prompts(pipeline, classifier):
    listed = [bundled.prompts(128)[i] for i in (10, 16, 28, 48, 61, 80, 98, 112)]
    result = pipeline(
        [prompt.text for prompt in listed],
        num_inference_steps=20,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(i) for i in range(len(listed))],
        output_type="pt",
    )
    images = result.images
    assert images.shape == (8, 3, 64, 64)
    shares = agreement(classifier, extracted_features(classifier, images), listed)
    assert shares["concept"] >= 7 / 8 and shares["background"] >= 7 / 8


def test_the_weak_sibling_is_a_smaller_unet_for_the_same_latents(pipeline):
    from scripts.bundled.networks import load_part

    weak = load_part("unet", bundled.FOLDER / "weak")
    assert weak.num_parameters() < 0.4 * pipeline.unet.num_parameters()
    context = torch.zeros(2, 16, pipeline.unet.config.cross_attention_dim)
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        guess, better = (net(latents, 999, context).sample for net in (weak, pipeline.unet))
    # Both predict the same target: at t = 999 the latents are pure noise and v = -x0.
    assert guess.shape == latents.shape
    assert torch.nn.functional.cosine_similarity(guess.flatten(), better.flatten(), 0) > 0.8


def test_the_student_makes_the_right_things_in_one_evaluation(classifier):
    listed = bundled.prompts(128)[::4]
    engine = sampler.load("bundled-student")
    made = engine.generate([p.text for p in listed], seeds=0, steps=1, output="tensor")
    assert made.nfe == [1] * len(listed)
    shares = agreement(classifier, extracted_features(classifier, made.images), listed)
    assert shares["concept"] >= 0.85 and shares["background"] >= 0.95


def test_the_student_is_one_of_f_distill_and_small():
    folder = bundled.FOLDER / "student"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 6 * 2**20
    manifest = sampler.load("bundled-student").pipeline.student
    assert manifest["steps"] == 1 and manifest["form"] == "difference"
    assert manifest["baked_guidance"] == {**manifest["baked_guidance"], "name": "cfg", "scale": 3.0}
    with pytest.raises(ValueError, match="cfg at scale 3"):
        rule = {"name": "student", "scale": 2}
        sampler.load("bundled-student").generate("a dog", steps=1, guidance=rule)


def test_the_student_runs_from_the_command_line(tmp_path, capsys):
    """Its sampler, rule and single step are the defaults; its images can be made again."""
    run = tmp_path / "run"
    words = ["generate", "a dog", "a fox", "--model", "bundled-student", "--seed", "3"]
    assert main([*words, "-o", str(run)]) == 0, capsys.readouterr().err
    first, second = sorted(run.glob("images/*.png"))
    assert [json.loads(line)["nfe"] for line in (run / "journal.jsonl").open()] == [1, 1]
    assert main(["replay", str(first), "-o", str(tmp_path / "again.png")]) == 0
    assert first.read_bytes() != second.read_bytes()
