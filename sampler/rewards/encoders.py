"""Encoders of the rewards, from local folders; the only module here that imports transformers.

Every model is loaded from safetensors, in eval mode, with frozen parameters. The Hub is contacted
only with `download`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sampler.core.errors import ModelError, first_line
from sampler.rewards.heads import ScoreHead, read_weights
from sampler.rewards.preprocess import (
    BILINEAR,
    MODES,
    Preprocessing,
    clip_pixels,
    preprocessing_from,
)


class Clip(nn.Module):
    """A CLIP model and its tokenizer: normalised embeddings of images and texts.

    prepare: images [B, 3, H, W] and a side to pixels; CLIP's own preprocessing by default.
    """

    def __init__(
        self,
        source: str,
        dtype: str,
        download: bool,
        prepare: Callable[[Tensor, int], Tensor] = clip_pixels,
    ) -> None:
        super().__init__()
        self.prepare = prepare
        from transformers import AutoTokenizer, CLIPModel

        self.model = pretrained(CLIPModel, source, download, getattr(torch, dtype))
        self.tokenizer: Any = pretrained(AutoTokenizer, source, download)
        self.eval().requires_grad_(False)

    def image(self, images: Tensor) -> Tensor:
        """Embed images [B, 3, H, W] in [0, 1] as unit vectors [B, D], float32; differentiable."""
        pixels = self.prepare(images.float(), self.model.config.vision_config.image_size)
        answer = self.model.get_image_features(pixel_values=pixels.to(self.model.dtype))
        return nn.functional.normalize(answer.pooler_output.float(), dim=1)

    @torch.no_grad()
    def text(self, prompts: Sequence[str]) -> Tensor:
        """Embed texts as unit vectors [B, D], float32, truncated to the model's length."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = _tokens(self.tokenizer, prompts, length).to(self.model.device)
        answer = self.model.get_text_features(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        )
        return nn.functional.normalize(answer.pooler_output.float(), dim=1)

    @property
    def temperature(self) -> float:
        """The factor exp(logit_scale)."""
        return float(self.model.logit_scale.float().exp())


class Blip(nn.Module):
    """BLIP's image-grounded text encoder under a score head, as ImageReward uses it."""

    LENGTH = 35  # text tokens

    def __init__(self, folder: str, dtype: str) -> None:
        super().__init__()
        from transformers import AutoTokenizer, BlipTextConfig, BlipVisionConfig
        from transformers.models.blip.modeling_blip import BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        weights = read_weights(folder, "model.safetensors", ("config.json", "tokenizer.json"))
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        text = BlipTextConfig(**config["text"])
        self.vision = BlipVisionModel(BlipVisionConfig(**config["vision"]))
        self.text = BlipTextModel(text, add_pooling_layer=False)
        self.mlp = ScoreHead(text.hidden_size)
        self.load_state_dict(weights)
        self.tokenizer: Any = pretrained(AutoTokenizer, folder, False)
        self.vision.to(getattr(torch, dtype))
        self.text.to(getattr(torch, dtype))
        self.eval().requires_grad_(False)

    def image(self, images: Tensor) -> Tensor:
        """Encode images [B, 3, H, W] in [0, 1] as states; differentiable."""
        size: Any = self.vision.config.image_size
        pixels = clip_pixels(images.float(), size).to(self.vision.dtype)
        return self.vision(pixel_values=pixels).last_hidden_state

    def forward(self, seen: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return raw scores [B], float32, of the states of images."""
        tokens = _tokens(self.tokenizer, prompts, self.LENGTH).to(seen.device)
        states = self.text(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], device=seen.device),
            is_decoder=False,
        ).last_hidden_state
        return self.mlp(states[:, 0].float())


class Vision(nn.Module):
    """A classifier or detector with its preprocessing; `kind` is a transformers auto class."""

    def __init__(self, kind: str, source: str, dtype: str, download: bool) -> None:
        super().__init__()
        import transformers

        self.model = pretrained(
            getattr(transformers, kind), source, download, getattr(torch, dtype)
        )
        self.prepare = _preprocessing(source, download)
        self.tokenizer: Any = None
        if kind == "AutoModelForZeroShotObjectDetection":
            self.tokenizer = pretrained(transformers.AutoTokenizer, source, download)
        self.eval().requires_grad_(False)

    @property
    def labels(self) -> dict[str, int]:
        """Class numbers by class name."""
        return {str(name): int(i) for i, name in self.model.config.id2label.items()}

    def logits(self, images: Tensor) -> Tensor:
        """Return logits [B, classes] or [B, queries, classes], float32."""
        pixels = self.prepare(images.float()).to(self.model.dtype)
        return self.model(pixel_values=pixels).logits.float()

    def detections(self, images: Tensor, names: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
        """Return (p [B, queries], boxes [B, queries, 4]) for each class of a detector.

        p: probability of the class, by softmax for detectors with a class "no object", else by
        sigmoid; a class is a phrase where the detector has a tokenizer. Boxes are x0, y0, x1, y1 as
        shares of the image. Raises KeyError for a class that the detector does not have.
        """
        pixels = self.prepare(images.float()).to(self.model.dtype)
        if self.tokenizer is not None:
            found = [self._answer(pixels, name) for name in names]
            pairs = [(answer.logits.float().amax(-1).sigmoid(), answer) for answer in found]
            return [(p, _corners(answer.pred_boxes)) for p, answer in pairs]
        answer, labels = self.model(pixel_values=pixels), self.labels
        logits, boxes = answer.logits.float(), _corners(answer.pred_boxes)
        has_none = logits.shape[-1] == len(labels) + 1
        p = logits.softmax(-1) if has_none else logits.sigmoid()
        return [(p[..., labels[name]], boxes) for name in names]

    def phrase_logits(self, images: Tensor, phrase: str) -> Tensor:
        """Return logits [B, queries] of an open-vocabulary detector for one phrase.

        Grounding DINO has a logit per token of a lower-case text that ends with a full stop; the
        largest one is used, as in its own post-processing.
        """
        pixels = self.prepare(images.float()).to(self.model.dtype)
        return self._answer(pixels, phrase).logits.float().amax(-1)

    def _answer(self, pixels: Tensor, phrase: str) -> Any:
        if "grounding" in self.model.config.model_type:
            phrase = f"{phrase.lower().strip(' .')}."
        tokens = self.tokenizer([phrase] * len(pixels), padding=True, return_tensors="pt")
        tokens = tokens.to(pixels.device)
        return self.model(
            pixel_values=pixels,
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
        )


def is_open(source: str) -> bool:
    """Return True for the folder of a detector that takes phrases instead of fixed classes."""
    import transformers

    config = pretrained(transformers.AutoConfig, source, False)
    return config.model_type in ("owlvit", "owlv2", "grounding-dino", "mm-grounding-dino")


def _corners(boxes: Tensor) -> Tensor:
    """Corners x0, y0, x1, y1 of boxes [..., 4] given by centre, width and height."""
    centre, half = boxes.float()[..., :2], boxes.float()[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def _tokens(tokenizer: Any, texts: Sequence[str], length: int) -> Any:
    """Tokenize texts as ids and attention mask [B, length], truncated."""
    return tokenizer(
        list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )


def _preprocessing(source: str, download: bool) -> Preprocessing:
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        config, _ = ImageProcessingMixin.get_image_processor_dict(
            source, local_files_only=not download
        )
    except (OSError, ValueError):
        raise ModelError(f"{source} lacks preprocessor_config.json.") from None
    factor = config.get("rescale_factor", 1 / 255)
    resample = config.get("resample", BILINEAR)
    if resample not in MODES or not config.get("do_rescale", True) or abs(factor * 255 - 1) > 1e-3:
        raise ModelError(
            f"{source}: preprocessor_config.json must rescale by 1/255 and resize with resample 2 "
            f"(bilinear) or 3 (bicubic), not resample = {resample}, rescale_factor = {factor}."
        )
    return preprocessing_from(config)


def pretrained(cls: Any, source: str, download: bool, dtype: Any = None) -> Any:
    """Call `from_pretrained` with a local folder, or a hub id with `download`; safetensors only.

    cls: a class, or the name of one of transformers.
    """
    if isinstance(cls, str):
        import transformers

        cls = getattr(transformers, cls)
    if not download and not Path(source).is_dir():
        raise ModelError(
            f"The folder {source!r} does not exist; give a folder in the transformers layout "
            "(config.json, model.safetensors, tokenizer files), or a hub id with download: true.",
        )
    options = {} if dtype is None else {"dtype": dtype, "use_safetensors": True}
    try:
        return cls.from_pretrained(source, local_files_only=not download, **options)
    except (OSError, ValueError, ImportError) as error:
        text = f"{source} failed to load as {cls.__name__}: {first_line(error)}"
        raise ModelError(text) from error
