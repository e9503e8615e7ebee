"""Classes of LTX-2, which denoise a video and its sound together."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from diffusers.pipelines import ltx2

from tests.classic.parts import WIDTH
from tests.classic.recipe import Recipe, drawn
from tests.tiny_transformers import flow, gemma_tokenizer


def gemma3(words: Any) -> Any:
    """Gemma 3 with an image encoder."""
    text = {
        "vocab_size": len(words), "hidden_size": WIDTH, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    }  # fmt: skip
    vision = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 32, "patch_size": 8}  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def video_vae() -> Any:
    """2 pixels per latent, 4 channels."""
    found = diffusers.AutoencoderKLLTX2Video(
        latent_channels=4, block_out_channels=(8,), decoder_block_out_channels=(8,),
        layers_per_block=(1,), decoder_layers_per_block=(1, 1), spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,), decoder_inject_noise=(False, False),
        downsample_type=("spatial",), upsample_residual=(False,), upsample_factor=(1,),
        timestep_conditioning=False, patch_size=1, patch_size_t=1, encoder_causal=True,
        decoder_causal=False,
    )  # fmt: skip
    found.use_framewise_encoding = found.use_framewise_decoding = False
    return found


def sound_vae() -> Any:
    """Stereo spectrograms of eight bands."""
    return diffusers.AutoencoderKLLTX2Audio(
        base_channels=4, output_channels=2, ch_mult=(1,), num_res_blocks=1, attn_resolutions=None,
        in_channels=2, resolution=32, latent_channels=2, norm_type="pixel",
        causality_axis="height", mid_block_add_attention=False, sample_rate=16000,
        mel_hop_length=160, is_causal=True, mel_bins=8,
    )  # fmt: skip


def parts(**own: Any) -> dict[str, Any]:
    """`own`: settings of the network."""
    words = gemma_tokenizer()
    words.padding_side = "left"
    network = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16, audio_in_channels=4, audio_out_channels=4,
        audio_num_attention_heads=2, audio_attention_head_dim=4, audio_cross_attention_dim=8,
        num_layers=1, caption_channels=WIDTH, rope_double_precision=False, rope_type="split",
        **own,
    )  # fmt: skip
    sides = {f"{side}_connector_{name}": value for side in ("video", "audio") for name, value in {
        "num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 1,
        "num_learnable_registers": None}.items()}  # fmt: skip
    connectors = ltx2.connectors.LTX2TextConnectors(
        caption_channels=WIDTH, text_proj_in_factor=3, **sides, connector_rope_base_seq_len=32,
        rope_theta=10000.0, rope_double_precision=False, causal_temporal_positioning=False,
        rope_type="split",
    )  # fmt: skip
    vocoder = ltx2.vocoder.LTX2Vocoder(
        in_channels=16, hidden_channels=32, out_channels=2, upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2], resnet_kernel_sizes=[3], resnet_dilations=[[1, 3, 5]],
        leaky_relu_negative_slope=0.1, output_sampling_rate=16000,
    )  # fmt: skip
    return {
        "tokenizer": words,
        "text_encoder": gemma3(words),
        "transformer": network,
        "connectors": connectors,
        "vae": video_vae(),
        "audio_vae": sound_vae(),
        "vocoder": vocoder,
        "scheduler": flow(),
    }


CALL = {
    "num_frames": 5, "max_sequence_length": 16, "stg_scale": 0.0, "modality_scale": 1.0,
    "guidance_rescale": 0.0, "spatio_temporal_guidance_blocks": None, "audio_stg_scale": 0.0,
    "audio_modality_scale": 1.0,
}  # fmt: skip
SEEN = drawn(1, 3, 32, 32).sigmoid()
DFR = {k: v for k, v in CALL.items() if k in ("num_frames", "max_sequence_length")}
TINY = {
    "LTX2DFRPipeline": Recipe(
        lambda: parts(use_keyframes_abs_pos_embedding=True), DFR),
    "LTX2Pipeline": Recipe(parts, CALL),
    "LTX2ImageToVideoPipeline": Recipe(parts, {**CALL, "image": SEEN, "image_crf": 0}),
    "LTX2ConditionPipeline": Recipe(
        parts,
        {**CALL, "conditions": ltx2.pipeline_ltx2_condition.LTX2VideoCondition(SEEN, crf=0)},
    ),
    "LTX2InContextPipeline": Recipe(
        parts,
        {**CALL, "conditions": ltx2.pipeline_ltx2_condition.LTX2VideoCondition(SEEN, crf=0)},
    ),
    "LTX2HDRPipeline": Recipe(
        parts,
        {**CALL, "reference_conditions":
            ltx2.pipeline_ltx2_hdr_lora.LTX2HDRReferenceCondition(SEEN)},
    ),
}  # fmt: skip
