"""Tiny random pipelines of the newer families; see `tests/tiny.py`, whose parts these are made of.

Language models stand in for the larger ones of their kind: Qwen2 for the Qwen2.5-VL of QwenImage,
Qwen3 for the Mistral of Flux2. The VAE scale factor is 2, and 8 for Lumina 2 and HunyuanDiT, whose
pipelines take that as given.
"""

from __future__ import annotations

import inspect

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLWan,
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    KolorsPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImagePipeline,
    SanaPipeline,
    SanaTransformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    BatchEncoding,
    BertConfig,
    BertModel,
    BertTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2Config,
    Qwen2Model,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.tiny import (
    BETAS,
    DDIM,
    STATISTICS,
    TEXT_TIME,
    DDIMScheduler,
    flow_vae,
    qwen_transformer,
    qwen_vae,
    sd,
    seeded,
    t5,
    t5_tokenizer,
    unet_config,
    vae,
    vae_config,
)

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] if m['content'] is string else m['content'][0]['text'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STATIC = {"shift": 3.0}
DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}


def flow(**options):
    return FlowMatchEulerDiscreteScheduler(**options)


def qwen_tokenizer():
    letters = sorted(ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate([*letters, *special])}, merges=[]
    )
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.chat_template = CHAT
    return tokenizer


def gemma_tokenizer():
    letters = [chr(code) for code in range(32, 127)]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "\u2581", *letters, "\n"]
    return GemmaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])


def language(config, tokenizer, layers=3, heads=2):
    return config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
    )


def deep_vae(**options):
    """With 8 pixels per latent, for the pipelines that take that as given."""
    return AutoencoderKL(**vae_config(4, (8, 8, 8, 8)), **options)


@seeded
def qwen_image(scheduler=None, guidance_embeds=False):
    tokenizer = qwen_tokenizer()
    return QwenImagePipeline(
        scheduler=scheduler or flow(**DYNAMIC),
        vae=qwen_vae([1, 2], [False], **STATISTICS),
        text_encoder=Qwen2Model(language(Qwen2Config, tokenizer)),
        tokenizer=tokenizer,
        transformer=qwen_transformer(guidance_embeds=guidance_embeds),
    )


@seeded
def aura_flow(scheduler=None):
    tokenizer = t5_tokenizer(77)
    transformer = AuraFlowTransformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=256,
    )
    for block in transformer.joint_transformer_blocks:
        block.attn.add_v_proj.weight.data *= 300  # or texts are hardly seen
    return AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=t5(tokenizer, 32),
        vae=vae(4),
        transformer=transformer,
        scheduler=scheduler or flow(shift=1.73),
    )


@seeded
def sana(scheduler=None):
    tokenizer = gemma_tokenizer()
    # A token for each line of the instruction before a prompt, which is a thousand letters.
    arguments = inspect.signature(SanaPipeline.__call__).parameters
    tokenizer.add_tokens(arguments["complex_human_instruction"].default)
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=Gemma2Model(language(Gemma2Config, tokenizer)),
        vae=AutoencoderDC(
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            downsample_block_type="Conv",
            upsample_block_type="interpolate",
            scaling_factor=0.41407,
        ),
        transformer=SanaTransformer2DModel(
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=4,
            num_cross_attention_heads=2,
            cross_attention_head_dim=4,
            cross_attention_dim=8,
            caption_channels=16,
            sample_size=16,
        ),
        scheduler=scheduler or flow(**STATIC),
    )


@seeded
def lumina2(scheduler=None):
    tokenizer = gemma_tokenizer()
    return Lumina2Pipeline(
        tokenizer=tokenizer,
        text_encoder=Gemma2Model(language(Gemma2Config, tokenizer)),
        vae=deep_vae(scaling_factor=0.3611, shift_factor=0.1159),
        transformer=Lumina2Transformer2DModel(
            sample_size=4,
            patch_size=2,
            in_channels=4,
            hidden_size=24,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=3,
            num_kv_heads=1,
            multiple_of=2,
            axes_dim_rope=(4, 2, 2),
            axes_lens=(512, 64, 64),
            cap_feat_dim=16,
        ),
        scheduler=scheduler or flow(**DYNAMIC),
    )


@seeded
def z_image(scheduler=None):
    tokenizer = qwen_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[1024, 64, 64],
    )
    for pad in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(pad)  # left uninitialised by the class
    return ZImagePipeline(
        scheduler=scheduler or flow(**STATIC),
        vae=flow_vae(4),
        text_encoder=Qwen3Model(language(Qwen3Config, tokenizer)),
        tokenizer=tokenizer,
        transformer=transformer,
    )


@seeded
def hunyuan_dit(scheduler=None):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(code) for code in range(97, 123)]
    vocab = [*words, *letters, *("##" + letter for letter in letters)]
    tokenizer = BertTokenizer(vocab={token: i for i, token in enumerate(vocab)})
    tokenizer.model_max_length = 77
    tokenizer_2 = t5_tokenizer(256)
    return HunyuanDiTPipeline(
        vae=deep_vae(),
        text_encoder=BertModel(
            BertConfig(
                vocab_size=len(vocab),
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
            )
        ),
        tokenizer=tokenizer,
        text_encoder_2=t5(tokenizer_2, 32),
        tokenizer_2=tokenizer_2,
        transformer=HunyuanDiT2DModel(
            sample_size=4,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=3,
            hidden_size=24,
            in_channels=4,
            cross_attention_dim=32,
            cross_attention_dim_t5=32,
            pooled_projection_dim=16,
            text_len=77,
            text_len_t5=256,
            activation_fn="gelu-approximate",
        ),
        scheduler=scheduler or DDIMScheduler(**DDIM),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


class ChatGLMWords:
    """A tokenizer of bytes with the calls and the answers of ChatGLM's."""

    padding_side = "left"

    def __call__(self, texts, max_length=None, **_):
        texts = [texts] if isinstance(texts, str) else texts
        rows = [list(text.encode())[: max_length or None] for text in texts]
        width = max_length or max(map(len, rows))
        pads = [width - len(row) for row in rows]
        pairs = list(zip(rows, pads, strict=True))
        return BatchEncoding(
            {
                "input_ids": [[256] * pad + row for row, pad in pairs],
                "attention_mask": [[0] * pad + [1] * len(row) for row, pad in pairs],
                "position_ids": [[0] * pad + list(range(len(row))) for row, pad in pairs],
            },
            tensor_type="pt",
        )


@seeded
def kolors(scheduler=None):
    config = ChatGLMConfig(
        num_layers=2,
        padded_vocab_size=257,
        hidden_size=32,
        ffn_hidden_size=64,
        kv_channels=8,
        num_attention_heads=4,
        seq_length=256,
        multi_query_attention=True,
        multi_query_group_num=2,
        add_qkv_bias=True,
        original_rope=True,
        rmsnorm=True,
    )
    text_encoder = ChatGLMModel(config)
    for values in text_encoder.parameters():
        torch.nn.init.normal_(values, std=0.2)  # left uninitialised by the class
    return KolorsPipeline(
        vae=vae(4),
        text_encoder=text_encoder,
        tokenizer=ChatGLMWords(),
        unet=UNet2DConditionModel(**unet_config(32), **TEXT_TIME),
        scheduler=scheduler or DDIMScheduler(**DDIM),
    )


@seeded
def lcm(scheduler=None):
    """Stable Diffusion's parts around a UNet that takes the guidance scale as an input."""
    parts = sd(time_cond=8).components
    parts["scheduler"] = scheduler or LCMScheduler(**BETAS)
    return LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)


def pixel_unet(**options):
    return UNet2DModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
        **options,
    )


@seeded
def ddpm(scheduler=None):
    return DDPMPipeline(pixel_unet(), scheduler or DDPMScheduler())


@seeded
def ddim(scheduler=None):
    return DDIMPipeline(pixel_unet(), scheduler or DDIMScheduler())


@seeded
def consistency(scheduler=None, classes=10):
    unet = pixel_unet(num_class_embeds=classes)
    return ConsistencyModelPipeline(unet, scheduler or CMStochasticIterativeScheduler())


@seeded
def wan(scheduler=None, boundary=None):
    """`boundary`: two networks, `transformer` above that share of the time, the other below."""
    tokenizer = t5_tokenizer(64)
    options = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 32,
        "freq_dim": 32,
        "ffn_dim": 32,
        "num_layers": 1,
        "cross_attn_norm": True,
        "rope_max_seq_len": 32,
    }
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=t5(tokenizer, 32, UMT5Config, UMT5EncoderModel),
        vae=AutoencoderKLWan(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[True],
            **STATISTICS,
            scale_factor_temporal=2,
            scale_factor_spatial=2,
        ),
        scheduler=scheduler or flow(**STATIC),
        transformer=WanTransformer3DModel(**options),
        transformer_2=None if boundary is None else WanTransformer3DModel(**options),
        boundary_ratio=boundary,
    )


def _flux2_parts(scheduler, guidance_embeds):
    tokenizer = qwen_tokenizer()
    vae = AutoencoderKLFlux2(**vae_config(4, (8, 8)))
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 1.5)
    return {
        "scheduler": scheduler or flow(**DYNAMIC),
        "vae": vae,
        "text_encoder": Qwen3Model(language(Qwen3Config, tokenizer, layers=31, heads=1)),
        "tokenizer": tokenizer,
        "transformer": Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=48,
            timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=guidance_embeds,
        ),
    }


@seeded
def flux2(scheduler=None):
    return Flux2Pipeline(**_flux2_parts(scheduler, True))


@seeded
def klein(scheduler=None, is_distilled=False):
    return Flux2KleinPipeline(**_flux2_parts(scheduler, False), is_distilled=is_distilled)
