"""Random draws of the language models of a stock pipeline (GLM-Image, rewritten prompts)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from sampler.stock.interception import Call, intercept


@contextmanager
def seeded_draws(pipe: Any, seeds: Sequence[int]) -> Iterator[None]:
    """Inside, language models of a pipeline draw by the seed of its one image.

    They draw from torch's own generator, so that the tokens of an image would depend on the others
    of its batch: several seeds raise ValueError where one draws.
    """

    def draw(call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if not kwargs.get("do_sample"):
            return call(*args, **kwargs)
        if len(seeds) > 1:
            raise ValueError("A language model of this pipeline draws by one random generator.")
        with torch.random.fork_rng():
            torch.manual_seed(seeds[0])
            return call(*args, **kwargs)

    with ExitStack() as stack:
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module) and callable(getattr(part, "generate", None)):
                stack.enter_context(intercept(part, draw, "generate"))
        yield
