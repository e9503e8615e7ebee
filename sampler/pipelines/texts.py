"""Prompts of a pipeline: their encoding, weights, and the tokens of words."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from sampler.core.locks import exclusive
from sampler.pipelines.negative import TEXT
from sampler.pipelines.words import tokens_of
from sampler.types import Cond

if TYPE_CHECKING:
    from sampler.pipelines.prompt_weights import PromptWeights

TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3", "tokenizer_4")
P = TypeVar("P", bound="PromptTexts")


class PromptTexts:
    """Part of an adapter that reads prompts.

    takes_weights: True for families that can weigh words. text_tokens: tokenizers whose tokens are
    columns of the text states, and their first column. prompt_weights: reader of weights, None
    where prompts are taken as plain text.
    """

    pipe: Any
    takes_weights = False
    text_tokens: tuple[tuple[str, int], ...] = ()
    prompt_weights: PromptWeights | None = None

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """Call the pipeline's `encode_prompt`, one thread at a time.

        Tokenizers keep padding and truncation as state (tokenizers #537).
        """
        with exclusive(*(getattr(self.pipe, name, None) for name in TOKENIZERS)):
            return self.pipe.encode_prompt(*args, **kwargs)

    def with_prompt_weights(self: P) -> P:
        """Return the adapter that reads weights such as (x:1.2) in prompts.

        Raises ValueError for a family without CLIP text encoders, and without the library compel.
        """
        from sampler.pipelines.prompt_weights import PromptWeights

        if not self.takes_weights:
            raise ValueError(
                f"prompt_weights has no effect on {type(self.pipe).__name__}; leave it out."
            )
        twin = copy.copy(self)
        twin.prompt_weights = PromptWeights(self.pipe)
        return twin

    def plain(self, texts: Sequence[str]) -> list[str]:
        """Prompts as the text encoder takes them, without the marks of weights that are read."""
        return list(texts) if self.prompt_weights is None else self.prompt_weights.plain(texts)

    def reweighted(self, states: Tensor, texts: Sequence[str]) -> Tensor:
        """Text states [B, T, D] with the weights of the prompts, if these are read."""
        return states if self.prompt_weights is None else self.prompt_weights.applied(states, texts)

    def word_tokens(self, prompts: Sequence[str], word: str) -> list[list[int]]:
        """Columns of the text states that hold a word, for each prompt.

        All its occurrences, without regard to case. Raises ValueError for a prompt without it, and
        for a family whose text states are not the tokens of the prompt.
        """
        if not self.text_tokens:
            raise ValueError(
                f"{type(self.pipe).__name__}: the columns of its prompt's words are not known; "
                "word maps are for Stable Diffusion, SDXL, SD3 and Flux."
            )
        found: list[list[int]] = [[] for _ in prompts]
        for name, first in self.text_tokens:
            tokenizer = getattr(self.pipe, name)
            if tokenizer is None:
                continue
            with exclusive(tokenizer):
                for row, text in zip(found, self.plain(prompts), strict=True):
                    row += [first + at for at in tokens_of(tokenizer, text, word)]
        for row, text in zip(found, prompts, strict=True):
            if not row:
                raise ValueError(f"The word {word!r:.40} is not in the prompt {text!r:.60}.")
        return [sorted(set(row)) for row in found]

    def stock_texts(self, cond: Any) -> dict[str, Any]:
        """Text inputs of the network, by name, as the stock pipeline passes them."""
        return {name: value for name, value in cond.items() if TEXT.fullmatch(name)}

    def text_states(self, cond: Any, model: str) -> Tensor | None:
        """Text states [R, L, C] of a condition, as the attention takes them."""
        return cond.get("encoder_hidden_states")

    def with_guidance_scale(self, cond: Cond, scale: float) -> Cond:
        """Add the guidance scale to the conditions; ValueError where the network takes none."""
        raise ValueError(
            "This network does not take the guidance scale as an input; use guidance 'cfg'."
        )


def class_ids(prompts: Sequence[str], count: int, labels: Mapping[str, int]) -> list[int]:
    """Class numbers of prompts that name classes by number or by label.

    Raises ValueError for an unknown class.
    """
    found = []
    for prompt in prompts:
        number = int(prompt) if prompt.strip().isdecimal() else labels.get(prompt.strip(), -1)
        if not 0 <= number < count:
            raise ValueError(
                f"The prompt {prompt!r:.60} is not a class of this model; give a number in "
                f"0..{count - 1}{' or a label of the pipeline' if labels else ''}."
            )
        found.append(number)
    return found
