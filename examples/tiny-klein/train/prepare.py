"""Make the data set: colour emoji as pictures, with their English names as prompts.

Reads the bitmaps of the Noto Color Emoji font (SIL OFL 1.1; Debian package
fonts-noto-color-emoji) and the short names and keywords of the Unicode CLDR (Unicode-DFS-2016;
Debian package unicode-cldr-core). Writes `data/atlas.png`, 128x128 RGBA tiles in rows, and
`data/emoji.json`. Skin-tone variants and pictures that occur twice are left out.
"""

from __future__ import annotations

import argparse
import io
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from common import DEFAULT_WORK, IMAGE_SIZE, Emoji
from fontTools.ttLib import TTFont
from PIL import Image

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
CLDR = Path("/usr/share/unicode/cldr/common")
ANNOTATIONS = ("annotations/en.xml", "annotationsDerived/en.xml")
SKIN_TONES = {chr(c) for c in range(0x1F3FB, 0x1F400)}
COLUMNS = 40


class EmojiFont:
    """Colour bitmaps of a CBDT font, looked up by character sequence."""

    def __init__(self, path: Path) -> None:
        font = TTFont(path)
        self.characters = font.getBestCmap()
        self.bitmaps = font["CBDT"].strikeData[0]
        self.ligatures: dict[tuple[str, ...], str] = {}
        for lookup in font["GSUB"].table.LookupList.Lookup:
            if lookup.LookupType == 4:
                self._add(lookup.SubTable)

    def _add(self, tables: list) -> None:
        for table in tables:
            for first, ligatures in table.ligatures.items():
                for ligature in ligatures:
                    self.ligatures.setdefault((first, *ligature.Component), ligature.LigGlyph)

    def picture(self, sequence: str) -> Image.Image | None:
        """The bitmap of a sequence, or None where the font has no single glyph for it."""
        glyphs = tuple(self.characters.get(ord(c), "") for c in sequence if c != "\ufe0f")
        glyph = glyphs[0] if len(glyphs) == 1 else self.ligatures.get(glyphs)
        bitmap = self.bitmaps.get(glyph) if glyph else None
        return Image.open(io.BytesIO(bitmap.imageData)).convert("RGBA") if bitmap else None


def annotations(root: Path) -> Iterator[Emoji]:
    """Every annotated sequence of the CLDR with its name and keywords, in file order."""
    for file in ANNOTATIONS:
        keywords: dict[str, tuple[str, ...]] = {}
        for node in ElementTree.parse(root / file).getroot().iter("annotation"):
            sequence, text = node.attrib["cp"], node.text or ""
            if node.attrib.get("type") == "tts":
                yield Emoji(text.lower(), keywords.get(sequence, ()), sequence)
            else:
                keywords[sequence] = tuple(k.strip().lower() for k in text.split("|"))


def to_tile(picture: Image.Image) -> Image.Image:
    """Fit a 136x128 bitmap into a square tile, colour premultiplied while it is resized."""
    side = max(picture.size)
    square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    tile = square.convert("RGBa").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
    return tile.convert("RGBA")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK)
    parser.add_argument("--font", type=Path, default=FONT)
    parser.add_argument("--cldr", type=Path, default=CLDR)
    arguments = parser.parse_args()

    font = EmojiFont(arguments.font)
    chosen: list[Emoji] = []
    tiles: list[Image.Image] = []
    pictures_seen: set[bytes] = set()
    names_seen: set[str] = set()
    for emoji in annotations(arguments.cldr):
        picture = font.picture(emoji.sequence)
        toned = bool(SKIN_TONES & set(emoji.sequence))
        if picture is None or toned or emoji.name in names_seen or picture.getextrema()[3][1] == 0:
            continue
        tile = to_tile(picture)
        if tile.tobytes() in pictures_seen:
            continue
        pictures_seen.add(tile.tobytes())
        names_seen.add(emoji.name)
        chosen.append(emoji)
        tiles.append(tile)

    rows = -(-len(tiles) // COLUMNS)
    atlas = Image.new("RGBA", (COLUMNS * IMAGE_SIZE, rows * IMAGE_SIZE), (0, 0, 0, 0))
    for i, tile in enumerate(tiles):
        atlas.paste(tile, ((i % COLUMNS) * IMAGE_SIZE, (i // COLUMNS) * IMAGE_SIZE))
    folder = arguments.work / "data"
    folder.mkdir(parents=True, exist_ok=True)
    atlas.save(folder / "atlas.png", optimize=True)
    facts = [{"name": e.name, "keywords": e.keywords, "sequence": e.sequence} for e in chosen]
    (folder / "emoji.json").write_text(json.dumps({"emoji": facts}, ensure_ascii=False, indent=1), encoding="utf-8")
    filled = np.asarray(atlas)[..., 3].mean() / 255
    print(f"{len(chosen)} pictures, {filled:.0%} of the area opaque, in {folder}")


if __name__ == "__main__":
    main()
