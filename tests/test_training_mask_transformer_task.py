import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import SHAPE, SIDE_PX

from model.backends.loader import load_session
from model.checkpoints.runs import load_run, read_run_info
from model.errors import ConfigError
from model.export.export import ExportConfig, export_run
from model.networks.mask_transformer import DecoderConfig, MaskDecoder, MaskTransformer, to_network_output
from training.data.dataset import PseudoLabelDataset
from training.data.features import open_cache
from training.mask_transformer.config import MASK_TRANSFORMER_PRESETS
from training.mask_transformer.feature_dataset import Target
from training.mask_transformer.inference import load_decoder_input, predict, walk
from training.mask_transformer.recluster import ReclusterConfig, recluster, replace_cluster_head
from training.mask_transformer.task import MaskEmbeddingTargets
from training.train import train

PIXELS = replace(
    MASK_TRANSFORMER_PRESETS["tiny"],
    inputs="pixels",
    crop_rate=1.0,
    paste_rate=1.0,
    targets="instances",
    drops_unknown=True,
    embeds=True,
)


def read_history(run: Path) -> list[dict[str, str]]:
    with (run / "history.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_fit_on_pixels_needs_no_features_and_is_the_same_each_time(
    tmp_path: Path, tiny_store: PseudoLabelDataset
) -> None:
    for name in ("first", "second"):
        assert train(tiny_store, tmp_path / "nowhere", tmp_path / name, PIXELS).step == 4
    first = read_history(tmp_path / "first")
    assert first == read_history(tmp_path / "second")
    assert float(first[0]["embedding"]) > 0.0
    load_run(tmp_path / "first")


def test_a_fit_on_pixels_in_few_bits_comes_close_to_one_in_full(tmp_path: Path, tiny_store: PseudoLabelDataset) -> None:
    one_step = replace(PIXELS, steps=1)
    totals = []
    for precision in ("fp32", "bf16"):
        train(tiny_store, tmp_path / "nowhere", tmp_path / precision, replace(one_step, precision=precision))
        totals.append(float(read_history(tmp_path / precision)[0]["total"]))
    assert totals[0] != totals[1]
    assert totals[1] == pytest.approx(totals[0], rel=0.05)  # bf16 has eight bits; matches may differ


@pytest.mark.parametrize(
    ("field", "value"), [("inputs", "photos"), ("targets", "none"), ("jitter", 1.5), ("most_targets", 0)]
)
def test_recipes_with_unknown_words_or_out_of_range_are_refused(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        replace(MASK_TRANSFORMER_PRESETS["tiny"], **{field: value})  # type: ignore[arg-type]


def test_an_object_is_described_by_its_whitened_patches_each_by_its_share() -> None:
    # Two taps that count, of two channels: normalising a token leaves (1, -1) or (-1, 1) of each.
    features = torch.zeros(4, 1, 4, 2)
    features[2:] = torch.tensor([5.0, 1.0])
    features[2:, :, 1::2] = torch.tensor([1.0, 5.0])  # the right patches of two rows
    projection = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    whitening = MaskEmbeddingTargets(mean=torch.tensor([0.5, 0.0, -0.5, 0.0]), projection=projection)
    masks = torch.zeros(2, 4, 4)
    masks[0, :, :2] = 1
    masks[1, :2, :3] = 1  # all of one patch, half of another
    target = Target(
        masks=masks,
        clusters=torch.tensor([0, 1]),
        weights=torch.ones(2),
        semantic=torch.zeros(4, 4, dtype=torch.int64),
        known=torch.ones(4, 4, dtype=torch.bool),
    )
    (described,) = whitening.describe(features, (target,))
    assert described.vectors is not None
    left, right = torch.tensor([0.5, 1.5]), torch.tensor([-1.5, -0.5])
    left, right = left / left.norm(), right / right.norm()
    both = left + 0.5 * right
    assert described.vectors[0].tolist() == pytest.approx(left.tolist(), abs=1e-4)  # layer norm's epsilon
    assert described.vectors[1].tolist() == pytest.approx((both / both.norm()).tolist(), abs=1e-4)
    assert whitening.size == 2


def test_a_decoder_says_of_cached_features_what_its_network_says_of_the_photo(
    tiny_store: PseudoLabelDataset, tiny_run: Path
) -> None:
    network = load_run(tiny_run)[1]
    assert isinstance(network, MaskTransformer)
    config = tiny_store.read_config()
    cache = open_cache(tiny_store.features, config.encoder_hash, config.side_px)
    sights = [load_decoder_input(photo, cache, SIDE_PX) for photo in tiny_store.read_photos()[:3]]
    prediction = predict(network.decoder, sights)
    with torch.inference_mode():
        raw = network(torch.stack([torch.from_numpy(each.square) for each in sights]), torch.full((3, 2), SIDE_PX))
    # The cache holds features in fp16.
    torch.testing.assert_close(prediction.semantic_logits, raw.semantic, atol=0.02, rtol=0.02)
    torch.testing.assert_close(prediction.mask_logits.sigmoid(), raw.masks, atol=0.01, rtol=0.0)
    assert (prediction.semantic_logits[0] - prediction.semantic_logits[1]).abs().max() > 0.1  # else any photo would do


def test_a_walk_meets_every_photo_once_in_order(tiny_store: PseudoLabelDataset, tiny_run: Path) -> None:
    network = load_run(tiny_run)[1]
    assert isinstance(network, MaskTransformer)
    config = tiny_store.read_config()
    cache = open_cache(tiny_store.features, config.encoder_hash, config.side_px)
    photos = [*tiny_store.read_photos(), tiny_store.read_photos()[0]]
    parts = list(walk(network.decoder, photos, cache))
    assert [each for some, _ in parts for each in some] == photos
    assert [len(prediction.mask_logits) for _, prediction in parts] == [8, 1]
    torch.testing.assert_close(parts[0][1].masks[0], parts[1][1].masks[0], atol=1e-4, rtol=1e-4)  # float32


PLAN = ReclusterConfig(clusters=5, score=0.0)


@pytest.fixture(scope="module")
def embedding_run(tmp_path_factory: pytest.TempPathFactory, tiny_store: PseudoLabelDataset) -> Path:
    """A finished run of four steps whose queries have embeddings; not to be changed."""
    run = tmp_path_factory.mktemp("runs") / "embedding"
    train(tiny_store, tiny_store.features, run, replace(MASK_TRANSFORMER_PRESETS["tiny"], embeds=True))
    return run


def test_a_run_with_new_clusters_keeps_scores_masks_and_stuff(
    tmp_path: Path, tiny_store: PseudoLabelDataset, embedding_run: Path
) -> None:
    report = recluster(embedding_run, tiny_store, tiny_store.features, tmp_path / "run", PLAN)
    assert (report.photos, report.detections, report.clusters) == (8, 64, 5)
    assert 1 <= report.smallest <= report.largest <= 60
    (_, before), (card, after) = load_run(embedding_run), load_run(tmp_path / "run")
    assert isinstance(card.network_config, DecoderConfig)
    assert (card.network_config.thing_clusters, card.network_config.trained_clusters) == (5, 3)
    assert card.provenance["reclustered"]["photos"] == 8
    pixels = torch.randint(0, 256, (2, 3, SIDE_PX, SIDE_PX), dtype=torch.uint8)
    sizes = torch.full((2, 2), SIDE_PX)
    with torch.inference_mode():
        old, new = before(pixels, sizes), after(pixels, sizes)
    torch.testing.assert_close(new.scores, old.scores)
    assert torch.equal(new.masks, old.masks)
    assert torch.equal(new.semantic, old.semantic)


def test_a_run_with_new_clusters_exports_as_any_other(
    tmp_path: Path, tiny_store: PseudoLabelDataset, embedding_run: Path
) -> None:
    recluster(embedding_run, tiny_store, tiny_store.features, tmp_path / "run", PLAN)
    export_run(
        tmp_path / "run",
        tmp_path / "artifact",
        ExportConfig(name="tiny", version="1", score_threshold=0.0, min_component_area_fraction=0.0),
        [],
    )
    contract, session = load_session(tmp_path / "artifact", backend="cpu", threads=1)
    assert contract.thing_clusters == 5
    pixels = torch.randint(0, 256, (1, 3, SIDE_PX, SIDE_PX), dtype=torch.uint8)
    sizes = torch.full((1, 2), SIDE_PX)
    with torch.inference_mode():
        expected = load_run(tmp_path / "run")[1](pixels, sizes)
    raw = session.run(pixels.numpy(), sizes.numpy())[0]
    assert raw.clusters.tolist() == expected.clusters[0].tolist()
    assert raw.scores == pytest.approx(expected.scores[0].numpy(), abs=1e-3)  # weights stored in fp16


def test_clusters_can_be_made_anew_from_a_run_whose_clusters_were(
    tmp_path: Path, tiny_store: PseudoLabelDataset, embedding_run: Path
) -> None:
    recluster(embedding_run, tiny_store, tiny_store.features, tmp_path / "first", PLAN)
    second = replace(PLAN, clusters=2, limit=4)
    report = recluster(tmp_path / "first", tiny_store, tiny_store.features, tmp_path / "second", second)
    assert report.photos == 4
    shape = read_run_info(tmp_path / "second").shape
    assert isinstance(shape, DecoderConfig)
    assert (shape.thing_clusters, shape.trained_clusters) == (2, 3)


def test_a_query_goes_to_the_centroid_with_the_smallest_angle() -> None:
    torch.manual_seed(0)
    shape = DecoderConfig(
        side_px=SIDE_PX, thing_clusters=3, stuff_clusters=2, num_queries=6, num_layers=1, embedding_dim=2
    )
    decoder = MaskDecoder(shape, SHAPE).requires_grad_(False)
    centroids = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]], np.float32)
    made = replace_cluster_head(decoder, centroids).requires_grad_(False)
    features, pixels = torch.randn(4, 3, 16, 64), torch.zeros(3, 3, SIDE_PX, SIDE_PX)
    prediction = made(features, pixels)
    assert prediction.embeddings is not None
    x, y = prediction.embeddings.unbind(2)
    across, up = x.abs() > y.abs(), y > 0
    expected = torch.where(across, torch.where(x > 0, 0, 2), torch.where(up, 1, 3))
    assert torch.equal(to_network_output(prediction).clusters, expected)
    assert len(expected.unique()) > 1


def test_a_run_without_embeddings_is_refused(tmp_path: Path, tiny_store: PseudoLabelDataset, tiny_run: Path) -> None:
    with pytest.raises(ConfigError, match="--embeds"):
        recluster(tiny_run, tiny_store, tiny_store.features, tmp_path / "run", PLAN)


def test_a_run_is_not_overwritten(tiny_store: PseudoLabelDataset, tiny_run: Path, embedding_run: Path) -> None:
    with pytest.raises(ConfigError, match="another --out"):
        recluster(embedding_run, tiny_store, tiny_store.features, tiny_run, PLAN)


def test_sure_detections_alone_make_clusters(
    tmp_path: Path, tiny_store: PseudoLabelDataset, embedding_run: Path
) -> None:
    with pytest.raises(ConfigError, match="0 vectors cannot make 5 clusters"):
        recluster(embedding_run, tiny_store, tiny_store.features, tmp_path / "run", replace(PLAN, score=1.0))


@pytest.mark.parametrize("change", [{"clusters": 0}, {"score": 1.5}, {"limit": 0}])
def test_plans_out_of_range_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        replace(PLAN, **change)  # type: ignore[arg-type]
