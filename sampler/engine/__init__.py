"""The engine over a pipeline: loading, prompts to images, restoration, a look inside a model."""

from sampler.engine.engine import Engine

__all__ = ["Engine"]
