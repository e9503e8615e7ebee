"""Messages of a running run, and the limits on images that are read."""

import io
import json
import struct
import zlib

import pytest
from PIL import Image, PngImagePlugin

from sampler.cli.progress import PLAIN_SECONDS
from sampler.cli.report import Report
from sampler.core.errors import SamplerError
from sampler.runs import metadata, png


def lines(count, **changes):
    plain = {"index": 0, "status": "ok", "nfe": 30, "file": "images/a.png"}
    return [{**plain, **changes} for _ in range(count)]


def test_progress_is_one_plain_line_every_ten_seconds(capsys):
    """Done, total, failed, existed, images/s, evaluations per image, and what is left."""
    with Report(as_json=True).progress(100) as meter:
        tell = meter.lines("run")
        meter.skip(20)
        meter.started -= 10.0
        tell(lines(6))
        assert "of 100" not in capsys.readouterr().err, "ten seconds have not passed"
        meter.shown -= PLAIN_SECONDS
        failed = {"code": "exception", "where": "x", "message": "odd"}
        tell([*lines(3), *lines(1, status="error", error=failed)])
    out, err = capsys.readouterr()
    told = err.splitlines()
    assert told[0] == "sampler: image 0: exception: odd" and len(told) == 2
    assert told[1].startswith(
        "30 of 100 images, 20 existed, 1.00 images/s, 30.0 evaluations per image"
    )
    assert "1 failed" in told[1] and told[1].endswith("70 s left")
    events = [json.loads(line) for line in out.splitlines()]
    assert [event["t"] for event in events] == ["item"] * 4 + ["progress"]
    assert {k: events[-1][k] for k in ("v", "done", "failed", "skipped", "total")} == {
        "v": 1, "done": 9, "failed": 1, "skipped": 20, "total": 100}  # fmt: skip


DROPPED = {"status": "skipped", "error": {"code": "flagged", "where": "x", "message": "odd"}}
FAILED = {"status": "error", "error": {"code": "exception", "where": "x", "message": "odd"}}


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ([], "0 of 3 images, 0.00 images/s, 0 failed"),
        (lines(2, **FAILED), "2 of 3 images, 2.00 images/s, 2 failed, 0 s left"),
        (lines(3, **FAILED), "3 of 3 images, 3.00 images/s, 3 failed"),
        (lines(2, **DROPPED), "2 of 3 images, 2.00 images/s, 0 failed, 0 s left"),
        (lines(3), "3 of 3 images, 3.00 images/s, 30.0 evaluations per image, 0 failed"),
    ],
)
def test_a_progress_line_needs_no_image(capsys, monkeypatch, written, expected):
    """Nothing made yet (Ray actors report before their first batch), all failed, all dropped."""
    monkeypatch.setattr("sampler.cli.progress.time.monotonic", lambda: 100.0)
    with Report().progress(3) as meter:
        meter.started, meter.shown = 99.0, 90.0
        meter.lines("run")(written)
        line = capsys.readouterr().err.splitlines()[-1]
        assert line == expected
    assert capsys.readouterr().err == "", "the last line was up to date"


def test_the_last_progress_line_is_not_out_of_date(capsys):
    with Report().progress(4) as meter:
        meter.shown -= PLAIN_SECONDS
        meter.lines("run")(lines(2))
        meter.lines("run")(lines(2))
    told = capsys.readouterr().err.splitlines()
    assert [line.partition(" images")[0] for line in told] == ["2 of 4", "4 of 4"]
    assert "left" not in told[-1]
    with Report().progress(4) as meter:
        meter.lines("run")(lines(4))
    assert capsys.readouterr().err == "", "a short run has no progress line"


def test_quiet_drops_the_log_messages_of_libraries(capsys):
    import logging

    handler = logging.StreamHandler()
    logging.getLogger("somebody").addHandler(handler)
    for quiet, expected in ((True, "grave\n"), (False, "chatter\ngrave\n")):
        with Report(quiet=quiet).errors():
            logging.getLogger("somebody").warning("chatter")
            logging.getLogger("somebody").error("grave")
        assert capsys.readouterr().err == expected
    logging.getLogger("somebody").removeHandler(handler)


def test_quiet_tells_nothing_but_errors(capsys):
    report = Report(quiet=True)
    with report.progress(2) as meter:
        meter.shown -= PLAIN_SECONDS
        meter.lines("run")(lines(2))
    out, err = capsys.readouterr()
    assert out.split() == ["run/images/a.png"] * 2 and err == ""


def small(**info):
    texts = PngImagePlugin.PngInfo()
    for key, value in info.items():
        texts.add_itxt(key, value, zip=True)
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "PNG", pnginfo=texts)
    return buffer.getvalue()


def test_images_are_looked_at_before_they_are_decoded():
    """More than 64 megapixels by the header alone; other formats; texts that blow up."""
    header = struct.pack(">IIBBBBB", 8001, 8000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header
    bomb = png.SIGNATURE + chunk + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + small()[33:]
    with pytest.raises(SamplerError, match="64 megapixels"):
        png.decode(bomb)
    gif = io.BytesIO()
    Image.new("RGB", (2, 2)).save(gif, "GIF")
    with pytest.raises(SamplerError, match="not a readable image"):
        png.decode(gif.getvalue())
    assert png.decode(small(sampler="x"))[1] == {"sampler": "x"}
    large = small(sampler="x" * (png.MAX_TEXT + 1))
    assert len(large) < 10_000, "compressed"
    with pytest.raises(SamplerError):
        metadata.read_record(large)
