"""Prompt weights such as `(x:1.2)` in CLIP text encoders, by the library compel.

A token of weight w > 1 is moved away from the empty prompt, z = z_0 + w·(z − z_0); one of weight
w < 1 towards the prompt without it (https://github.com/damian0815/compel).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sampler.core.locks import exclusive
from sampler.core.prompt_weights import weighted

ENCODERS = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))


class PromptWeights:
    """Weighted text states of a Stable Diffusion or SDXL pipeline.

    Raises ValueError for a pipeline with other text encoders, and without compel.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.names = [pair for pair in ENCODERS if getattr(pipe, pair[1], None) is not None]
        kinds = {type(getattr(pipe, name)).__name__ for _, name in self.names}
        if not kinds or not kinds <= {"CLIPTextModel", "CLIPTextModelWithProjection"}:
            raise ValueError(
                f"prompt_weights needs CLIP text encoders, which {type(pipe).__name__} does not "
                "have; leave it out."
            )
        if importlib.util.find_spec("compel") is None:
            raise ValueError(
                "prompt_weights needs the extra 'weights' (pip install "
                "'diffusion-sampler[weights]')."
            )

    def plain(self, texts: Sequence[str]) -> list[str]:
        """Prompts without the marks of their weights."""
        return ["".join(piece for piece, _ in weighted(text)) for text in texts]

    def applied(self, states: Tensor, texts: Sequence[str]) -> Tensor:
        """States [B, T, D] of plain prompts with the weights of `texts`, where they have some."""
        states = states.clone()
        for row, text in enumerate(texts):
            pieces = weighted(text)
            if any(weight != 1 for _, weight in pieces):
                states[row] = self._states(pieces, states)
        return states

    def _states(self, pieces: list[tuple[str, float]], like: Tensor) -> Tensor:
        import torch
        from compel.embeddings_provider import EmbeddingsProvider, ReturnedEmbeddingsType

        kind = ReturnedEmbeddingsType.LAST_HIDDEN_STATES_NORMALIZED
        if "text_encoder_2" in self.pipe.components:  # SDXL
            kind = ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED
        found: list[Tensor] = []
        for tokenizer, encoder in self.names:
            parts = getattr(self.pipe, tokenizer), getattr(self.pipe, encoder)
            with exclusive(*parts):
                provider = EmbeddingsProvider(
                    *parts, returned_embeddings_type=kind, device=str(like.device)
                )
                found.append(
                    provider.get_embeddings_for_weighted_prompt_fragments(  # pyright: ignore
                        [[piece for piece, _ in pieces]],
                        [[weight for _, weight in pieces]],
                        device=str(like.device),
                    )
                )
        return torch.cat(found, dim=-1)[0].to(like)
