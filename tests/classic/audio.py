"""Classes of sound and music."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from diffusers.pipelines.ace_step import modeling_ace_step
from diffusers.pipelines.audioldm2 import modeling_audioldm2
from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioProjectionModel
from diffusers.pipelines.stable_audio_3.modeling_stable_audio_3 import StableAudio3DurationEmbedder

from tests import tiny
from tests.classic.parts import WIDTH, byte_vocabulary, decoder, randomised, t5, umt5
from tests.classic.recipe import Recipe, drawn
from tests.tiny_transformers import flow, gemma_tokenizer, qwen_tokenizer

LAYERS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "hidden_size": 16,
          "intermediate_size": 32, "sliding_window": 16}  # fmt: skip


def oobleck(channels: int) -> Any:
    """Stereo of 8 samples per second, of which a latent holds two."""
    return diffusers.AutoencoderOobleck(
        encoder_hidden_size=6, downsampling_ratios=[1, 2], decoder_channels=4,
        decoder_input_channels=channels, audio_channels=2, channel_multiples=[2, 4],
        sampling_rate=8,
    )  # fmt: skip


def stable_audio() -> dict[str, Any]:
    network = diffusers.StableAudioDiTModel(
        sample_size=16, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, num_key_value_attention_heads=2, cross_attention_dim=8,
        time_proj_dim=8, global_states_input_dim=16, cross_attention_input_dim=8,
    )  # fmt: skip
    projection = StableAudioProjectionModel(
        text_encoder_dim=8, conditioning_dim=8, min_value=0, max_value=32
    )
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(
        prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
    )
    return {**t5(25, 8), "transformer": network, "vae": oobleck(4), "scheduler": scheduler,
            "projection_model": projection}  # fmt: skip


def stable_audio_3() -> dict[str, Any]:
    words = gemma_tokenizer()
    words.model_max_length = 64
    config = transformers.T5GemmaModuleConfig(
        vocab_size=len(words), hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, dropout_rate=0.0,
        layer_types=["full_attention"] * 2,
    )  # fmt: skip
    both = transformers.T5GemmaConfig(
        encoder=config.to_dict(), decoder=config.to_dict(), is_encoder_decoder=False
    )
    network = diffusers.StableAudio3DiTModel(
        io_channels=8, embed_dim=WIDTH, depth=1, num_heads=4, cond_token_dim=WIDTH,
        global_cond_dim=WIDTH, local_add_cond_dim=9, timestep_features_dim=16, ff_mult=2,
        num_memory_tokens=3, use_differential_attention=False,
    )  # fmt: skip
    vae = diffusers.AutoencoderSAME(
        audio_channels=2, patch_size=2, encoder_channels=8, encoder_c_mults=(2,),
        encoder_strides=(2,), encoder_transformer_depths=(1,), latent_dim=8,
        use_differential_attention=False, dim_heads=4, ff_mult=2, sampling_rate=16,
    )  # fmt: skip
    randomised(vae)  # else every sound is the same
    return {
        "tokenizer": words,
        "text_encoder": transformers.T5GemmaEncoderModel(both),
        "transformer": network,
        "vae": vae,
        "duration_embedder": StableAudio3DurationEmbedder(output_dim=WIDTH, fourier_dim=16),
        "scheduler": flow(num_train_timesteps=1),
    }


def roberta() -> Any:
    """Tokenizer of CLAP."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    return transformers.RobertaTokenizer(
        vocab={**{token: i for i, token in enumerate(special)},
               **{token: i + 5 for token, i in byte_vocabulary().items()}},
        merges=[], model_max_length=77,
    )  # fmt: skip


def clap(words: Any) -> Any:
    """Encoder of texts and sounds into one space."""
    text = {"vocab_size": len(words), "hidden_size": 16, "intermediate_size": 32,
            "num_attention_heads": 2, "num_hidden_layers": 1, "projection_dim": 16,
            "pad_token_id": 1, "max_position_embeddings": 128}  # fmt: skip
    audio = {"spec_size": 8, "window_size": 4, "num_mel_bins": 8, "depths": [1, 1],
             "num_attention_heads": [1, 1], "num_hidden_layers": 1, "hidden_size": 192,
             "projection_dim": 16, "patch_size": 2, "patch_stride": 2,
             "patch_embed_input_channels": 4}  # fmt: skip
    config = transformers.ClapConfig(text_config=text, audio_config=audio, projection_dim=16)
    return transformers.ClapModel(config)


def spectrograms() -> dict[str, Any]:
    """Autoencoder of spectrograms of eight bands, and the vocoder that makes sound of them."""
    config = transformers.SpeechT5HifiGanConfig(
        model_in_dim=8, upsample_initial_channel=16, upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4], resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3, 5]], normalize_before=False,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(**{**tiny.vae_config(4), "in_channels": 1, "out_channels": 1})
    vocoder = transformers.SpeechT5HifiGan(config)
    randomised(vocoder)  # else silent
    return {
        "vae": vae,
        "vocoder": vocoder,
        "scheduler": diffusers.DDIMScheduler(**tiny.DDIM),
    }


def audio_ldm() -> dict[str, Any]:
    words = roberta()
    network = diffusers.UNet2DConditionModel(
        **{**tiny.unet_config(32), "cross_attention_dim": (16, 32)},  # those of its blocks
        class_embed_type="simple_projection", projection_class_embeddings_input_dim=16,
        class_embeddings_concat=True,
    )  # fmt: skip
    encoder = transformers.ClapTextModelWithProjection(clap(words).config.text_config)
    return {**spectrograms(), "tokenizer": words, "text_encoder": encoder, "unet": network}


def audio_ldm2() -> dict[str, Any]:
    words = roberta()
    network = diffusers.AudioLDM2UNet2DConditionModel(
        **{**tiny.unet_config(32), "cross_attention_dim": ((None, 16, WIDTH),) * 2}
    )
    config = transformers.GPT2Config(
        n_embd=16, n_head=1, n_layer=1, vocab_size=1000, n_positions=99, max_new_tokens=8
    )
    return {
        **spectrograms(),
        **t5(77, number="_2"),
        "unet": network,
        "language_model": transformers.GPT2LMHeadModel(config),
        "projection_model": modeling_audioldm2.AudioLDM2ProjectionModel(
            text_encoder_dim=16, text_encoder_1_dim=WIDTH, langauge_model_dim=16
        ),
        "text_encoder": clap(words),
        "tokenizer": words,
        "feature_extractor": transformers.ClapFeatureExtractor(),
    }


def dance() -> dict[str, Any]:
    network = diffusers.UNet1DModel(
        sample_size=128, sample_rate=64, block_out_channels=(32, 32, 32), extra_in_channels=64
    )
    return {"unet": network, "scheduler": diffusers.IPNDMScheduler()}


def ace_step() -> dict[str, Any]:
    words = qwen_tokenizer()
    heard = {**LAYERS, "audio_acoustic_hidden_dim": 8, "pool_window_size": 2,
             "num_attention_pooler_hidden_layers": 1}  # fmt: skip
    return {
        "tokenizer": words,
        "text_encoder": decoder("Qwen3", words),
        "transformer": diffusers.AceStepTransformer1DModel(
            **LAYERS, num_hidden_layers=2, in_channels=24, audio_acoustic_hidden_dim=8
        ),
        "condition_encoder": modeling_ace_step.AceStepConditionEncoder(
            **LAYERS, text_hidden_dim=WIDTH, timbre_hidden_dim=8,
            num_lyric_encoder_hidden_layers=1, num_timbre_encoder_hidden_layers=1,
        ),
        "audio_tokenizer": modeling_ace_step.AceStepAudioTokenizer(
            **heard, fsq_dim=16, fsq_input_levels=[4, 4, 4], fsq_input_num_quantizers=1
        ),
        "audio_token_detokenizer": modeling_ace_step.AceStepAudioTokenDetokenizer(**heard),
        "vae": oobleck(8),
        "scheduler": flow(num_train_timesteps=1),
    }  # fmt: skip


def longcat_audio() -> dict[str, Any]:
    network = diffusers.LongCatAudioDiTTransformer(
        dit_dim=32, dit_depth=1, dit_heads=2, dit_text_dim=WIDTH, latent_dim=8, text_conv=False
    )
    vae = diffusers.LongCatAudioDiTVae(
        channels=16, c_mults=[1, 2], strides=[2], latent_dim=8, encoder_latent_dim=16,
        downsampling_ratio=2,
    )  # fmt: skip
    return {**umt5(), "transformer": network, "vae": vae}


HEARD = {"duration": 1.0, "audio": drawn(1, 2, 16)}
TINY = {
    "StableAudioPipeline": Recipe(stable_audio, {"audio_end_in_s": 2.0}),
    "StableAudio3Pipeline": Recipe(stable_audio_3, {"duration": 1.0}),
    "StableAudio3AudioToAudioPipeline": Recipe(stable_audio_3, {**HEARD, "init_noise_level": 0.97}),
    "StableAudio3InpaintPipeline": Recipe(
        stable_audio_3, {**HEARD, "mask_start_seconds": 0.25, "mask_end_seconds": 0.5, "mask": ...}
    ),
    "AudioLDMPipeline": Recipe(audio_ldm, {"audio_length_in_s": 0.01}),
    "AudioLDM2Pipeline": Recipe(audio_ldm2, {"audio_length_in_s": 0.01}),
    "DanceDiffusionPipeline": Recipe(dance, {"audio_length_in_s": 1.0}),
    "AceStepPipeline": Recipe(ace_step, {"audio_duration": 0.4, "max_text_length": 32}),
    "LongCatAudioDiTPipeline": Recipe(longcat_audio, {"audio_duration_s": 0.1}),
}
