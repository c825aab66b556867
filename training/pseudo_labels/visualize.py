"""Contact sheets: photos next to their pseudo-labels, or next to the predictions of an artifact."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Int32, UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from model.errors import ConfigError
from model.export.predictor import ArtifactPredictor
from model.files import atomic_write
from model.formats.image_files import segment_color
from model.images import read_image
from training.data.dataset import LabeledPhoto, PseudoLabelDataset, read_label_map

_TILE_HEIGHT_PX, _TILE_WIDTH_PX = 216, 288
_COLUMNS = 3
_DPI = 100
_LEGEND = "outlined: things; pale: stuff; dark: unlabeled; one color per cluster"
_VOID_BRIGHTNESS = 0.3
"""Brightness of unlabeled pixels relative to the photo."""
_THING_OPACITY, _STUFF_OPACITY = 0.6, 0.45
_OUTLINE_RGB = (250, 250, 250)


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A photo and the same photo under its label, both at the tile's size."""

    photo: UInt8[np.ndarray, "h w 3"]
    overlay: UInt8[np.ndarray, "h w 3"]
    name: str
    summary: str


def plot_labels(dataset: PseudoLabelDataset, count: int, seed: int) -> Figure:
    """Plot `count` random photos, or all if there are fewer, in the order of the dataset.

    Raises DatasetError if the dataset is unreadable.
    """
    photos, thing_clusters = dataset.read_photos(), dataset.read_config().thing_clusters
    chosen = np.sort(np.random.default_rng(seed).permutation(len(photos))[:count])
    title = f"{dataset.folder.resolve().name}: {len(chosen)} of {len(photos):,} photos"
    return _plot(title, [make_label_tile(photos[index], thing_clusters) for index in chosen])


def plot_predictions(
    title: str, photos: Iterable[tuple[Path, UInt8[np.ndarray, "H W 3"]]], predictor: ArtifactPredictor
) -> Figure:
    """Plot what an artifact predicts. Raises ConfigError if there is no photo."""
    tiles = []
    for path, image in photos:
        prediction = predictor.segment(image)
        categories = {segment.id: segment.cluster for segment in prediction.segments}
        label_map, things = prediction.label_map.astype(np.int32), predictor.contract.thing_clusters
        tiles.append(_make_tile(image, label_map, categories, things, path.name))
    if not tiles:
        raise ConfigError("there is no photo to plot")
    return _plot(f"{title}: {len(tiles)} photos", tiles)


def save_figure(figure: Figure, path: Path) -> None:
    """Write the figure in the format of the path's suffix. Raises ConfigError for a format that matplotlib lacks."""
    kind = path.suffix.removeprefix(".")
    if kind not in (known := FigureCanvasAgg.get_supported_filetypes()):
        raise ConfigError(f"{path.name} has no known image format: use one of {', '.join(sorted(known))}")
    with atomic_write(path) as sibling, sibling.open("wb") as stream:
        figure.savefig(stream, format=kind)


def make_label_tile(photo: LabeledPhoto, thing_clusters: int) -> Tile:
    """Draw a photo with its label: things strong and outlined, stuff pale, unlabeled pixels dark."""
    image, label_map = read_image(photo.path).image, read_label_map(photo.label)
    return _make_tile(image, label_map, photo.categories, thing_clusters, photo.path.name)


def _make_tile(
    image: UInt8[np.ndarray, "H W 3"],
    label_map: Int32[np.ndarray, "H W"],
    categories: dict[int, int],
    thing_clusters: int,
    name: str,
) -> Tile:
    scale = min(_TILE_HEIGHT_PX / image.shape[0], _TILE_WIDTH_PX / image.shape[1])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    small_map = cv2.resize(label_map, size, interpolation=cv2.INTER_NEAREST_EXACT)
    things = [segment for segment, category in categories.items() if category <= thing_clusters]
    colors = {segment: segment_color(category, segment in things) for segment, category in categories.items()}
    return Tile(
        photo=small,
        overlay=draw_overlay(small, small_map, colors, things),
        name=name,
        summary=_summarize(label_map, categories, thing_clusters),
    )


def draw_overlay(
    image: UInt8[np.ndarray, "H W 3"],
    label_map: Int32[np.ndarray, "H W"],
    colors: Mapping[int, tuple[int, int, int]],
    things: Collection[int],
) -> UInt8[np.ndarray, "H W 3"]:
    """Draw segments by their RGB color: things strong and outlined, stuff pale, all other pixels dark."""
    overlay = image * np.float32(_VOID_BRIGHTNESS)
    for segment, color in colors.items():
        opacity = _THING_OPACITY if segment in things else _STUFF_OPACITY
        inside = label_map == segment
        overlay[inside] = (1 - opacity) * image[inside] + opacity * np.array(color, np.float32)
    outlined = np.where(np.isin(label_map, list(things)), label_map, 0)
    padded = np.pad(outlined, ((1, 0), (1, 0)), mode="edge")
    overlay[(outlined != padded[1:, :-1]) | (outlined != padded[:-1, 1:])] = _OUTLINE_RGB
    return overlay.round().astype(np.uint8)


def _summarize(label_map: Int32[np.ndarray, "H W"], categories: dict[int, int], thing_clusters: int) -> str:
    things = sum(category <= thing_clusters for category in categories.values())
    void = f", {(label_map == 0).mean():.0%} unlabeled" if (label_map == 0).any() else ""
    return f"{things} thing{'s' * (things != 1)}, {len(categories) - things} stuff{void}"


def _plot(title: str, tiles: Sequence[Tile]) -> Figure:
    columns = min(_COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    size = (columns * 2.1 * _TILE_WIDTH_PX / _DPI, (rows * 1.2 * _TILE_HEIGHT_PX + 60) / _DPI)
    figure = Figure(figsize=size, dpi=_DPI, layout="compressed")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}\n{_LEGEND}", fontsize=11)
    axes = figure.subplots(rows, 2 * columns, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    for index, tile in enumerate(tiles):
        for axis, image, caption in zip(
            axes[2 * index :], (tile.photo, tile.overlay), (tile.name, tile.summary), strict=False
        ):
            axis.imshow(image)
            axis.set_title(_shorten(caption), fontsize=8)
    return figure


def _shorten(caption: str, length: int = 36) -> str:
    """Cut the middle out of a long caption."""
    half = length // 2
    return caption if len(caption) <= length else f"{caption[: half - 1]}…{caption[-half:]}"
