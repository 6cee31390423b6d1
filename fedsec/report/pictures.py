"""grid.png: originals over reconstructions, and what a report shows of many of them."""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedsec import records
from fedsec.records import Row, Run
from fedsec.report.numbers import CONTROL, Group, Scenario

MOST_IMAGES = 16  # columns of a grid
WIDEST = 128  # pixels of an image on the page: larger ones are made smaller
FIGURES = 24  # of a page
BYTES = 4 * 2**20  # of a page's images
PICKS = ("best", "median", "worst", "random")  # for the attacker
RULE = (
    "Of each setting, under the attack that is strongest against it: the images with the highest, "
    "the median and the lowest PSNR, and another one drawn at random (seed 0), of those whose "
    "reconstructions the runs kept."
)


def picks(psnr: Sequence[float]) -> list[int]:
    """Positions of the highest, the (lower) median and the lowest PSNR, and of another at random.

    As many as there are, each position once.
    """
    order = sorted(range(len(psnr)), key=lambda i: -psnr[i])
    if not order:
        return []
    chosen = list(dict.fromkeys((order[0], order[len(order) // 2], order[-1])))
    rest = [i for i in range(len(psnr)) if i not in chosen]
    return [*chosen, random.Random(0).choice(rest)] if rest else chosen


def columns(count: int, psnr: Sequence[Sequence[float | None]]) -> list[int]:
    """Which of `count` images a grid shows: each row's picks, and the first of the others."""
    kept: dict[int, None] = {}
    for row in psnr if count > MOST_IMAGES else ():
        known = [i for i, value in enumerate(row[:count]) if value is not None]
        kept |= dict.fromkeys(known[i] for i in picks([row[i] or 0.0 for i in known]))
    return sorted([*kept, *(i for i in range(count) if i not in kept)][:MOST_IMAGES])


def grid(
    path: str | Path,
    originals: Any,
    rows: Sequence[tuple[str, Any, Sequence[str]]],
    psnr: Sequence[Sequence[float | None]] = (),
) -> None:
    """Write grid.png: the originals, and below them a row of reconstructions for each defense.

    Images are arrays [n, c, h, w] or [n, h, w, c] in [0, 1]; each of `rows` is (title, images,
    captions), the control first, in the order of the originals. Of more than 16 images it shows
    `columns`, by the `psnr` of each defense. What stands where is kept in the file's text chunk, so
    that the page can show the images with real text.
    """
    from PIL import Image, ImageDraw, ImageFont
    from PIL.PngImagePlugin import PngInfo

    truth = _pixels(originals)
    shown = columns(len(truth), psnr)
    high, wide = truth.shape[1:3]
    scale = max(1, -(-96 // min(high, wide)))
    cell, tall, gap, line = wide * scale, high * scale, 10, 20
    font, small = ImageFont.load_default(size=15), ImageFont.load_default(size=14)
    parts = [("original", truth, ("",) * len(truth)), *((t, _pixels(i), c) for t, i, c in rows)]
    titles = [title.replace(" ", "\n") for title, _, _ in parts]
    left = 2 * gap + max(int(font.getlength(t)) for title in titles for t in title.split("\n"))
    note = "" if len(shown) == len(truth) else f"{len(shown)} of {len(truth)} images"
    heights = [tall + (line if any(c) else 4) + gap for _, _, c in parts]
    size = (left + len(shown) * (cell + gap), gap + sum(heights) + (line + gap if note else 0))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    places, at = [], gap
    for (title, images, captions), words, height in zip(parts, titles, heights, strict=True):
        draw.multiline_text((gap, at + tall / 2), words, "#1b1f24", font, anchor="lm")
        for column, i in enumerate(shown):
            picture = Image.fromarray(images[i]).resize((cell, tall), Image.Resampling.NEAREST)
            corner = left + column * (cell + gap)
            sheet.paste(picture, (corner, at))
            middle = (corner + cell / 2, at + tall + 3)
            draw.text(middle, captions[i], "#1b1f24", small, anchor="ma")
        places.append({"title": title, "y": at, "captions": [captions[i] for i in shown]})
        at += height
    if note:
        draw.text((left, at), note, "#59636e", small)
    kept = PngInfo()
    layout = {"x": left, "step": cell + gap, "size": [cell, tall], "true": [wide, high]}
    layout |= {"rows": places, "count": len(shown), "note": note, "shown": shown}
    kept.add_text("fedsec", json.dumps(layout))
    with records.saving(Path(path)) as half:
        sheet.save(half, "PNG", pnginfo=kept)


class Unreadable(Exception):
    """A grid.png that is damaged, or not fedsec's."""


@dataclass
class Sheet:
    """A grid.png, of which images can be cut out again as they were. Raises Unreadable."""

    path: Path

    def __post_init__(self):
        from PIL import Image

        try:
            with Image.open(self.path) as image:
                self.layout = json.loads(image.info["fedsec"])
            self.shown: list[int] = self.layout.get("shown", list(range(self.layout["count"])))
            self.titles = [row["title"] for row in self.layout["rows"]]
        except (OSError, SyntaxError, KeyError, ValueError, TypeError) as error:
            raise Unreadable(f"{self.path}: {type(error).__name__}") from None

    def title(self, defense: str) -> str | None:
        return next((t for t in self.titles if t in (defense, f"{defense} (control)")), None)

    def original(self, defense: str) -> str:
        own = f"original, {defense}"  # of a defense that drew other batches
        return own if own in self.titles else "original"

    def cut(self, title: str, position: int) -> str:
        """A data URI of the image of a row by its place among the run's images."""
        from PIL import Image

        wide, tall = self.layout["size"]
        x = self.layout["x"] + self.shown.index(position) * self.layout["step"]
        y = self.layout["rows"][self.titles.index(title)]["y"]
        true = self.layout["true"]
        piece = _decoded(self.path).crop((x, y, x + wide, y + tall))
        piece = piece.resize(true, Image.Resampling.NEAREST)
        if max(true) > WIDEST:
            piece.thumbnail((WIDEST, WIDEST), Image.Resampling.LANCZOS)
        stream = io.BytesIO()
        piece.save(stream, "PNG")
        return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


@lru_cache(maxsize=4)
def _decoded(path: Path):
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, SyntaxError, ValueError) as error:
        raise Unreadable(f"{path}: {type(error).__name__}") from None


@dataclass(frozen=True)
class Kept:
    """One reconstruction that a grid.png shows: the row that measured it, and where it stands."""

    row: Row
    plain: Row | None  # of the control, on the same image
    sheet: Sheet
    position: int


@dataclass(frozen=True)
class Figure:
    """The picks of one setting: titles of its rows, and for each pick its name and images."""

    heading: str
    titles: tuple[str, ...]
    cells: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]  # (source, caption) of each row
    of: int  # images among which they were picked


@dataclass
class Album:
    """The figures of a page, as many as it has room for, and what could not be shown."""

    figures: list[Figure]
    left_out: int  # settings for which there was no room
    damaged: list[str]


def album(found: Sequence[Scenario]) -> Album:
    """Of each setting the picks of its kept reconstructions, in the order of `found`."""
    pages, room = Album([], 0, []), BYTES
    sheets: dict[Path, Sheet | None] = {}
    for scenario in found:
        for name, group in zip(scenario.labels, scenario.groups, strict=True):
            if room <= 0 or len(pages.figures) >= FIGURES:
                pages.left_out += 1
                continue
            try:
                figure = _figure(scenario.heading, name, group, sheets, pages.damaged)
            except Unreadable as error:
                pages.damaged.append(str(error))
                continue
            if figure is not None:
                pages.figures.append(figure)
                room -= sum(len(s) for _, rows in figure.cells for s, _ in rows)
    return pages


def _figure(
    heading: str, name: str, group: Group, sheets: dict[Path, Sheet | None], damaged: list[str]
) -> Figure | None:
    each = (kept for run in group.runs for kept in _kept(run, group, sheets, damaged))
    # a sweep repeats its control in every cell
    kept = list({(k.row.seed, k.row.victim, k.row.image, k.row.psnr): k for k in each}.values())
    if not kept:
        return None
    chosen = [kept[i] for i in picks([k.row.psnr or 0.0 for k in kept])]
    paired = any(k.plain for k in chosen)
    cells = tuple(
        (f"{pick}: image {k.row.image}", tuple(_images(k, paired)))
        for pick, k in zip(_names(len(chosen)), chosen, strict=True)
    )
    titles = ("original", *(["none (control)"] if paired else []), name)
    said = f"{heading}: {name}" if heading else name
    return Figure(f"{said}, attacked by {group['attack']}", titles, cells, len(kept))


def _names(count: int) -> Sequence[str]:
    return {1: ("only",), 2: ("best", "worst")}.get(count, PICKS[:count])


def _images(kept: Kept, paired: bool) -> Iterator[tuple[str, str]]:
    """The original, the control's reconstruction where others have one, and the defense's."""
    sheet, at = kept.sheet, kept.position
    yield sheet.cut(sheet.original(kept.row.defense), at), ""
    if paired:
        plain = kept.plain and sheet.title(kept.plain.defense)
        yield (sheet.cut(plain, at), _decibel(kept.plain)) if plain else ("", "not attacked")
    yield sheet.cut(sheet.title(kept.row.defense) or "", at), _decibel(kept.row)


def _decibel(row: Row | None) -> str:
    return "" if row is None or row.psnr is None else f"{row.psnr:.1f} dB"


def _kept(
    run: Run, group: Group, sheets: dict[Path, Sheet | None], damaged: list[str]
) -> Iterator[Kept]:
    """The group's rows that the run's grid shows: n-th image = n-th row of the defense."""
    path = run.folder / records.GRID
    if path not in sheets:
        sheets[path] = None
        try:
            sheets[path] = Sheet(path) if path.exists() else None
        except Unreadable as error:
            damaged.append(str(error))
    sheet = sheets[path]
    if sheet is None or sheet.title(group["defense"]) is None:
        return
    own = [row for row in run.rows if row.defense == group["defense"]]
    plain = [row for row in run.rows if row.defense == CONTROL] if not group.control else []
    for n in sheet.shown:
        if n < len(own) and group.holds(own[n]):
            alike = n < len(plain) and plain[n].image == own[n].image
            yield Kept(own[n], plain[n] if alike else None, sheet, n)


def _pixels(images: Any):
    """uint8 [n, h, w, 3]; what is not finite becomes mid-grey."""
    import numpy as np

    images = np.asarray(images, dtype=np.float64)
    assert images.ndim == 4, images.shape
    if images.shape[1] in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    images = np.nan_to_num(images, nan=0.5, posinf=1, neginf=0).clip(0, 1)
    return np.broadcast_to(np.rint(images * 255).astype(np.uint8), (*images.shape[:3], 3))
