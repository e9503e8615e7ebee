"""Classes that edit images which a multimodal language model sees beside the prompt."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers.pipelines.joyimage import image_processor

from tests import tiny, tiny_transformers
from tests.classic.images import sizes_of
from tests.classic.newer import flux2_vae, qwen3_vl
from tests.classic.parts import WIDTH, small
from tests.classic.qwen import Sights, bria_fibo, longcat, qwen_vl, tokenizer
from tests.classic.recipe import Recipe
from tests.classic.video_vaes import VAES
from tests.guidance.stock_hosted import picture
from tests.tiny import STATISTICS, qwen_transformer
from tests.tiny_transformers import DYNAMIC, flow


def qwen_edit() -> dict[str, Any]:
    words, parts = tokenizer(), tiny_transformers.qwen_image().components
    network = qwen_transformer()
    own = {**network.config, "joint_attention_dim": WIDTH}
    return {
        **parts,
        "transformer": type(network).from_config(own),
        "tokenizer": words,
        "text_encoder": qwen_vl(words),
        "processor": Sights(words),
    }


def layered() -> dict[str, Any]:
    """Qwen-Image-Layered; its images have alpha, and so latents of four channels would be taken
    for images."""
    parts = qwen_edit()
    kind = "QwenImageTransformer2DModel"
    own = {**sizes_of(parts["transformer"], kind), "in_channels": 64, "out_channels": 16}
    network = small(kind, **{**own, "use_additional_t_cond": True, "use_layer3d_rope": True})
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
        input_channels=4,
    )  # fmt: skip
    return {**parts, "transformer": network, "vae": vae}


class Chats(Sights):
    """A processor that gives the tokens of a conversation in a list of one row."""

    def apply_chat_template(self, messages: Any, **options: Any) -> Any:
        return self.tokenizer.apply_chat_template([messages], **options)


def qwen3(layers: int = 2) -> dict[str, Any]:
    """Qwen3-VL with its processor."""
    words = tokenizer()
    encoder = qwen3_vl(words, layers, "Qwen3VLForConditionalGeneration")
    return {"text_encoder": encoder, "tokenizer": words, "processor": Chats(words, 16)}


def qwen21() -> dict[str, Any]:
    network = diffusers.QwenImage21Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        context_in_dim=WIDTH, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLQwenImage21(
        base_dim=8, decoder_base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False] * 4, **STATISTICS,
    )  # fmt: skip
    return {**qwen3(), "transformer": network, "vae": vae, "scheduler": flow(**DYNAMIC)}


def nucleus() -> dict[str, Any]:
    network = diffusers.NucleusMoEImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(8, 4, 4), moe_enabled=False,
        capacity_factors=[8.0],
    )  # fmt: skip
    vae = tiny_transformers.qwen_image().vae
    return {**qwen3(8), "transformer": network, "vae": vae, "scheduler": flow()}


def joy(kind: str) -> dict[str, Any]:
    network = getattr(diffusers, kind)(
        patch_size=[1, 2, 2], in_channels=16, hidden_size=32, num_attention_heads=2,
        text_dim=WIDTH, num_layers=1, rope_dim_list=[4, 6, 6], theta=256,
    )  # fmt: skip
    return {**qwen3(), "transformer": network, "vae": VAES["wan16"](), "scheduler": flow()}


def bria_fibo2() -> dict[str, Any]:
    network = diffusers.BriaFibo2Transformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, cap_feat_dim=3 * WIDTH,
        injection_layer_ids=(1,), perceiver_num_layers=1, min_num_gist_tokens=4,
        max_num_gist_tokens=8, gist_step=2, gist_min_text_len=4, gist_max_text_len=64,
        axes_dims=(8, 4, 4), axes_lens=(128, 64, 64),
    )  # fmt: skip
    vae = flux2_vae()["vae"]
    return {**qwen3(3), "transformer": network, "vae": vae, "scheduler": flow(**DYNAMIC)}


def dream_lite() -> dict[str, Any]:
    network = diffusers.DreamLiteUNetModel(
        sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D",
                          "DreamLiteCrossAttnDownBlock2D"),
        up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
        block_out_channels=(16, 32), cross_attention_dim=WIDTH, attention_head_dim=8,
        layers_per_block=1, norm_num_groups=8, transformer_layers_per_block=1,
    )  # fmt: skip
    return {**qwen3(), "unet": network, "vae": tiny.sd(tiny_vae=True).vae, "scheduler": flow()}


def fibo_edit() -> dict[str, Any]:
    vae = diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False] * 4, **STATISTICS, scale_factor_spatial=16,
    )  # fmt: skip
    return {**bria_fibo(), "vae": vae}


def longcat_edit() -> dict[str, Any]:
    parts = longcat()
    return {**parts, "text_processor": Sights(parts["tokenizer"])}


BUCKET = dict.fromkeys(
    ("vae_image_processor", "image_processor"),
    image_processor.JoyImageEditImageProcessor(vae_scale_factor=8, basesize=32),
)
image_processor.BUCKETS.setdefault(32, [(32, 32)])  # the published ones have a megapixel
EDIT = '{"edit_instruction": "a red fox"}'
TINY = {
    "QwenImageEditPipeline": Recipe(qwen_edit),
    "QwenImageEditInpaintPipeline": Recipe(qwen_edit),
    "QwenImageEditPlusPipeline": Recipe(qwen_edit),
    "QwenImageLayeredPipeline": Recipe(layered, {"image": picture(1).convert("RGBA"), "layers": 2}),
    "QwenImage21Pipeline": Recipe(qwen21, {"height": 64, "width": 64}),
    "LongCatImageEditPipeline": Recipe(longcat_edit),
    "NucleusMoEImagePipeline": Recipe(nucleus, {"return_index": -1, "max_sequence_length": 64}),
    "JoyImageEditPipeline": Recipe(lambda: joy("JoyImageEditTransformer3DModel"), constants=BUCKET),
    "JoyImageEditPlusPipeline": Recipe(
        lambda: joy("JoyImageEditPlusTransformer3DModel"),
        {"images": [picture(1), picture(2)]},
        constants=BUCKET,
    ),
    "BriaFibo2Pipeline": Recipe(
        bria_fibo2,
        constants={
            "text_encoder_out_layers": ((0, 1, 2), (1, 2, 3)),
            "default_sample_size": 16,
            "text_encoder_image_size": 32,
        },
    ),
    "DreamLitePipeline": Recipe(dream_lite),
    "DreamLiteMobilePipeline": Recipe(dream_lite),
    "BriaFiboEditPipeline": Recipe(
        fibo_edit, {"max_sequence_length": 64, "_auto_resize": False, "prompt": EDIT}
    ),
}
