import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny

from model.errors import ConfigError
from training.data.dataset import PseudoLabelDataset
from training.data.label_config import CodebookConfig
from training.evaluation.datasets.dataset_spec import DatasetSpec
from training.evaluation.datasets.ground_truth import GroundTruthDataset
from training.evaluation.matching.prototypes import (
    Prototype,
    match_by_regions,
    match_prototypes,
    mean_prototypes,
    sample_regions,
)
from training.pseudo_labels.codebook import Codebook, load_codebook, smooth_with_masks
from training.pseudo_labels.maskcut import MaskProposals

ACROSS, UP = np.array([1.0, 0.0]), np.array([0.0, 1.0])


@pytest.fixture
def truth(tmp_path: Path) -> GroundTruthDataset:
    return DatasetSpec(folder=tiny.draw_truth(tmp_path / "set")).read()


def test_a_prototype_is_the_mean_direction_of_its_regions() -> None:
    prototypes = mean_prototypes([3, 5, 3], [ACROSS, UP, UP])
    assert sorted(prototypes) == [3, 5]
    assert prototypes[3].regions == 2
    assert np.allclose(prototypes[3].vector, math.sqrt(0.5))
    assert np.array_equal(prototypes[5].vector, UP)


def test_each_cluster_takes_the_nearest_category_of_its_kind_and_none_that_is_unlike() -> None:
    book = Codebook(
        config=CodebookConfig(encoder_hash=""), mean=np.zeros(2), projection=np.eye(2), inside=np.zeros(2),
        things=np.array([[0.8, 0.6], [-0.6, -0.8]]), stuff=np.array([[0.6, 0.8], [0.0, -1.0]]),
    )  # fmt: skip
    prototypes = {
        0: Prototype(vector=ACROSS, regions=2),
        1: Prototype(vector=UP, regions=1),
        2: Prototype(vector=ACROSS, regions=4),  # of stuff, there being two things
    }
    matches = match_prototypes(book, prototypes, things=2)
    assert [(each.category, each.purity, each.support) for each in matches.values()] == [
        (1, 0.8, 2), (None, 0.0, 0), (3, 0.6, 4), (3, 0.0, 4),
    ]  # fmt: skip


def test_stuff_stays_without_a_name_where_only_things_were_shown() -> None:
    book = Codebook(
        config=CodebookConfig(encoder_hash=""), mean=np.zeros(2), projection=np.eye(2), inside=np.zeros(1),
        things=np.array([ACROSS]), stuff=np.array([ACROSS]),
    )  # fmt: skip
    matches = match_prototypes(book, {0: Prototype(vector=ACROSS, regions=1)}, things=1)
    assert [each.category for each in matches.values()] == [1, None]


def test_regions_are_drawn_by_turns_once_a_category_and_picture(truth: GroundTruthDataset) -> None:
    drawn = sample_regions(truth, 3, seed=0)
    assert [region.category for region in drawn] == [0, 1, 0]
    assert drawn[0].photo.digest != drawn[2].photo.digest
    assert all(region.mask.any() for region in drawn)
    assert len(sample_regions(truth, 100, seed=0)) == 8


def test_boxes_have_no_look(truth: GroundTruthDataset) -> None:
    with pytest.raises(ConfigError, match="has boxes alone"):
        sample_regions(replace(truth, kind="boxes"), 3, seed=0)


def test_the_clusters_of_a_store_get_names_from_regions_and_know_their_photos(
    tmp_path: Path, truth: GroundTruthDataset, tiny_store: PseudoLabelDataset
) -> None:
    names = match_by_regions(tiny_store, truth, 4, 0, tmp_path / "features")
    assert (names.thing_clusters, names.stuff_clusters, names.method) == (3, 4, "prototypes")
    assert {names.clusters[each].category for each in (1, 2, 3)} <= {1, None}
    assert {names.clusters[each].category for each in (4, 5, 6, 7)} <= {2, None}
    assert any(found.category for found in names.clusters.values())
    drawn = {region.photo.digest for region in sample_regions(truth, 4, 0)}
    assert names.fitted_on.images == len(drawn) == names.fitted_on.count_overlap(drawn)


def pretend(store: PseudoLabelDataset, folder: Path, stuff: str) -> PseudoLabelDataset:
    """The same store, its stuff clustered another way by name."""
    copied = PseudoLabelDataset(Path(shutil.copytree(store.folder, folder)))
    book = load_codebook(copied.codebook)
    replace(book, config=replace(book.config, stuff=stuff)).write(copied.codebook)  # type: ignore[arg-type]
    return copied


def test_stuff_of_patches_seen_with_their_regions_gets_the_same_names(
    tmp_path: Path, truth: GroundTruthDataset, tiny_store: PseudoLabelDataset
) -> None:
    regions = pretend(tiny_store, tmp_path / "regions", "regions")
    found = match_by_regions(regions, truth, 4, 0, tmp_path / "features")
    assert found.clusters == match_by_regions(tiny_store, truth, 4, 0, tmp_path / "features").clusters


def test_codes_of_another_head_have_no_names_by_likeness(
    tmp_path: Path, truth: GroundTruthDataset, tiny_store: PseudoLabelDataset
) -> None:
    with pytest.raises(ConfigError, match="stuff by"):
        match_by_regions(pretend(tiny_store, tmp_path / "stego", "stego"), truth, 4, 0, tmp_path / "features")


def test_patches_blended_with_their_own_region_keep_its_mean_direction() -> None:
    tokens = np.random.default_rng(0).normal(size=(4, 4, 8)) + 1.0
    tokens /= np.linalg.norm(tokens, axis=-1, keepdims=True)
    mask = np.zeros((1, 4, 4))
    mask[0, :2] = 1.0
    blended = smooth_with_masks(tokens, MaskProposals(soft=mask, scores=np.ones(1)))[:2].mean((0, 1))
    plain = tokens[:2].mean((0, 1))
    assert blended @ plain / np.linalg.norm(blended) / np.linalg.norm(plain) > 0.995
