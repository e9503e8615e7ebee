"""`sampler replay`: regenerate an image from its record."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sampler.cli.options import Debug, Json, ModelOptions, Quiet, expanded, takes_model_options
from sampler.cli.report import Report

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sampler.config.model import ModelConfig
    from sampler.runs.encodings import Encoding
    from sampler.runs.folder import RunFolder


@takes_model_options(leave_out=("drop_encoders", "grid"))
def command(
    what: Annotated[str, typer.Argument(help="RUN#KEY (or RUN#NUMBER), or an image.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", callback=expanded, help="File to write.")
    ] = None,
    *,
    model: ModelOptions,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Regenerate an image; bit-identical from its run folder, which records its batch.

    Images of A1111, Forge and ComfyUI are regenerated with the sampler, grid and settings that they
    name, from other noise; --model names the model.
    """
    report = Report(as_json=as_json, quiet=quiet, debug=debug)
    with report.errors():
        from sampler.cli.open_run import open_run, split_key
        from sampler.core.durable import write_file
        from sampler.core.errors import UsageError
        from sampler.runs.encodings import encoding_of

        before = None
        where, key = split_key(what)
        if not key:
            image = Path(where)
            where, key = _home(image)
            before = image.read_bytes()
            suffix = image.suffix
        else:
            suffix = _suffix(open_run(where), key)
        path = out or Path(f"replay-{key[:10]}{suffix}")
        encoding = encoding_of(path)
        if path.exists():
            raise UsageError(f"{path} exists; name another file with -o.")
        if where:
            data, before = _from_run(where, key, model, encoding)
        elif not key:
            data = _from_foreign(before or b"", model, encoding, report)
        else:
            data = _from_image(before or b"", model, encoding)
        write_file(path, data)
        difference = _difference(data, before, path.suffix)
        report.event("replay", file=str(path), difference=difference)
        report.result(str(path))
        levels = {None: "unknown", 0: "no pixel differs"}.get(difference, f"{difference} levels")
        report.note(f"Compared with the original: {levels}.")


def _suffix(run: RunFolder, key: str) -> str:
    """Ending of the file of an image of a run; that of its format before it is generated."""
    from sampler.cli.open_run import index_of

    entry = run.results().entries.get(run.key(index_of(run, key)), {})
    return Path(entry["file"]).suffix if entry.get("file") else run.output.encoding.suffix


def _home(image: Path) -> tuple[str, str]:
    """(run folder, key) of an image inside its run; ("", key) of any other; ("", "") of one of
    another program."""
    from sampler.cli.open_run import open_run
    from sampler.core.errors import UsageError
    from sampler.runs.media import MP4, WAV
    from sampler.runs.metadata import foreign_metadata, read_metadata

    if not image.is_file():
        raise UsageError(f"{image}: no such file; RUN#KEY names an image of a run.")
    folders = [f for f in list(image.resolve().parents)[:3] if (f / "run.json").is_file()]
    if image.suffix in (MP4, WAV):
        for folder in folders:
            name = image.resolve().relative_to(folder).as_posix()
            for key, entry in open_run(str(folder)).results().entries.items():
                if entry.get("file") == name:
                    return str(folder), key
        raise UsageError(f"{image} is not in its run folder; name it as RUN#KEY.")
    data = image.read_bytes()
    if foreign_metadata(data) is not None:
        return "", ""
    key = str(read_metadata(data)["key"])
    for folder in folders:
        return str(folder), key
    return "", key


def _from_run(
    where: str, key: str, model: ModelOptions, encoding: Encoding
) -> tuple[bytes, bytes | None]:
    from sampler.cli.open_run import config_of, engine_of, index_of, open_run, with_model
    from sampler.workers.replay import from_run

    run: RunFolder = open_run(where)
    index = index_of(run, key)
    entry = run.results().entries.get(run.key(index), {})
    dtype = {"dtype": entry["dtype"]} if run.model.dtype == "auto" and "dtype" in entry else {}
    config = with_model(config_of(run), {**dtype, **model})
    encoding = replace(encoding, quality=run.output.quality, fps=run.output.fps)
    data = from_run(run, engine_of(run, config.model), index, encoding)
    return data, run.store.read(entry["file"]) if entry.get("file") else None


def _from_image(data: bytes, model: ModelOptions, encoding: Encoding) -> bytes:
    from sampler.cli.models import load_engine
    from sampler.runs.metadata import read_record
    from sampler.workers.replay import from_record

    body = read_record(data)
    config = recorded_model(body["record"]["model"], body.get("dtype", "auto"), model)
    return from_record(load_engine(config), body, encoding)


def _from_foreign(data: bytes, model: ModelOptions, encoding: Encoding, report: Report) -> bytes:
    from sampler.cli.models import load_engine, model_config
    from sampler.core.errors import UsageError
    from sampler.runs.fingerprint import model_of
    from sampler.runs.metadata import foreign_metadata
    from sampler.workers.foreign import from_foreign

    found = foreign_metadata(data)
    if found is None:
        raise UsageError("The image holds no record of its generation.")
    if "path" not in model:
        raise UsageError(f"The image is one of {found.program}; name its model with --model.")
    if found.unused:
        report.note(f"Ignored settings: {', '.join(found.unused)}.")
    config = model_config(model)
    return from_foreign(load_engine(config), model_of(config), found, encoding)


def recorded_model(recorded: Mapping[str, Any], dtype: str, given: ModelOptions) -> ModelConfig:
    """Options that load the model of a record: values from the record, files as given.

    recorded: `Model.identity`; dtype: that of the computation. Raises ModelError for files that are
    not given, or not the same.
    """
    from dataclasses import fields

    from sampler.cli.open_run import comparable
    from sampler.config.model import ModelConfig, flag_of
    from sampler.config.schema import validated
    from sampler.core.errors import ModelError
    from sampler.runs.fingerprint import model_of
    from sampler.runs.jobs import model_differences

    how, _, _ = recorded["fingerprint"].partition(":")
    if how == "tensors":
        raise ModelError("The image comes from a model in memory; generate it again from Python.")
    known = {f.name: f.metadata["identity"] for f in fields(ModelConfig)}
    for name in recorded:
        if known.get(name) == "files" and name not in given and name != "variant":
            raise ModelError(
                f"The image was generated with the option {name}; give its file or folder with "
                f"{flag_of(name)}{_weights(recorded, name)}."
            )
    if "variant" in recorded and "path" not in given:
        raise ModelError(
            f"The image was generated with the variant {recorded['variant']!r} of a model; give "
            "the model's folder with --model."
        )
    values = {k: v for k, v in recorded.items() if known.get(k) == "value" or k == "variant"}
    if values["dtype"] == "auto":
        values["dtype"] = dtype
    config = validated({"model": {**values, **given}}, {}).model
    found = comparable(model_of(config, how == "fast"), recorded)
    if different := model_differences(recorded, found):
        options = ", ".join(flag_of(name.removeprefix("model.")) if "." in name else "--model"
                            for name in different)  # fmt: skip
        raise ModelError(
            f"The image was generated with another model; different: {', '.join(different)}; name "
            f"the right one with {options}{_weights(recorded, *different)}."
        )
    return config


def _weights(recorded: Mapping[str, Any], *names: str) -> str:
    """The weights of a record's LoRAs or IP-Adapters, as a remark."""
    for kind in ("lora", "ip_adapter"):
        if any(name.endswith(kind) for name in names) and kind in recorded:
            weights = ", ".join(str(weight) for _, weight in recorded[kind])
            return f", in this order with the weights {weights}"
    return ""


def _difference(data: bytes, before: bytes | None, suffix: str) -> int | None:
    """Largest difference of a pixel in 8-bit levels; None if it is not known."""
    import numpy as np

    from sampler.runs.encodings import decode
    from sampler.runs.media import MP4, WAV

    if before is None or (suffix in (MP4, WAV) and data != before):
        return None
    if data == before:
        return 0
    new, old = decode(data)[0], decode(before)[0]
    if new.shape != old.shape:
        return 255
    return int(np.abs(new.astype(np.int16) - old).max())
