"""Labels of contact sheets in scripts that Pillow's own font lacks."""

import warnings

import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen

from sampler.runs import fonts
from sampler.runs.grid import Sheet, drawn
from sampler.runs.png import decode, encode


def make_font(path, characters):
    """A font with a box of another width for each character."""

    def glyph(width):
        pen = TTGlyphPen(None)
        pen.moveTo((0, 0))
        for point in ((0, 500), (width, 500), (width, 0)):
            pen.lineTo(point)
        pen.closePath()
        return pen.glyph()

    characters = "".join(dict.fromkeys(characters))
    names = [f"uni{ord(c):04X}" for c in characters]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", *names])
    builder.setupCharacterMap({ord(c): n for c, n in zip(characters, names, strict=True)})
    widths = {name: 300 + 150 * k for k, name in enumerate([".notdef", *names])}
    builder.setupGlyf({name: glyph(width) for name, width in widths.items()})
    builder.setupHorizontalMetrics({name: (width, 0) for name, width in widths.items()})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Test", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A system without fonts but those that the test puts into the folder."""
    folder = tmp_path / "share" / "fonts"
    folder.mkdir(parents=True)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "none"))
    monkeypatch.setenv("XDG_DATA_DIRS", str(tmp_path / "share"))
    return folder


def test_a_font_of_the_system_draws_what_pillows_lacks(system):
    text = "a fox 日本"
    make_font(system / "wqy-zenhei.ttc", "日本")
    make_font(system / "unifont.otf", text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        font = fonts.label_font(text, 14)
        assert font.path.endswith("unifont.otf") and fonts.missing(font, text) == ""
        plain = fonts.label_font("a fox", 14)
        assert getattr(plain, "path", None) != font.path, "ASCII stays in Pillow's font"


def test_a_missing_font_is_named(system):
    make_font(system / "unifont.otf", "a日")
    with pytest.warns(UserWarning, match="No font here has the characters 本; .* Noto Sans CJK"):
        font = fonts.label_font("a日本", 14)
    assert font.path.endswith("unifont.otf"), "the one that lacks the fewest"


def test_sheets_are_drawn_with_it(system):
    import numpy as np

    make_font(system / "unifont.otf", "日本seed=01 ")
    image = encode(np.zeros((64, 64, 3), np.uint8), {})
    cells = {(0, 0): image, (0, 1): image}
    texts = [
        decode(drawn(Sheet(title, [""], ["seed = 0", "seed = 1"], cells)))[0][:30]
        for title in ("日日日", "本本本")
    ]
    assert (texts[0] != texts[1]).any(), "both would be the same boxes"
