from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.errors import ConfigError
from training.data.dataset import LabeledPhoto, PseudoLabelDataset
from training.pseudo_labels.visualize import make_label_tile, plot_labels, save_figure


def write_labeled(folder: Path) -> LabeledPhoto:
    """A gray photo of 288 x 216: the left third a thing, the middle stuff, the right unlabeled."""
    Image.fromarray(np.full((216, 288, 3), 100, np.uint8)).save(folder / "gray.png")
    labels = np.zeros((216, 288, 3), np.uint8)
    labels[:, :96, 0] = 7
    labels[:, 96:192, 0] = 9
    Image.fromarray(labels).save(folder / "label.png")
    return LabeledPhoto(path=folder / "gray.png", digest="", label=folder / "label.png", categories={7: 1, 9: 5})


def test_things_are_strong_and_outlined_stuff_is_pale_and_unlabeled_pixels_are_dark(tmp_path: Path) -> None:
    tile = make_label_tile(write_labeled(tmp_path), thing_clusters=3)
    assert (tile.photo == 100).all()
    thing, stuff, void = (tile.overlay[100, column].astype(int) for column in (40, 140, 240))
    assert np.ptp(thing) > np.ptp(stuff) > 0
    assert void.tolist() == [30, 30, 30]
    assert tile.overlay[100, 96].tolist() == [250, 250, 250]
    assert tile.overlay[100, 192].tolist() == [30, 30, 30]
    assert (tile.name, tile.summary) == ("gray.png", "1 thing, 1 stuff, 33% unlabeled")


def test_a_cluster_has_the_same_color_in_every_segment(tmp_path: Path) -> None:
    first = write_labeled(tmp_path)
    other = LabeledPhoto(path=first.path, digest="", label=first.label, categories={7: 3, 9: 1})
    one, two = (make_label_tile(photo, thing_clusters=3) for photo in (first, other))
    assert one.overlay[100, 40].tolist() == two.overlay[100, 140].tolist()


def list_captions(dataset: PseudoLabelDataset, count: int, seed: int) -> list[str]:
    return [axis.get_title() for axis in plot_labels(dataset, count, seed).axes[::2]]


def test_the_seed_selects_the_photos(tiny_store: PseudoLabelDataset) -> None:
    assert list_captions(tiny_store, 4, 0) == list_captions(tiny_store, 4, 0) != list_captions(tiny_store, 4, 1)
    assert [each for each in list_captions(tiny_store, 9, 0) if each] == [f"{index}.png" for index in range(8)]


def test_the_suffix_gives_the_image_format(tmp_path: Path, tiny_store: PseudoLabelDataset) -> None:
    figure = plot_labels(tiny_store, 2, 0)
    save_figure(figure, tmp_path / "labels.jpg")
    with Image.open(tmp_path / "labels.jpg") as image:
        assert image.format == "JPEG"
        assert image.width > 2 * 288
    with pytest.raises(ConfigError, match="no known image format"):
        save_figure(figure, tmp_path / "labels.txt")
