"""The sprite file is built from pictures laid out as in the public sources."""

import importlib.util
import zipfile

import numpy as np
import pytest
from PIL import Image, ImageDraw
from typer import Typer
from typer.testing import CliRunner

from scripts.bundled import prepare_emoji
from scripts.bundled.emoji_data import EmojiData

CONCEPTS = [
    {"name": "red apple", "category": "fruit", "codepoint": "1f34e"},
    {"name": "heart", "category": "object", "codepoint": "2764"},
]
SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">'
    '<rect x="8" y="4" width="16" height="24" fill="#ff0000"/></svg>'
)
HAS_CAIRO = importlib.util.find_spec("cairosvg") is not None


def disc(path, size, box, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGBA", (size, size))
    ImageDraw.Draw(picture).ellipse(box, fill=colour)
    picture.save(path)


@pytest.fixture
def sources(tmp_path):
    fluent, noto, blobmoji = (tmp_path / name for name in ("fluent", "noto", "blobmoji"))
    for code, joined in (("1f34e", "1f34e"), ("2764", "2764-fe0f")):
        disc(fluent / "assets" / f"{joined}_3d.png", 256, (40, 80, 200, 240), (250, 20, 20, 255))
        (fluent / "assets" / f"{joined}_flat.svg").write_text(SVG)
        disc(noto / "png/128" / f"emoji_u{code}.png", 128, (10, 30, 110, 90), (20, 250, 20, 255))
        disc(blobmoji / "png/128" / f"emoji_u{code}.png", 128, (4, 4, 124, 124), (0, 0, 255, 128))
    return fluent, noto, blobmoji


def test_the_concept_list_has_eight_classes_of_sixteen():
    rows = prepare_emoji.read_concepts()
    assert len(rows) == 128 == len({row["codepoint"] for row in rows})
    counts = np.unique([row["category"] for row in rows], return_counts=True)[1]
    assert counts.tolist() == [16] * 8


def test_a_sprite_is_cropped_squared_and_premultiplied():
    picture = Image.new("RGBA", (128, 128), (255, 255, 255, 0))
    ImageDraw.Draw(picture).rectangle((20, 50, 107, 93), fill=(200, 100, 0, 128))
    made = prepare_emoji.sprite(picture)
    assert made.shape == (72, 72, 4) and made.dtype == np.uint8
    # 88 x 44 pixels: full width, centred on half of the height, transparent above and below.
    assert np.allclose(made[36, :, 3], 128, atol=8)
    assert np.flatnonzero(made[:, 36, 3] > 64)[[0, -1]].tolist() == [18, 53]
    assert np.allclose(made[36, 36], [100, 50, 0, 128], atol=1)
    assert (made[..., :3] <= made[..., 3:]).all()
    # Invisible white must not leak into the padding.
    assert made[:12].max() == 0


def test_big_pictures_shrink_by_box_filter():
    fine = np.zeros((288, 288, 4), np.uint8)
    fine[..., 3] = 255
    fine[::2, :, :3] = 255
    assert np.abs(prepare_emoji.sprite(Image.fromarray(fine))[..., :3].astype(int) - 128).max() <= 1


def test_build_reads_all_four_styles(sources, tmp_path, monkeypatch):
    if not HAS_CAIRO:
        flat = Image.new("RGBA", (256, 256), (255, 0, 0, 255))
        monkeypatch.setattr(prepare_emoji, "read_svg", lambda path: flat)
    sprites = prepare_emoji.build(*sources, CONCEPTS)
    assert sprites.shape == (2, 4, 72, 72, 4)
    centre = sprites[0, :, 36, 36]
    assert np.allclose(centre[0], [250, 20, 20, 255], atol=1)
    assert np.allclose(centre[1], [255, 0, 0, 255], atol=1)
    assert np.allclose(centre[2], [20, 250, 20, 255], atol=1)
    assert np.allclose(centre[3], [0, 0, 128, 128], atol=1)
    prepare_emoji.save(tmp_path / "sprites.npz", sprites, CONCEPTS)
    data = EmojiData(tmp_path / "sprites.npz")
    assert data.concepts == ["red apple", "heart"]
    assert data.styles == ["glossy", "flat", "classic", "blob"]
    assert zipfile.ZipFile(tmp_path / "sprites.npz").testzip() is None


@pytest.mark.skipif(not HAS_CAIRO, reason="cairosvg is not installed")
def test_vector_art_is_rasterised_at_256(sources):
    picture = prepare_emoji.read_svg(sources[0] / "assets" / "1f34e_flat.svg")
    assert picture.size == (256, 256)
    assert picture.getpixel((128, 128)) == (255, 0, 0, 255)


@pytest.mark.skipif(HAS_CAIRO, reason="cairosvg is installed")
def test_without_cairosvg_the_error_names_it(sources):
    with pytest.raises(prepare_emoji.MissingSourceError, match="install the package cairosvg"):
        prepare_emoji.read_svg(sources[0] / "assets" / "1f34e_flat.svg")


def test_a_missing_picture_is_one_sentence_and_leaves_no_file(sources, tmp_path):
    (sources[1] / "png/128/emoji_u2764.png").unlink()
    concepts = tmp_path / "concepts.csv"
    concepts.write_text("name,category,codepoint\nheart,object,2764\n")
    app = Typer()
    app.command()(prepare_emoji.main)
    options = zip(("--fluent", "--noto", "--blobmoji"), map(str, sources), strict=True)
    out = tmp_path / "sprites.npz"
    arguments = [part for option in options for part in option]
    arguments += ["--concepts", str(concepts), "--out", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "emoji_u2764.png" in result.output and "Traceback" not in result.output
    assert list(tmp_path.glob("sprites*")) == []
