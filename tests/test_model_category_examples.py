"""Labeled segments as examples of categories, and the embeddings by which segments are compared with them."""

from dataclasses import replace

import numpy as np
import pytest
from tiny import make_contract

from model.contract import Contract, InputSize, RawOutputs, Thresholds
from model.embeddings import Category, CategoryExamples, make_examples
from model.errors import ConfigError, ContractMismatch
from model.images import letterbox_image, plan_letterbox
from model.postprocessing.masks import pack_mask
from model.postprocessing.panoptic import PatchEmbeddings, postprocess

CAT, DOG, SKY = Category(id=17, name="cat"), Category(id=18, name="dog"), Category(id=119, name="sky")
X, Y, Z = np.eye(3, dtype=np.float32)
EXAMPLES = make_examples((CAT, DOG, SKY), 2, np.array([2, 0, 1, 1, 0]), np.stack([Z, X, Y, Y, np.zeros(3)]))
"""One cat, two dogs, one sky; the embedding of zeros is left out."""


def classify(*vectors: np.ndarray, is_thing: bool = True) -> list[int]:
    return EXAMPLES.classify(np.array(vectors, np.float32), np.full(len(vectors), is_thing)).tolist()


def test_a_segment_takes_the_category_of_the_most_similar_examples_of_its_kind() -> None:
    assert EXAMPLES.counts == (1, 2, 1)
    assert classify(X, Y, (X + 0.5 * Z) / np.sqrt(1.25)) == [0, 1, 0]
    assert classify(X, Z, is_thing=False) == [2, 2]  # the only stuff
    assert classify(np.zeros(3)) == [-1]
    only_things = make_examples((CAT, SKY), 1, np.array([0]), X[None])
    assert only_things.classify(Z[None], np.array([False])).tolist() == [-1]


def test_many_less_similar_examples_do_not_outvote_a_much_more_similar_one() -> None:
    near = np.array([0.8, 0.6, 0.0], np.float32)
    examples = make_examples((CAT, DOG), 2, np.array([0, *[1] * 5]), np.stack([near, *[Y] * 5]))
    assert examples.classify(near[None], np.array([True])).tolist() == [0]
    together = make_examples((CAT, DOG), 2, np.array([0, *[1] * 5]), np.stack([near, *[near] * 5]))
    assert together.classify(near[None], np.array([True])).tolist() == [1]


def test_embeddings_are_stored_with_an_error_below_one_percent() -> None:
    vectors = np.random.default_rng(0).normal(size=(50, 64)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    stored = make_examples((CAT,), 1, np.zeros(50, np.int64), vectors).vectors
    assert (stored * vectors).sum(1).min() > 0.99


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_things": 4}, "4 of 3 categories cannot be things"),
        ({"counts": (1, 3)}, "2 counts for 3 categories"),
        ({"counts": (-1, 4, 1)}, "counts for"),
        ({"counts": (1, 1, 5)}, "12 bytes of embeddings for 7 examples"),
        ({"embeddings": "%"}, "not base64"),
        ({"embeddings": ""}, "0 bytes"),
    ],
)
def test_invalid_examples_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(EXAMPLES, **change)  # type: ignore[arg-type]


def make_named_contract(examples: CategoryExamples | None = EXAMPLES) -> Contract:
    return make_contract(
        2, 1, stride_px=1, max_detections=2, embedding_dim=3, embedding_stride_px=4, examples=examples,
        thresholds=Thresholds(score_threshold=0.5, min_stuff_area_fraction=0.0),
        categories={1: DOG, 3: Category(id=120, name="sea")},
    )  # fmt: skip


def test_a_contract_refuses_examples_of_another_size() -> None:
    with pytest.raises(ContractMismatch, match="the examples have 3 values, embeddings 64"):
        replace(make_named_contract(), embedding_dim=64)


def draw_raw() -> RawOutputs:
    """Two things in the upper half, stuff below; patches are similar to cats at the top left, then dogs, then sky."""
    masks = np.zeros((2, 8, 8), np.float32)
    masks[0, :4, :4], masks[1, :4, 4:] = 1.0, 1.0
    semantic = np.zeros((2, 8, 8), np.float32)
    semantic[1] = 5.0
    embeddings = np.array([[X, Y], [Z, Z]], np.float32).transpose(2, 0, 1)
    return RawOutputs(
        scores=np.array([0.9, 0.8], np.float32), clusters=np.array([0, 1]), boxes=np.zeros((2, 4), np.float32),
        masks=masks, semantic=semantic, embeddings=embeddings,
    )  # fmt: skip


@pytest.mark.parametrize("task", ["panoptic", "semantic", "instance"])
def test_segments_get_the_categories_of_the_examples_before_those_of_their_clusters(task: str) -> None:
    letterbox = plan_letterbox(8, 8, [InputSize.square(8)], 1)

    def list_names(contract: Contract) -> list[str | None]:
        result = postprocess(draw_raw(), letterbox, contract, task, contract.thresholds)  # type: ignore[arg-type]
        return [each.category.name if each.category else None for each in result.segments][:2]

    assert list_names(make_named_contract()) == ["cat", "dog"]
    assert list_names(make_named_contract(None)) == ["dog", None]
    assert list_names(make_named_contract(replace(EXAMPLES, except_clusters=(1,)))) == ["dog", "dog"]


def test_embeddings_are_averaged_over_the_visible_part_of_each_patch() -> None:
    # A photo of 4 x 6 in an input of 8 x 8 px: it covers the upper left patch and half of the upper right one.
    _, letterbox = letterbox_image(np.zeros((40, 60, 3), np.uint8), [InputSize.square(8)], 1)
    assert letterbox.size == (5, 8)
    patches = PatchEmbeddings(values=np.array([[X, Y], [Z, Z]]).transpose(2, 0, 1), letterbox=letterbox)
    label_map = np.full((40, 60), 7, np.int32)
    label_map[:32, :30] = 4
    label_map[0, 59] = 9
    left, whole, tiny = patches.pool_segments(label_map, [4, 7, 9], min_patches=0.1)
    np.testing.assert_allclose(left, X, atol=1e-6)
    assert whole[1] > whole[2] > whole[0] == 0.0
    assert not tiny.any()
    mask = pack_mask(label_map == 4)
    assert mask
    np.testing.assert_allclose(patches.pool_masks([mask], (40, 60)), X[None], atol=1e-6)
    assert patches.pool_segments(label_map, []).shape == (0, 3)
