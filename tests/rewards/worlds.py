"""Tiny random encoders in folders, and images to score."""

import numpy as np
import torch
from PIL import Image, ImageFilter
from transformers import (
    BertConfig,
    BertTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    DetrConfig,
    DetrForObjectDetection,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    SwinConfig,
    ViTConfig,
    ViTForImageClassification,
    YolosConfig,
    YolosForObjectDetection,
)

LETTERS = "!abcdefghijklmnopqrstuvwxyz "
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def clip_tokenizer():
    """Characters, with the end of text as the largest number, as open_clip has it."""
    letters = [c.replace(" ", "Ġ") for c in LETTERS]
    tokens = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={t: i for i, t in enumerate(tokens)}, merges=[], pad_token="!", model_max_length=12
    )


def bert_tokenizer():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "fox", "on", "a", "blue"]
    return BertTokenizer(vocab={w: i for i, w in enumerate(words)})


def clip_folder(path, image_size=32):
    """A CLIPModel with its tokenizer."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    words = len(tokenizer)
    config = CLIPConfig(
        projection_dim=24,
        text_config={
            **TOWER,
            "vocab_size": words,
            "max_position_embeddings": 12,
            "projection_dim": 24,
            "bos_token_id": words - 2,
            "eos_token_id": words - 1,
            "pad_token_id": 0,
        },
        vision_config={**TOWER, "image_size": image_size, "patch_size": 8, "projection_dim": 24},
    )
    CLIPModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def vision_folder(path, kind):
    """A classifier or detector with a preprocessor_config.json."""
    torch.manual_seed(0)
    labels = {
        "id2label": {0: "cat", 1: "dog", 2: "car"},
        "label2id": {"cat": 0, "dog": 1, "car": 2},
    }
    if kind == "vit":
        model = ViTForImageClassification(ViTConfig(**TOWER, image_size=32, patch_size=8, **labels))
    elif kind == "yolos":
        config = YolosConfig(
            **TOWER, image_size=[32, 32], patch_size=8, num_detection_tokens=5, **labels
        )
        model = YolosForObjectDetection(config)
    else:
        config = DetrConfig(d_model=32, num_queries=5, **labels)
        model = DetrForObjectDetection(config)
    model.save_pretrained(path)
    (path / "preprocessor_config.json").write_text(
        '{"size": {"height": 32, "width": 32}, "do_center_crop": false,'
        ' "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}'
    )
    return str(path)


def grounding_folder(path):
    """A tiny Grounding DINO with its tokenizer."""
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "a", "red", "dog", "cat"]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    backbone = SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4,
        out_features=["stage1", "stage2"],
    )  # fmt: skip
    text = BertConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=16, pad_token_id=0,
    )  # fmt: skip
    config = GroundingDinoConfig(
        backbone_config=backbone, text_config=text, d_model=32, num_queries=5, encoder_layers=1,
        encoder_ffn_dim=32, encoder_attention_heads=2, decoder_layers=2, decoder_ffn_dim=32,
        decoder_attention_heads=2, num_feature_levels=2, encoder_n_points=2, decoder_n_points=2,
        max_text_len=16, disable_custom_kernels=True,
    )  # fmt: skip
    GroundingDinoForObjectDetection(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "preprocessor_config.json").write_text(
        '{"size": {"shortest_edge": 32, "longest_edge": 40},'
        ' "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}'
    )
    return str(path)


def pictures(count=54, size=64):
    """Images [count, 3, size, size] of widely different JPEG sizes: noise, blurred more or less."""
    generator = np.random.default_rng(0)
    rows = []
    for i in range(count):
        noise = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
        if i % 3 == 1:  # flat patches
            noise = np.kron(noise[::16, ::16], np.ones((16, 16, 1), dtype=np.uint8))
        image = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(0.3 + 0.25 * (i // 3)))
        strength = 0.3 + 0.7 * generator.random()
        rows.append(0.5 + strength * (np.asarray(image) / 255 - 0.5))
    return torch.tensor(np.stack(rows), dtype=torch.float32).permute(0, 3, 1, 2).contiguous()
