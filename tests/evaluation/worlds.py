"""A tiny random model of text and image, and a detector, in folders."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

WORDS = ["<pad>", "<unk>", "<s>", "</s>", "<image>", "yes", "Yes", "no", "No", "two", "is", "there"]
WORDS += ["a", "dog", "cat", "red", "?", "in", "the", "image", "how", "many"]
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 2,
    "eos_token_id": 3,
}  # fmt: skip
VISION = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
}  # fmt: skip
CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}"
)


def llava_folder(path, seed=0, chat=CHAT):
    """A LLaVA with a vocabulary of words, its processor, and a chat template or none."""
    torch.manual_seed(seed)
    config = LlavaConfig(
        text_config={"model_type": "llama", **TEXT}, vision_config=VISION, image_token_index=4,
        vision_feature_layer=-1,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():  # so that answers depend on the image by more than rounding
        model.lm_head.weight.mul_(20)
        model.get_input_embeddings().weight.mul_(20)
    model.save_pretrained(path)
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    pixels = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    LlavaProcessor(
        pixels, tokenizer, patch_size=8, vision_feature_select_strategy="default",
        chat_template=chat, num_additional_image_tokens=1,
    ).save_pretrained(path)  # fmt: skip
    return str(path)
