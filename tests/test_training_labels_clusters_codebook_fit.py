from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny

from model.contract import Canvas
from model.errors import ConfigError
from model.pixels import plan_placement
from model.weights.checkpoints import load_encoder
from training.labels.clusters.cluster import assign
from training.labels.clusters.codebook import read_codebook
from training.labels.clusters.codebook_fit import Material, choose_things, fit_codebook, open_describer, open_stuff
from training.labels.clusters.codebook_recipe import CodebookConfig
from training.labels.clusters.photo_view import PhotoView
from training.labels.masks.proposals import Proposals, rank
from training.photos import PhotoFile

PHOTOS = [PhotoFile(path=Path(str(i)), name=str(i), digest=str(i), height=56, width=56) for i in range(6)]
CONFIG = CodebookConfig(
    encoder_hash="e",
    side_px=tiny.SIDE_PX,
    components=3,
    thing_clusters=2,
    stuff_clusters=2,
    stego="tiny",
    stego_steps=3,
)


def open_photo(photo: PhotoFile) -> PhotoView:
    """Two kinds of patches, the left and the right half of a 4 x 4 grid, and some noise."""
    maps = np.random.default_rng(int(photo.name)).normal(0, 0.1, (4, 4, 4, 64))
    maps[:, :, :2, :32] += 1.0
    maps[:, :, 2:, :32] -= 1.0
    placement = plan_placement(56, 56, [Canvas.square(tiny.SIDE_PX)], 4)
    return PhotoView(photo=photo, placement=placement, maps=maps.astype(np.float16))


def find(view: PhotoView) -> Proposals:
    """The right half in even photos, its upper patches in odd ones; in the last one nothing."""
    masks = np.zeros((0 if view.photo.name == "5" else 1, 4, 4), bool)
    masks[:, : 4 - 2 * (int(view.photo.name) % 2), 2:] = True
    return rank(masks)


@pytest.fixture
def material(tmp_path: Path, tiny_encoder: Path) -> Material:
    return Material(
        photos=PHOTOS,
        view=open_photo,
        found=find,
        encoder=load_encoder(str(tiny_encoder), tiny.SIDE_PX),
        encoder_source=str(tiny_encoder),
        maps=tmp_path,
        scratch=tmp_path,
    )


def test_stuff_clusters_know_how_much_of_them_lies_in_masks(material: Material) -> None:
    book = fit_codebook(material, CONFIG)
    labels = open_stuff(book, material).label_patches(open_photo(PHOTOS[0]))
    left, right = labels[0, 0], labels[0, 3]
    assert labels.tolist() == [[left, left, right, right]] * 4
    # Of the right halves' 6 x 8 patches, 3 x 8 and 2 x 4 lie in masks.
    assert book.inside[right - 1] == pytest.approx(32 / 48)
    assert book.inside[left - 1] == 0.0


def test_a_fitted_codebook_does_the_same_once_it_was_stored(material: Material, tmp_path: Path) -> None:
    for stuff in ("kmeans", "regions", "stego"):
        book = fit_codebook(material, replace(CONFIG, stuff=stuff))  # type: ignore[arg-type]
        book.write(tmp_path / "codebook.npz")
        stored = read_codebook(tmp_path / "codebook.npz")
        view = open_photo(PHOTOS[1])
        one, other = (open_stuff(each, material).label_pixels(view) for each in (book, stored))
        assert (one == other).all()
        vectors = open_describer(stored, material).describe(view, find(view).hard)
        assert assign(vectors, stored.things)[0] in (0, 1)


def test_photos_without_any_mask_make_no_codebook(material: Material) -> None:
    bare = replace(material, photos=[PHOTOS[5]] * 6)
    with pytest.raises(ConfigError, match="6 photos gave no mask"):
        fit_codebook(bare, CONFIG)


def test_of_a_vote_s_masks_only_likely_things_make_clusters(material: Material) -> None:
    def find_both(view: PhotoView) -> Proposals:
        halves = np.zeros((2, 4, 4), bool)
        halves[0, :, :2] = halves[1, :, 2:] = True
        return Proposals(soft=halves.astype(np.float32), scores=np.array([6.0, 5.0], np.float32))

    voted = replace(material, found=find_both, salient=lambda view: find(view).hard.any(0), objects=1)
    book = fit_codebook(voted, CONFIG)
    chosen = choose_things(book, voted, open_photo(PHOTOS[0]))
    assert chosen.hard.astype(int)[:, 0].tolist() == [[0, 0, 1, 1]]  # though more views agree on the left half
    right = open_stuff(book, voted).label_patches(open_photo(PHOTOS[0]))[0, 3]
    assert book.inside.tolist() == [float(each == right - 1) for each in range(2)]
