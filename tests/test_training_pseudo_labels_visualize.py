from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.errors import ConfigError
from training.data.dataset import LabeledPhoto, PseudoLabelDataset
from training.pseudo_labels.visualize import make_tile, plot_dataset, save_jpeg


def write_labelled(folder: Path) -> LabeledPhoto:
    """A grey photo of 288 x 216: the left third a thing, the middle stuff, the right void."""
    Image.fromarray(np.full((216, 288, 3), 100, np.uint8)).save(folder / "grey.png")
    labels = np.zeros((216, 288, 3), np.uint8)
    labels[:, :96, 0] = 7
    labels[:, 96:192, 0] = 9
    Image.fromarray(labels).save(folder / "label.png")
    return LabeledPhoto(path=folder / "grey.png", digest="", label=folder / "label.png", categories={7: 1, 9: 5})


def test_things_are_coloured_more_strongly_than_stuff_and_void_is_dark(tmp_path: Path) -> None:
    pair = make_tile(write_labelled(tmp_path), thing_clusters=3)
    assert (pair.photo == 100).all()
    thing, stuff, void = (pair.label[100, column].astype(int) for column in (40, 140, 240))
    assert np.ptp(thing) > np.ptp(stuff) > 0
    assert void.tolist() == [30, 30, 30]
    assert pair.label[100, 96].tolist() == [250, 250, 250]
    assert pair.label[100, 192].tolist() == [30, 30, 30]
    assert (pair.name, pair.summary) == ("grey.png", "1 thing, 1 stuff, 33% void")


def test_a_cluster_keeps_its_colour_whatever_its_segment_is_called(tmp_path: Path) -> None:
    first = write_labelled(tmp_path)
    other = LabeledPhoto(path=first.path, digest="", label=first.label, categories={7: 3, 9: 1})
    one, two = (make_tile(photo, thing_clusters=3) for photo in (first, other))
    assert one.label[100, 40].tolist() == two.label[100, 140].tolist()


def test_the_same_seed_draws_the_same_sheet_and_another_one_another(
    tmp_path: Path, tiny_store: PseudoLabelDataset
) -> None:
    sheets = [np.asarray(plot_dataset(tiny_store, 4, seed)) for seed in (0, 0, 1)]
    assert (sheets[0] == sheets[1]).all()
    assert (sheets[0] != sheets[2]).any()
    save_jpeg(plot_dataset(tiny_store, 4, 0), tmp_path / "sheet.jpg")
    with Image.open(tmp_path / "sheet.jpg") as sheet:
        assert (sheet.format, sheet.size) == ("JPEG", (3 * 604 + 24, 32 + 2 * 270 + 24))


def test_a_store_of_fewer_photos_is_shown_whole(tiny_store: PseudoLabelDataset) -> None:
    assert plot_dataset(tiny_store, 9, 0).tobytes() == plot_dataset(tiny_store, 8, 1).tobytes()
    with pytest.raises(ConfigError, match="seed must be 0 or more"):
        plot_dataset(tiny_store, 9, -1)
