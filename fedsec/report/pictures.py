"""grid.png: originals over reconstructions."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedsec import records

MOST_IMAGES = 16  # columns


def grid(
    path: str | Path,
    originals: Any,
    rows: Sequence[tuple[str, Any, Sequence[str]]],
) -> None:
    """Write grid.png: the originals, and below them a row of reconstructions for each defense.

    Images are arrays [n, c, h, w] or [n, h, w, c] in [0, 1]; each of `rows` is (title, images,
    captions), the control first, in the order of the originals. At most 16 columns. What stands
    where is kept in the file's text chunk, so that the page can show the images with real text.
    """
    from PIL import Image, ImageDraw, ImageFont
    from PIL.PngImagePlugin import PngInfo

    truth = _pixels(originals)
    count = min(len(truth), MOST_IMAGES)
    high, wide = truth.shape[1:3]
    scale = max(1, -(-96 // min(high, wide)))
    cell, tall, gap, line = wide * scale, high * scale, 10, 20
    font, small = ImageFont.load_default(size=15), ImageFont.load_default(size=14)
    parts = [("original", truth, ("",) * count), *((t, _pixels(i), c) for t, i, c in rows)]
    titles = [title.replace(" ", "\n") for title, _, _ in parts]
    left = 2 * gap + max(int(font.getlength(t)) for title in titles for t in title.split("\n"))
    note = "" if count == len(truth) else f"the first {count} of {len(truth)} images"
    heights = [tall + (line if any(c) else 4) + gap for _, _, c in parts]
    size = (left + count * (cell + gap), gap + sum(heights) + (line + gap if note else 0))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    places, at = [], gap
    for (title, images, captions), words, height in zip(parts, titles, heights, strict=True):
        draw.multiline_text((gap, at + tall / 2), words, "#1b1f24", font, anchor="lm")
        for i in range(count):
            picture = Image.fromarray(images[i]).resize((cell, tall), Image.Resampling.NEAREST)
            corner = left + i * (cell + gap)
            sheet.paste(picture, (corner, at))
            middle = (corner + cell / 2, at + tall + 3)
            draw.text(middle, captions[i], "#1b1f24", small, anchor="ma")
        places.append({"title": title, "y": at, "captions": list(captions[:count])})
        at += height
    if note:
        draw.text((left, at), note, "#59636e", small)
    kept = PngInfo()
    layout = {"x": left, "step": cell + gap, "size": [cell, tall], "true": [wide, high]}
    kept.add_text("fedsec", json.dumps(layout | {"rows": places, "count": count, "note": note}))
    with records.saving(Path(path)) as half:
        sheet.save(half, "PNG", pnginfo=kept)


def grid_cells(path: Path) -> dict[str, Any]:
    """The images of a grid.png one by one, as data URIs; the whole where it tells no places."""
    from PIL import Image

    with Image.open(path) as sheet:
        text = getattr(sheet, "text", {}).get("fedsec")
        if text is None:
            return {"whole": _uri(path.read_bytes()), "rows": [], "note": ""}
        layout = json.loads(text)
        wide, tall = layout["size"]

        def cut(row: dict, i: int) -> str:
            x, y = layout["x"] + i * layout["step"], row["y"]
            piece = sheet.crop((x, y, x + wide, y + tall))
            stream = io.BytesIO()
            piece.resize(layout["true"], Image.Resampling.NEAREST).save(stream, "PNG")
            return _uri(stream.getvalue())

        rows = [
            {
                "title": row["title"],
                "cells": [(cut(row, i), row["captions"][i]) for i in range(layout["count"])],
            }
            for row in layout["rows"]
        ]
    return {"whole": None, "rows": rows, "note": layout["note"]}


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _pixels(images: Any):
    """uint8 [n, h, w, 3]; what is not finite becomes mid-grey."""
    import numpy as np

    images = np.asarray(images, dtype=np.float64)
    assert images.ndim == 4, images.shape
    if images.shape[1] in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    images = np.nan_to_num(images, nan=0.5, posinf=1, neginf=0).clip(0, 1)
    return np.broadcast_to(np.rint(images * 255).astype(np.uint8), (*images.shape[:3], 3))
