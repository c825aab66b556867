"""Transfer of cluster names between versions of a model."""

from dataclasses import replace

import numpy as np
from tiny import make_contract

from model.contract import Contract
from model.embeddings import Category
from model.postprocessing.panoptic import Segment, Segmentation
from model.registry.category_names import empty_names
from model.registry.name_transfer import (
    NameProposal,
    TransferThresholds,
    keep_user_names,
    propose_names,
    transfer_names,
)

Rows = list[list[int]]
DOG, CAT, SKY = Category(id=1, name="dog"), Category(id=2, name="cat"), Category(id=3, name="sky")
OLD = make_contract(
    3, 1, 64, name="small", max_detections=1, categories={1: DOG, 2: CAT, 4: SKY}, files={"network.onnx": "old"}
)
NEW = replace(OLD, version="2", thing_clusters=2, stuff_clusters=2, categories={}, files={"network.onnx": "new"})
ONE = TransferThresholds(min_images=1)


def draw(rows: Rows, contract: Contract) -> Segmentation:
    """Return a segmentation whose segment ids are the clusters; 0 is void."""
    label_map = np.array(rows, np.uint8)
    segments = [
        Segment(id=int(each), cluster=int(each), is_thing=contract.is_thing(int(each)), score=1.0)
        for each in np.unique(label_map)
        if each
    ]
    return Segmentation(label_map=label_map, segments=tuple(segments))


def propose(*pairs: tuple[Rows, Rows], thresholds: TransferThresholds = ONE) -> dict[int, NameProposal]:
    drawn = [(draw(old, OLD), draw(new, NEW)) for old, new in pairs]
    return {each.cluster: each for each in propose_names(drawn, OLD, NEW, thresholds)}


def test_a_cluster_gets_the_most_frequent_name_of_its_pixels() -> None:
    found = propose(([[1, 1, 1, 4], [0, 2, 2, 2]], [[2, 2, 2, 3], [2, 1, 1, 1]]))
    assert (found[2].category_name, found[2].overlap, found[2].runner_up) == ("dog", 0.75, None)
    assert (found[1].category_name, found[1].overlap, found[1].reason) == ("cat", 1.0, "clear")
    assert found[3].category_name == "sky"


def test_old_clusters_of_the_same_name_count_together() -> None:
    contract = replace(OLD, categories={1: DOG, 3: DOG, 2: CAT})
    pair = draw([[1, 3, 2, 2, 3]], OLD), draw([[1, 1, 1, 1, 1]], NEW)
    (found,) = propose_names([pair], contract, NEW, ONE)
    assert (found.category_name, found.overlap, found.runner_up, found.runner_up_overlap) == ("dog", 0.6, "cat", 0.4)


def test_names_below_the_thresholds_are_proposed_but_not_transferred() -> None:
    one = propose(([[1] * 11 + [2] * 9], [[1] * 20]))[1]
    assert (one.category_name, one.best, one.reason) == (None, "dog", "leads by 10%, 20% are required")
    # the other pixels are void or belong to a cluster without a name
    one = propose(([[1] * 8 + [2] * 1 + [0] * 6 + [3] * 5], [[1] * 20]))[1]
    assert one.reason == "40% of it had this name, 50% are required"
    found = propose(([[1, 1]], [[1, 1]]), thresholds=TransferThresholds())
    assert {cluster: each.reason for cluster, each in found.items()} == {1: "in 1 images, 3 are required"}
    found = propose(([[1, 1, 4, 4]], [[3, 3, 1, 1]]))  # things and stuff
    assert {each.reason for each in found.values()} == {"overlaps no named cluster"}


def test_images_have_equal_weights_whatever_their_size() -> None:
    large = [[1] * 30] * 30
    found = propose((large, large), *[([[2, 0]], [[1, 0]])] * 3)[1]
    # all of the large image and half of each small one
    assert (found.best, found.overlap, found.runner_up_overlap, found.images) == ("cat", 0.6, 0.4, 4)


def test_transferred_names_belong_to_the_new_network_and_name_their_origin() -> None:
    proposals = propose(([[1, 4]], [[2, 3]]), ([[1, 2]], [[2, 1]]))
    transferred = transfer_names(proposals.values(), OLD, NEW)
    assert {cluster: name.category_name for cluster, name in transferred.names.items()} == {
        1: "cat",
        2: "dog",
        3: "sky",
    }
    assert transferred.names[2].author == "transferred from small 1"
    assert (transferred.version, transferred.network_sha256) == ("2", "new")


def test_user_names_can_be_transferred_alone() -> None:
    given = empty_names(OLD).rename({2: "dog", 3: "wolf"}, "ann")
    assert keep_user_names(OLD, given).categories == {2: DOG, 3: Category(id=6, name="wolf")}
