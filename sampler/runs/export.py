"""Export of a run: as a table (csv, parquet), or as shards of images and records (webdataset)."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path, PurePath
from typing import Any

from sampler.core import durable
from sampler.core.errors import UsageError
from sampler.runs.exported import cell_of, protected
from sampler.runs.folder import RunFolder
from sampler.runs.records import flat, images, records

SHARD = 1000  # images


def export_csv(run: RunFolder, path: Path) -> int:
    """Write one line per image, as a table that is a prompt file of the same images.

    A "'" protects text that a spreadsheet would run as a formula.
    """
    rows = [flat(record) for record in records(run)]
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, _columns(rows), restval="")
    writer.writeheader()
    for row in rows:
        cells = {key: cell_of(key, value) for key, value in row.items()}
        writer.writerow({protected(key): protected(value) for key, value in cells.items()})
    durable.write_file(path, buffer.getvalue().encode())
    return len(rows)


def export_parquet(run: RunFolder, path: Path) -> int:
    """Write one row per image; needs pyarrow (extra "data")."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise UsageError(
            "parquet needs the extra 'data' (pip install 'diffusion-sampler[data]')."
        ) from None
    rows = [flat(record) for record in records(run)]
    columns = {name: [row.get(name) for row in rows] for name in _columns(rows, safe=False)}
    buffer = io.BytesIO()
    table = pyarrow.table({name: _typed(pyarrow, values) for name, values in columns.items()})
    pyarrow.parquet.write_table(table, buffer)
    durable.write_file(path, buffer.getvalue())
    return len(rows)


def export_webdataset(run: RunFolder, folder: Path) -> int:
    """Write finished images to shards 000000.tar ... with .txt (prompt) and .json."""
    durable.make_folder(folder)
    count = shard = 0
    members: list[tuple[str, bytes]] = []
    for record, data in images(run):
        name = f"{record['index']:06d}"
        body = json.dumps(record, ensure_ascii=False).encode()
        suffix = PurePath(record["file"]).suffix
        members += [(f"{name}{suffix}", data), (f"{name}.txt", record["prompt"].encode()),
                    (f"{name}.json", body)]  # fmt: skip
        count += 1
        if count % SHARD == 0:
            durable.write_file(folder / f"{shard:06d}.tar", _tar(members))
            members, shard = [], shard + 1
    if members:
        durable.write_file(folder / f"{shard:06d}.tar", _tar(members))
    return count


def _columns(rows: list[dict[str, Any]], safe: bool = True) -> list[str]:
    """Columns in order of appearance."""
    found: dict[str, None] = {}
    for row in rows:
        found.update(dict.fromkeys(row))
    return [protected(name) if safe else name for name in found]


def _typed(pyarrow: Any, values: list[Any]) -> Any:
    """Column of a table; as text if its values have several types."""
    try:
        return pyarrow.array(values)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, OverflowError):
        return pyarrow.array([None if value is None else str(value) for value in values])


def _tar(members: list[tuple[str, bytes]]) -> bytes:
    """Tar archive without times and owners: equal runs give equal bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()
