"""A pipeline from its files: a folder in the diffusers layout, or one safetensors file.

Single files, as checkpoints are often passed around, hold the weights of a whole pipeline in its
original layout, or those of the network alone. Configurations and tokenizers, and in the second
case the other parts, come from a folder of the same architecture.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from sampler.core.errors import ModelError, SamplerError, first_line
from sampler.models.folder import INDEX, read_json
from sampler.models.source import ModelSource

T = TypeVar("T")

# Log messages of the libraries at load that do not concern the model: logger, start of the text.
_CHATTER = (
    ("transformers.utils.import_utils", r"`\w+ImageProcessor` requires torchvision"),
    ("diffusers.pipelines.pipeline_utils", r"Expected types for vae: .*AutoencoderTiny"),
)
# Reports of weights that are not in the files and would stay random: logger, class, name.
_ABSENT = (
    ("transformers.modeling_utils", r"(\w+) LOAD REPORT", r"^(\S+)\s*\|\s*MISSING"),
    ("diffusers.models.modeling_utils", r"weights of (\w+) were not init", r"'([^']+)'"),
)
_COLOR = re.compile(r"\x1b\[[0-9;]*m")


def refuse_unknown(source: ModelSource) -> None:
    """Raise ModelError for a class that is not a pipeline class of the installed diffusers."""
    with quiet():
        import diffusers

        known = isinstance(getattr(diffusers, source.pipeline, None), type)
    if not known or not source.pipeline.endswith("Pipeline"):
        raise ModelError(
            f"{source.pipeline} is not a pipeline class of the installed diffusers, so "
            f"{source.folder} cannot be loaded."
        )


def read_pipeline(source: ModelSource, dtype: Any) -> Any:
    """The pipeline of a source on the CPU, its progress bar off.

    Raises ModelError for files that cannot be loaded, and for weights that a component needs and
    its files do not have: the libraries would initialise them at random.
    """
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    folder, options = source.folder, {"local_files_only": True}
    with quiet(), refuse_missing_weights(source.single or folder):
        parts: dict[str, Any] = {}
        if source.vae is not None:
            path = source.vae
            parts["vae"] = load_or_refuse(path, lambda: _vae(path, source, dtype))
        if source.single is not None:
            pipe = load_or_refuse(source.single, lambda: _single_file(source, dtype, parts))
        else:
            options |= {"use_safetensors": True, "variant": source.variant}
            options |= _absent(folder) | parts
            pipe = load_or_refuse(
                folder, lambda: DiffusionPipeline.from_pretrained(folder, dtype=dtype, **options)
            )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _absent(folder: Path) -> dict[str, None]:
    """Components that a pipeline was saved without, as arguments.

    diffusers asks for the required ones, such as the T5 encoder of an SD3, by name.
    """
    index = read_json(folder / INDEX)
    return {name: None for name, at in index.items() if at == [None, None]}


def _single_file(source: ModelSource, dtype: Any, parts: dict[str, Any]) -> Any:
    import diffusers

    folder, path = source.folder, str(source.single)
    options: dict[str, Any] = {"local_files_only": True, "torch_dtype": dtype}
    cls: Any = getattr(diffusers, source.pipeline)
    if not _reads_single_files(cls):
        raise ModelError(f"diffusers reads no single file of a pipeline like {folder}.")
    if source.whole:
        return cls.from_single_file(path, config=str(folder), **options, **parts)
    name = source.network
    network: Any = getattr(diffusers, source.parts[name][1])
    parts[name] = network.from_single_file(path, config=str(folder), subfolder=name, **options)
    parts = _absent(folder) | parts
    return cls.from_pretrained(folder, use_safetensors=True, **parts, **options)


def _reads_single_files(cls: type) -> bool:
    return hasattr(cls, "from_single_file")


def _vae(path: Path, source: ModelSource, dtype: Any) -> Any:
    """The VAE that stands in for the pipeline's own."""
    import diffusers
    from diffusers.models.auto_model import AutoModel

    options: dict[str, Any] = {"local_files_only": True, "torch_dtype": dtype}
    if path.is_dir():
        return AutoModel.from_pretrained(str(path), use_safetensors=True, **options)
    cls: Any = getattr(diffusers, source.parts["vae"][1])
    if not _reads_single_files(cls):
        raise ModelError(f"diffusers reads no single file of a {cls.__name__}; give a folder.")
    config = str(source.folder)
    return cls.from_single_file(str(path), config=config, subfolder="vae", **options)


def load_or_refuse(path: Path, read: Callable[[], T]) -> T:
    """The result of `read`; its errors but memory's become a ModelError that names the path."""
    try:
        return read()
    except (SamplerError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        raise ModelError(f"{path} cannot be loaded: {first_line(error)}") from error


@contextmanager
def refuse_missing_weights(path: Path) -> Iterator[None]:
    """Raise ModelError at the end if a component was loaded without some of its weights."""
    seen: list[str] = []
    watches = [
        (logger, logger.level, _MissingWeights(logger.getEffectiveLevel(), cls, key, seen))
        for logger, cls, key in ((logging.getLogger(name), *rest) for name, *rest in _ABSENT)
    ]
    for logger, _, watch in watches:
        logger.addFilter(watch)
        if logger.getEffectiveLevel() > logging.WARNING:  # whatever log level the libraries have
            logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level, watch in watches:
            logger.removeFilter(watch)
            logger.setLevel(level)
    if seen:
        raise ModelError(f"{path} is incomplete: {seen[0]}.")


class _MissingWeights(logging.Filter):
    """Takes reports of absent weights out of a log; `seen`: what they say."""

    def __init__(self, level: int, cls: str, key: str, seen: list[str]) -> None:
        super().__init__()
        self.level, self.seen = level, seen
        self.cls, self.key = re.compile(cls), re.compile(key, re.MULTILINE)

    def filter(self, record: logging.LogRecord) -> bool:
        text = _COLOR.sub("", record.getMessage())
        found, names = self.cls.search(text), self.key.findall(text)
        if not found or not names:
            return record.levelno >= self.level
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        self.seen.append(f"its {found[1]} lacks the weights {names[0]}{more}")
        return False


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress progress bars and irrelevant log messages of the libraries; warnings stay."""
    from diffusers.utils import logging as diffusers_bars
    from transformers.utils import logging as transformers_bars

    shown = [bars for bars in (diffusers_bars, transformers_bars) if bars.is_progress_bar_enabled()]
    drops = [(logging.getLogger(name), _MessageFilter(re.compile(text))) for name, text in _CHATTER]
    for logger, drop in drops:
        logger.addFilter(drop)
    for bars in shown:
        bars.disable_progress_bar()
    try:
        yield
    finally:
        for bars in shown:
            bars.enable_progress_bar()
        for logger, drop in drops:
            logger.removeFilter(drop)


class _MessageFilter(logging.Filter):
    """Drops the records whose message matches."""

    def __init__(self, pattern: re.Pattern[str]) -> None:
        super().__init__()
        self.pattern = pattern

    def filter(self, record: logging.LogRecord) -> bool:
        return not self.pattern.search(record.getMessage())
