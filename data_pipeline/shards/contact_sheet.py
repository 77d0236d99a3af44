"""Random samples of a dataset on one picture, with their captions."""

import io
import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw

from data_pipeline.media.clips import read_clip
from data_pipeline.shards.dataset import Dataset
from data_pipeline.store import storage

NAME = "contact_sheet.png"
SAMPLES, COLUMNS = 24, 6
CELL = (180, 320)  # height and width of a picture
LINES, LINE_HEIGHT, LINE_CHARACTERS = 3, 12, 52


def write_contact_sheet(dataset: Dataset) -> None:
    """`contact_sheet.png` of random samples beside `dataset.json`; equal datasets give equal
    bytes."""
    buffer = io.BytesIO()
    sheet_of(dataset, dataset.draw(SAMPLES, seed=0)).save(buffer, "PNG")
    storage.write_atomic(storage.join(dataset.path, NAME), buffer.getvalue())


def sheet_of(dataset: Dataset, chosen: Sequence[tuple[int, int]]) -> Image.Image:
    """A grid of the first frames of samples by (shard, row), each above its caption."""
    height, width = _cell(dataset)
    columns = min(COLUMNS, len(chosen))
    rows = -(-len(chosen) // columns)
    step = height + LINES * LINE_HEIGHT + 6
    sheet = Image.new("RGB", (columns * (width + 4), rows * step), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (shard, row) in enumerate(chosen):
        record = dataset.read(shard, row)
        x, y = place % columns * (width + 4) + 2, place // columns * step + 2
        picture = read_clip(record.media, dataset.info.kind, (1, height, width)).clip[0]
        sheet.paste(Image.fromarray(picture), (x, y))
        lines = textwrap.wrap(record.caption, LINE_CHARACTERS * width // CELL[1])[:LINES]
        for line, text in enumerate(lines):
            draw.text((x, y + height + 1 + line * LINE_HEIGHT), text, fill="black")
    return sheet


def _cell(dataset: Dataset) -> tuple[int, int]:
    """(height, width) of a picture in the grid, with the shape of the clips where it is one."""
    if dataset.info.clip is None:
        return CELL
    _, height, width = dataset.info.clip
    scale = min(CELL[0] / height, CELL[1] / width)
    return max(1, round(height * scale)), max(1, round(width * scale))
