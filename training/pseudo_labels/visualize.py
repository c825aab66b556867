"""Some photos beside their panoptic labels, or beside what an artifact answers, on one picture."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image, ImageDraw, ImageFont

from model.errors import ConfigError
from model.export.predictor import ArtifactPredictor, SampledPhoto
from model.files import atomic_write
from model.formats.encoders import segment_color
from model.images import read_image
from training.data.dataset import LabeledPhoto, PseudoLabelDataset, read_label_map

_TILE_HEIGHT_PX, _TILE_WIDTH_PX = 216, 288
_COLUMNS = 3
_GAP_PX, _INNER_GAP_PX, _CAPTION_PX, _HEADING_PX = 24, 4, 30, 32
_TEXT_PX, _TITLE_PX = 13, 18
_JPEG_QUALITY = 90
_PAPER_RGB, _TEXT_RGB, _FAINT_RGB, _LINE_RGB = (255, 255, 255), (40, 40, 40), (130, 130, 130), (250, 250, 250)
_LEGEND = "outlined: things; pale: stuff; dark: no label; a colour is a cluster"
_VOID_SHADE = 0.3
"""Of the photo's brightness where there is no label."""
_THING_STRENGTH, _STUFF_STRENGTH = 0.6, 0.45


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A photo and the same photo under its label, both in the tile's size."""

    photo: UInt8[np.ndarray, "h w 3"]
    label: UInt8[np.ndarray, "h w 3"]
    name: str
    summary: str


def plot_dataset(store: PseudoLabelDataset, count: int, seed: int) -> Image.Image:
    """`count` photos drawn at random, or all there are, in the store's order.

    A colour is a cluster, the same on the whole sheet.
    Raises ConfigError if the seed is negative, and what reading the store raises.
    """
    if seed < 0:
        raise ConfigError(f"seed must be 0 or more, got {seed}")
    photos, thing_clusters = store.read_photos(), store.read_config().thing_clusters
    chosen = np.sort(np.random.default_rng(seed).permutation(len(photos))[:count])
    title = f"{store.folder.resolve().name}: {len(chosen)} of {len(photos):,} photos"
    return _lay_out(title, [make_tile(photos[index], thing_clusters) for index in chosen])


def plot_predictions(title: str, photos: Iterable[SampledPhoto], segmenter: ArtifactPredictor) -> Image.Image:
    """The same for what an artifact answers, by the same colours. Raises ConfigError if there is no photo."""
    pairs = [_draw_answer(photo, segmenter) for photo in photos]
    if not pairs:
        raise ConfigError("no photo to draw")
    return _lay_out(f"{title}: {len(pairs)} photos", pairs)


def save_jpeg(sheet: Image.Image, path: Path) -> None:
    """A JPEG."""
    with atomic_write(path) as sibling, sibling.open("wb") as stream:
        sheet.save(stream, "JPEG", quality=_JPEG_QUALITY)


def make_tile(photo: LabeledPhoto, thing_clusters: int) -> Tile:
    """The photo beside its label: things strong and outlined, stuff pale, void dark."""
    return _draw(
        read_image(photo.path).image, read_label_map(photo.label), photo.categories, thing_clusters, photo.path
    )


def _draw_answer(photo: SampledPhoto, segmenter: ArtifactPredictor) -> Tile:
    answer = segmenter.segment(photo.image)
    categories = {segment.id: segment.cluster for segment in answer.segments}
    things = segmenter.contract.thing_clusters
    return _draw(photo.image, answer.label_map.astype(np.int32), categories, things, photo.path)


def _draw(
    image: UInt8[np.ndarray, "H W 3"],
    labels: Int32[np.ndarray, "H W"],
    categories: dict[int, int],
    thing_clusters: int,
    path: Path,
) -> Tile:
    scale = min(_TILE_HEIGHT_PX / image.shape[0], _TILE_WIDTH_PX / image.shape[1])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    shrunk = cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST_EXACT)
    return Tile(
        photo=small,
        label=_paint(small, shrunk, categories, thing_clusters),
        name=path.name,
        summary=_summarise(labels, categories, thing_clusters),
    )


def _paint(
    image: UInt8[np.ndarray, "h w 3"], labels: Int32[np.ndarray, "h w"], categories: dict[int, int], thing_clusters: int
) -> UInt8[np.ndarray, "h w 3"]:
    painted = image * np.float32(_VOID_SHADE)
    for segment, category in categories.items():
        is_thing = category <= thing_clusters
        strength = _THING_STRENGTH if is_thing else _STUFF_STRENGTH
        inside = labels == segment
        colour = np.array(segment_color(category, is_thing), np.float32)
        painted[inside] = (1 - strength) * image[inside] + strength * colour
    things = np.where(np.isin(labels, [each for each, c in categories.items() if c <= thing_clusters]), labels, 0)
    borders = np.zeros(labels.shape, bool)
    borders[:, 1:] |= things[:, 1:] != things[:, :-1]
    borders[1:] |= things[1:] != things[:-1]
    painted[borders] = _LINE_RGB
    return painted.round().astype(np.uint8)


def _summarise(labels: Int32[np.ndarray, "H W"], categories: dict[int, int], thing_clusters: int) -> str:
    things = sum(category <= thing_clusters for category in categories.values())
    void = f", {(labels == 0).mean():.0%} void" if (labels == 0).any() else ""
    return f"{things} thing{'s' * (things != 1)}, {len(categories) - things} stuff{void}"


def _lay_out(title: str, pairs: Sequence[Tile]) -> Image.Image:
    columns = min(_COLUMNS, len(pairs))
    cell_width = 2 * _TILE_WIDTH_PX + _INNER_GAP_PX + _GAP_PX
    cell_height = _TILE_HEIGHT_PX + _CAPTION_PX + _GAP_PX
    rows = -(-len(pairs) // columns)
    sheet = Image.new("RGB", (columns * cell_width + _GAP_PX, _HEADING_PX + rows * cell_height + _GAP_PX), _PAPER_RGB)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(_TEXT_PX)
    pen.text((_GAP_PX, _GAP_PX // 2), title, fill=_TEXT_RGB, font=ImageFont.load_default(_TITLE_PX))
    pen.text((_GAP_PX, _GAP_PX // 2 + 24), _LEGEND, fill=_FAINT_RGB, font=font)
    for place, pair in enumerate(pairs):
        row, column = divmod(place, columns)
        left, top = _GAP_PX + column * cell_width, _GAP_PX + _HEADING_PX + row * cell_height
        height, width = pair.photo.shape[:2]
        middle, bottom = left + _TILE_WIDTH_PX, top + _TILE_HEIGHT_PX
        sheet.paste(Image.fromarray(pair.photo), (middle - width, bottom - height))
        sheet.paste(Image.fromarray(pair.label), (middle + _INNER_GAP_PX, bottom - height))
        pen.text((middle - width, bottom + 6), _shorten(pair.name, width, font), fill=_TEXT_RGB, font=font)
        pen.text((middle + _INNER_GAP_PX, bottom + 6), pair.summary, fill=_FAINT_RGB, font=font)
    return sheet


def _shorten(name: str, width_px: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """The name, its middle left out as far as it must be."""
    kept = len(name)
    shown = name
    while kept > 4 and font.getlength(shown) > width_px:
        kept -= 1
        shown = f"{name[: kept // 2]}…{name[-(kept - kept // 2) :]}"
    return shown
