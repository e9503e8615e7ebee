"""Tiny pipelines of classes without an adapter, over the parts of `tests/tiny.py`."""

from __future__ import annotations

import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPAGPipeline,
    UNet2DConditionModel,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)

from tests import tiny
from tests.tiny_transformers import wan


def picture(seed=0, size=(32, 32)):
    pixels = torch.randint(0, 256, (*size[::-1], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def half_mask(size=(32, 32)):
    mask = Image.new("L", size, 0)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask


def _parts(channels=4, **more):
    parts = {**tiny.sd().components, **more}
    if channels != 4:
        parts["unet"] = UNet2DConditionModel(**tiny.unet_config(32), in_channels=channels)
    return {**parts, "requires_safety_checker": False}


@tiny.seeded
def controlnet():
    parts = _parts()
    # two channels of the embedding: 2 pixels per latent
    control = ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(4, 4))
    for block in [*control.controlnet_down_blocks, control.controlnet_mid_block]:
        torch.nn.init.normal_(block.weight, std=0.1)  # 0 in the class
    torch.nn.init.normal_(control.controlnet_cond_embedding.conv_out.weight, std=0.1)
    return StableDiffusionControlNetPipeline(controlnet=control, **parts)


@tiny.seeded
def inpaint(channels=9):
    return StableDiffusionInpaintPipeline(**_parts(channels))


@tiny.seeded
def pix2pix():
    return StableDiffusionInstructPix2PixPipeline(**_parts(8))


@tiny.seeded
def pag():
    return StableDiffusionPAGPipeline(**_parts(), pag_applied_layers=["mid"])


def save_controlnet(folder, seed=0):
    """A ControlNet over the network of `tiny.sd`, as a folder."""
    controlnet(seed=seed).controlnet.save_pretrained(folder)


def save_ip_adapter(folder, seed=0):
    """An IP-Adapter of the network of `tiny.sd` and its image encoder, in the published layout."""
    torch.manual_seed(seed)
    unet, width = tiny.sd().unet, 12
    cross = unet.config.cross_attention_dim
    encoder = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        image_size=32, patch_size=16, projection_dim=width,
    )  # fmt: skip
    CLIPVisionModelWithProjection(encoder).save_pretrained(folder / "image_encoder")
    tensors = {"image_proj.proj.weight": torch.randn(4 * cross, width)}
    tensors |= {f"image_proj.{name}": torch.zeros(size) for name, size in
                (("proj.bias", 4 * cross), ("norm.bias", cross))}  # fmt: skip
    tensors["image_proj.norm.weight"] = torch.ones(cross)
    names = [name for name in unet.attn_processors if not name.endswith("attn1.processor")]
    for k, name in enumerate(names):
        shape = unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape
        for part in "kv":
            tensors[f"ip_adapter.{2 * k + 1}.to_{part}_ip.weight"] = torch.randn(shape)
    save_file(tensors, folder / "ip-adapter.safetensors")


@tiny.seeded
def image_to_video():
    """Wan 2.1 from an image: the image's latents and its embedding are inputs of the network."""
    parts = wan().components
    encoder = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=32, patch_size=16,
    )  # fmt: skip
    network = {**parts["transformer"].config, "in_channels": 10, "image_dim": 16,
               "added_kv_proj_dim": 24}  # fmt: skip
    parts["transformer"] = WanTransformer3DModel.from_config(network)
    return WanImageToVideoPipeline(
        **{k: v for k, v in parts.items() if k != "transformer_2"},
        image_encoder=CLIPVisionModel(encoder),
        image_processor=CLIPImageProcessor(size=32, crop_size=32),
    )
