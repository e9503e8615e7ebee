"""`sampler replay`: regenerate an image from its record."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sampler.cli.options import Debug, Device, Json, Lora, ModelPath, Quiet
from sampler.cli.report import Report

if TYPE_CHECKING:
    from sampler.runs.folder import RunFolder


def command(
    what: Annotated[str, typer.Argument(help="RUN#KEY (or RUN#NUMBER), or an image.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="File to write.")] = None,
    model: ModelPath = None,
    lora: Lora = None,
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Regenerate an image; bit-identical from its run folder, which records its batch."""
    report = Report(as_json=as_json, quiet=quiet, debug=debug)
    with report.errors():
        from sampler.core.durable import write_file
        from sampler.core.errors import UsageError

        where, mark, key = what.partition("#")
        if not mark:
            where, key = _home(Path(what))
        path = out or Path(f"replay-{(key or Path(what).stem)[:10]}.png")
        if path.exists():
            raise UsageError(f"{path} exists; name another file with -o.")
        before = None if mark else Path(what).read_bytes()
        if where:
            data, before = _from_run(where, key, device)
        else:
            data = _from_image(before or b"", model, tuple(lora or ()), device)
        write_file(path, data)
        difference = _difference(data, before)
        report.event("replay", file=str(path), difference=difference)
        report.result(str(path))
        levels = {None: "unknown", 0: "no pixel differs"}.get(difference, f"{difference} levels")
        report.note(f"Compared with the original: {levels}.")


def _home(image: Path) -> tuple[str, str]:
    """(run folder, key) of an image inside its run; ("", key) of any other."""
    from sampler.core.errors import UsageError
    from sampler.runs.metadata import read_metadata

    if not image.is_file():
        raise UsageError(f"{image}: no such file; RUN#KEY names an image of a run.")
    key = str(read_metadata(image.read_bytes())["key"])
    for folder in list(image.resolve().parents)[:3]:
        if (folder / "run.json").is_file():
            return str(folder), key
    return "", key


def _from_run(where: str, key: str, device: str | None) -> tuple[bytes, bytes | None]:
    from sampler.cli.open_run import config_of, engine_of, index_of, open_run
    from sampler.workers.replay import from_run

    run: RunFolder = open_run(where)
    index = index_of(run, key)
    data = from_run(run, engine_of(run, config_of(run), device), index)
    entry = run.results().entries.get(run.key(index), {})
    return data, run.store.read(entry["file"]) if entry.get("file") else None


def _from_image(data: bytes, model: str | None, lora: tuple[str, ...], device: str | None) -> bytes:
    from sampler.cli.models import load_engine
    from sampler.config.schema import ModelConfig
    from sampler.core.errors import ModelError
    from sampler.runs.fingerprint import LORA, STUDENT, model_of, with_lora
    from sampler.runs.metadata import read_record
    from sampler.workers.replay import from_record

    body = read_record(data)
    recorded = body["record"]["model"]
    how, _, _ = recorded["fingerprint"].partition(":")
    if how == "tensors":
        raise ModelError("The image comes from a model in memory; generate it again from Python.")
    if how.endswith(STUDENT):
        raise ModelError(
            "The image was generated with a student: replay it from its run folder, or generate it "
            "again with --student.",
        )
    if how.endswith(LORA) and not lora:
        raise ModelError(
            "The image was generated with LoRAs: give them, with their weights and in the same "
            "order, with --lora DIR[:WEIGHT].",
        )
    found = with_lora(model_of(model, None, recorded["dtype"], how.startswith("fast")), lora)
    if found.fingerprint != recorded["fingerprint"]:
        raise ModelError(
            "The image was generated with another model; name the right one with --model, "
            "and its LoRAs, if any, with --lora.",
        )
    config = ModelConfig(model, dtype=recorded["dtype"], device=device or "auto", lora=lora)
    return from_record(load_engine(config), body)


def _difference(data: bytes, before: bytes | None) -> int | None:
    """Largest difference of a pixel in 8-bit levels."""
    import numpy as np

    from sampler.runs.png import decode

    if before is None:
        return None
    new, old = decode(data)[0], decode(before)[0]
    if new.shape != old.shape:
        return 255
    return int(np.abs(new.astype(np.int16) - old).max())
