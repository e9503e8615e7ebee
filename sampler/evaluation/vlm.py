"""Answers of a vision-language model to questions about an image, as probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from sampler.core.errors import ModelError
from sampler.rewards.encoders import pretrained


class VisionLanguage(nn.Module):
    """A model of text and image that generates text, such as Qwen2-VL, LLaVA or SmolVLM.

    source: a folder in the transformers layout with its processor. Without a chat template the text
    of a question is the processor's token of an image, and the question.
    """

    def __init__(self, source: str) -> None:
        super().__init__()
        self.model = pretrained("AutoModelForImageTextToText", source, False, "auto")
        self.processor: Any = pretrained("AutoProcessor", source, False)
        if getattr(self.processor, "tokenizer", None) is None:
            raise ModelError(f"{source} has no processor of texts and images.")
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def probabilities(self, image: Tensor, question: str, answers: Sequence[str]) -> list[float]:
        """Return the probability of each answer to a question about an image [3, H, W] in [0, 1].

        It is that of the next token, summed over the first tokens of the answer as it is written,
        in lower case and capitalised, each with and without a space; every token counts once.
        """
        pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        inputs = self.processor(
            text=[self._text(question)], images=[Image.fromarray(pixels)], return_tensors="pt"
        )
        inputs = {key: value.to(self.model.device) for key, value in inputs.items()}
        logits = self.model(**inputs).logits[0, -1].float()
        p = logits.softmax(-1)
        return [float(p[self._tokens(answer)].sum()) for answer in answers]

    def _text(self, question: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        chat = [{"role": "user", "content": content}]
        if getattr(self.processor, "chat_template", None):
            return self.processor.apply_chat_template(chat, add_generation_prompt=True)
        return f"{getattr(self.processor, 'image_token', '<image>')}\n{question}"

    def _tokens(self, answer: str) -> list[int]:
        """Ids of the first tokens of the ways to write an answer."""
        answer = answer.strip()
        tokenizer, found = self.processor.tokenizer, set[int]()
        for word in (answer, answer.lower(), answer.capitalize()):
            for text in (word, f" {word}"):
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                found |= set(ids[:1]) - set(tokenizer.all_special_ids)
        if not found:
            raise ModelError(f"The tokenizer of the model has no token for the answer {answer!r}.")
        return sorted(found)
