"""`sampler doctor`: versions, devices, optional extras, free disk space."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sampler.cli.options import Debug, Json
from sampler.cli.report import Report

DISTRIBUTION = "diffusion-sampler"
Row = dict[str, Any]


def command(as_json: Json = False, debug: Debug = False) -> None:
    """Show versions, devices, optional extras and free disk space."""
    report = Report(as_json=as_json, debug=debug)
    with report.errors():
        rows = [*versions(), *devices(), disk(Path.cwd())]
        for row in rows:
            report.event("check", **row)
            mark = {True: "ok", False: "BAD", None: "-"}[row["ok"]]
            report.result(f"{mark:4}{row['name']:24}{row['value']}")
        if bad := [row["name"] for row in rows if row["ok"] is False]:
            report.note(f"sampler: requirements not met: {', '.join(bad)}.")


def versions() -> Iterator[Row]:
    """Installed and required version of Python and of every requirement.

    ok is None for an optional extra that is not installed.
    """
    import platform
    from importlib import metadata

    from packaging.requirements import Requirement

    yield _row("python", f"{platform.python_version()} on {platform.platform()}", True)
    yield _row(DISTRIBUTION, metadata.version(DISTRIBUTION), True)
    extras = set(metadata.metadata(DISTRIBUTION).get_all("Provides-Extra", [])) - {"dev", "docs"}
    for text in metadata.requires(DISTRIBUTION) or []:
        wanted = Requirement(text)
        extra = next((e for e in sorted(extras) if _applies(wanted, e)), None)
        if not _applies(wanted, "") and extra is None:
            continue
        optional = f" (extra {extra})" if not _applies(wanted, "") else ""
        try:
            found = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            ok = None if optional else False
            yield _row(wanted.name, f"not installed, requires {wanted.specifier}{optional}", ok)
            continue
        ok = wanted.specifier.contains(found, prereleases=True)
        yield _row(wanted.name, f"{found}, requires {wanted.specifier}{optional}", ok)


def devices() -> Iterator[Row]:
    """The CPU, the accelerators that torch finds, and the extras that need them."""
    import torch

    yield _row("cpu", f"{torch.get_num_threads()} threads", True)
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        yield _row(f"cuda:{index}", f"{properties.name}, {memory:.0f} GiB", True)
    if torch.backends.mps.is_available():
        yield _row("mps", "available", True)
    if not torch.cuda.device_count() and not torch.backends.mps.is_available():
        yield _row("accelerator", "none; the CPU is used", None)
    for name in ("triton", "xformers"):
        if importlib.util.find_spec(name) is None:
            yield _row(f"{name} kernels", "not installed", None)
        elif torch.cuda.device_count():
            yield _row(f"{name} kernels", "usable", True)
        else:
            yield _row(f"{name} kernels", "installed, but no device can run them", None)


def disk(folder: Path) -> Row:
    """Free disk space of a folder; not ok below 1 GiB."""
    import shutil

    free = shutil.disk_usage(folder).free
    return _row("free disk here", f"{free / 2**30:.1f} GiB", free >= 2**30)


def _applies(requirement: Any, extra: str) -> bool:
    marker = requirement.marker
    return marker is None or marker.evaluate({"extra": extra, "sys_platform": sys.platform})


def _row(name: str, value: str, ok: bool | None) -> Row:
    return {"name": name, "value": value, "ok": ok}
