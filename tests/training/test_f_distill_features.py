"""The features that the discriminator reads, in every family: image tokens on their own grid."""

import pytest
import torch

from sampler.core.noise import initial
from sampler.training.f_distill.heads import FeatureReader, default_features, token_grid
from tests.families import FAMILIES

# Every block joins the tokens of text and image.
JOINT = {"Lumina 2": "noise_refiner.0", "Z-Image": "noise_refiner.0"}
UNPROMPTED = {"DiT", "DDIM, unconditional", "DDPM, unconditional", "Consistency model"}
NAMES = [f.name for f in FAMILIES.values() if f.frames is None and f.name not in UNPROMPTED]


def probe(family):
    pipeline = family.engine(family.build()).pipeline
    x = initial([0], pipeline.latent_shape(*family.size))
    cond = pipeline.encode(list(family.prompts[:1]), [""], False, family.size).cond
    return pipeline, (x, pipeline.grid(3, family.size)[1], cond)


@pytest.mark.parametrize("name", NAMES)
def test_features_are_images_with_the_aspect_of_the_latents(name):
    """32 x 64 pixels: features are twice as wide as high, and the gradient reaches all of x."""
    pipeline, (x, level, cond) = probe(FAMILIES[name])
    if name in JOINT:
        with pytest.raises(ValueError, match=r"name modules that do, features = \[...\]"):
            default_features(pipeline.network)
    names = (JOINT[name],) if name in JOINT else default_features(pipeline.network)
    x = x.requires_grad_()
    (feature,) = FeatureReader(pipeline, names)(x, level, cond)
    assert feature.ndim == 4 and feature.shape[3] == 2 * feature.shape[2]
    (gradient,) = torch.autograd.grad(feature.square().sum(), x)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


@pytest.mark.parametrize("name", ["Stable Diffusion 3", "Flux", "Qwen-Image"])
def test_two_stream_blocks_give_the_tokens_of_the_image(name):
    """The second of (text, image); the last block of SD3 returns no text."""
    pipeline, (x, level, cond) = probe(FAMILIES[name])
    network, seen = pipeline.network, []
    last = f"transformer_blocks.{len(network.transformer_blocks) - 1}"
    hook = network.get_submodule(last).register_forward_hook(lambda m, i, o: seen.append(o[-1]))
    with torch.no_grad():
        (feature,) = FeatureReader(pipeline, (last,))(x, level, cond)
    hook.remove()
    high, wide = token_grid(network, x)
    assert seen[0].shape[1] == high * wide and feature.shape[2:] == (high, wide)
    for row, column in ((0, 1), (1, 0), (high - 1, wide - 1)):
        assert torch.equal(feature[0, :, row, column], seen[0][0, row * wide + column])


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("Flux 2", "single_transformer_blocks.0"),
        ("Z-Image", "layers.0"),
        ("AuraFlow", "single_transformer_blocks.0"),
        ("Stable Diffusion 3", "time_text_embed"),
    ],
)
def test_modules_without_tokens_of_the_image_alone_are_refused(name, module):
    pipeline, where = probe(FAMILIES[name])
    with pytest.raises(ValueError, match=f"the module '{module}' returns .* name another one"):
        FeatureReader(pipeline, (module,))(*where)
