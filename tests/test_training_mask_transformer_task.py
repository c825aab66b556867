"""Training a mask transformer, inference on labeled photos, embeddings and reclustering."""

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
from training.data.features import FeatureCache, open_cache
from training.mask_transformer.config import MASK_TRANSFORMER_PRESETS, MaskTransformerTrainConfig
from training.mask_transformer.inference import load_decoder_input, predict_photos, run_decoder
from training.mask_transformer.recluster import ReclusterConfig, recluster, replace_cluster_head
from training.mask_transformer.targets import Target
from training.mask_transformer.task import MaskEmbeddingTargets, cosine_lr_factor
from training.train import train
from training.trainer.loggers import LOSSES_FILE, read_csv_log

TINY = MASK_TRANSFORMER_PRESETS["tiny"]
PIXELS = replace(
    TINY,
    inputs="pixels",
    crop_prob=1.0,
    copy_paste_prob=1.0,
    target_source="instances",
    droploss=True,
    query_embeddings=True,
)
RECLUSTER = ReclusterConfig(thing_clusters=5, score_threshold=0.0)


@pytest.fixture
def cache(tiny_store: PseudoLabelDataset) -> FeatureCache:
    config = tiny_store.read_config()
    return open_cache(tiny_store.features, config.encoder_hash, config.side_px)


@pytest.fixture
def network(tiny_run: Path) -> MaskTransformer:
    network = load_run(tiny_run)[1]
    assert isinstance(network, MaskTransformer)
    return network


def test_training_on_pixels_needs_no_features_and_is_reproducible(
    tmp_path: Path, tiny_store: PseudoLabelDataset
) -> None:
    for name in ("first", "second"):
        assert train(tiny_store, tmp_path / "missing", tmp_path / name, PIXELS).step == 4
    first = read_csv_log(tmp_path / "first" / LOSSES_FILE)
    assert first == read_csv_log(tmp_path / "second" / LOSSES_FILE)
    assert first["embedding"][0] > 0.0
    load_run(tmp_path / "first")


def test_training_in_bf16_is_close_to_fp32(tmp_path: Path, tiny_store: PseudoLabelDataset) -> None:
    totals = []
    for precision in ("fp32", "bf16"):
        config = replace(PIXELS, max_steps=1, precision=precision)
        train(tiny_store, tmp_path / "missing", tmp_path / precision, config)
        totals.append(read_csv_log(tmp_path / precision / LOSSES_FILE)["total"][0])
    assert totals[0] != totals[1]
    assert totals[1] == pytest.approx(totals[0], rel=0.05)  # bf16 has eight bits; matches may differ


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_steps", 0), ("batch_size", -1), ("warmup_ratio", 1.5), ("copy_paste_prob", -0.1), ("grad_clip_norm", 0.0),
        ("inputs", "photos"), ("target_source", "none"), ("color_jitter", 1.5), ("max_targets", 0),
    ],
)  # fmt: skip
def test_invalid_options_are_rejected(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        replace(TINY, **{field: value})  # type: ignore[arg-type]


def test_the_learning_rate_warms_up_and_decays_to_zero() -> None:
    config = MaskTransformerTrainConfig(max_steps=100, warmup_ratio=0.1)
    factors = [cosine_lr_factor(step, config) for step in (0, 9, 55, 99)]
    assert factors == pytest.approx([0.1, 1.0, 0.5, 0.0], abs=0.01)


def test_embedding_targets_are_the_weighted_mean_of_whitened_patches() -> None:
    # Two layers are used, of two channels each: layer norm makes a token (1, -1) or (-1, 1).
    features = torch.zeros(4, 1, 4, 2)
    features[2:] = torch.tensor([5.0, 1.0])
    features[2:, :, 1::2] = torch.tensor([1.0, 5.0])  # the right patches of two rows
    projection = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    mean = torch.tensor([0.5, 0.0, -0.5, 0.0])
    embedding_targets = MaskEmbeddingTargets(layers=(2, 3), mean=mean, projection=projection)
    masks = torch.zeros(2, 4, 4)
    masks[0, :, :2] = 1
    masks[1, :2, :3] = 1  # all of one patch, half of another
    target = Target(
        masks=masks,
        clusters=torch.tensor([0, 1]),
        weights=torch.ones(2),
        semantic=torch.zeros(4, 4, dtype=torch.int64),
        is_labeled=torch.ones(4, 4, dtype=torch.bool),
    )
    (updated,) = embedding_targets.add_to(features, (target,))
    assert updated.embeddings is not None
    left, right = torch.tensor([0.5, 1.5]), torch.tensor([-1.5, -0.5])
    left, right = left / left.norm(), right / right.norm()
    both = left + 0.5 * right
    assert updated.embeddings[0].tolist() == pytest.approx(left.tolist(), abs=1e-4)  # layer norm's epsilon
    assert updated.embeddings[1].tolist() == pytest.approx((both / both.norm()).tolist(), abs=1e-4)
    assert embedding_targets.size == 2


def test_a_decoder_on_cached_features_agrees_with_the_network_on_the_photo(
    tiny_store: PseudoLabelDataset, network: MaskTransformer, cache: FeatureCache
) -> None:
    inputs = [load_decoder_input(photo, cache, SIDE_PX) for photo in tiny_store.read_photos()[:3]]
    output = run_decoder(network.decoder, inputs)
    with torch.inference_mode():
        raw = network(torch.stack([torch.from_numpy(each.pixels) for each in inputs]), torch.full((3, 2), SIDE_PX))
    # The cache holds features in fp16.
    torch.testing.assert_close(output.semantic_logits, raw.semantic, atol=0.02, rtol=0.02)
    torch.testing.assert_close(output.mask_logits.sigmoid(), raw.masks, atol=0.01, rtol=0.0)
    assert (output.semantic_logits[0] - output.semantic_logits[1]).abs().max() > 0.1  # photos differ


def test_photos_are_predicted_in_order_and_batches(
    tiny_store: PseudoLabelDataset, network: MaskTransformer, cache: FeatureCache
) -> None:
    photos = [*tiny_store.read_photos(), tiny_store.read_photos()[0]]
    batches = list(predict_photos(network.decoder, photos, cache))
    assert [each for batch, _ in batches for each in batch] == photos
    assert [len(output.mask_logits) for _, output in batches] == [8, 1]
    first, again = (output.mask_logits[0] for _, output in batches)
    torch.testing.assert_close(first, again, atol=1e-4, rtol=1e-4)  # float32


# Reclustering


@pytest.fixture(scope="module")
def embedding_run(tmp_path_factory: pytest.TempPathFactory, tiny_store: PseudoLabelDataset) -> Path:
    """A finished run of four steps with query embeddings; read-only."""
    run = tmp_path_factory.mktemp("runs") / "embedding"
    train(tiny_store, tiny_store.features, run, replace(TINY, query_embeddings=True))
    return run


def test_reclustering_keeps_scores_masks_and_stuff(
    tmp_path: Path, tiny_store: PseudoLabelDataset, embedding_run: Path
) -> None:
    report = recluster(embedding_run, tiny_store, tiny_store.features, tmp_path / "run", RECLUSTER)
    assert (report.photos, report.detections, report.clusters) == (8, 64, 5)
    assert 1 <= report.smallest <= report.largest <= 60
    (_, before), (info, after) = load_run(embedding_run), load_run(tmp_path / "run")
    assert isinstance(info.network_config, DecoderConfig)
    assert (info.network_config.thing_clusters, info.network_config.trained_clusters) == (5, 3)
    assert info.provenance["reclustered"]["photos"] == 8
    pixels = torch.randint(0, 256, (2, 3, SIDE_PX, SIDE_PX), dtype=torch.uint8)
    sizes = torch.full((2, 2), SIDE_PX)
    with torch.inference_mode():
        old, new = before(pixels, sizes), after(pixels, sizes)
    torch.testing.assert_close(new.scores, old.scores)
    assert torch.equal(new.masks, old.masks)
    assert torch.equal(new.semantic, old.semantic)


def test_a_reclustered_run_can_be_exported(tmp_path: Path, tiny_store: PseudoLabelDataset, embedding_run: Path) -> None:
    recluster(embedding_run, tiny_store, tiny_store.features, tmp_path / "run", RECLUSTER)
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


def test_a_reclustered_run_can_be_reclustered_again(
    tmp_path: Path, tiny_store: PseudoLabelDataset, embedding_run: Path
) -> None:
    recluster(embedding_run, tiny_store, tiny_store.features, tmp_path / "first", RECLUSTER)
    config = replace(RECLUSTER, thing_clusters=2, max_photos=4)
    report = recluster(tmp_path / "first", tiny_store, tiny_store.features, tmp_path / "second", config)
    assert report.photos == 4
    decoder_config = read_run_info(tmp_path / "second").network_config
    assert isinstance(decoder_config, DecoderConfig)
    assert (decoder_config.thing_clusters, decoder_config.trained_clusters) == (2, 3)


def test_a_query_belongs_to_the_centroid_with_the_smallest_angle() -> None:
    torch.manual_seed(0)
    config = DecoderConfig(
        side_px=SIDE_PX, thing_clusters=3, stuff_clusters=2, num_queries=6, num_layers=1, embedding_dim=2
    )
    decoder = MaskDecoder(config, SHAPE).requires_grad_(False)
    centroids = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]], np.float32)
    reclustered = replace_cluster_head(decoder, centroids).requires_grad_(False)
    output = reclustered(torch.randn(4, 3, 16, 64), torch.zeros(3, 3, SIDE_PX, SIDE_PX))
    assert output.embeddings is not None
    x, y = output.embeddings.unbind(2)
    expected = torch.where(x.abs() > y.abs(), torch.where(x > 0, 0, 2), torch.where(y > 0, 1, 3))
    assert torch.equal(to_network_output(output).clusters, expected)
    assert len(expected.unique()) > 1


def test_reclustering_needs_embeddings_a_new_folder_and_enough_detections(
    tmp_path: Path, tiny_store: PseudoLabelDataset, tiny_run: Path, embedding_run: Path
) -> None:
    features = tiny_store.features
    with pytest.raises(ConfigError, match="--query-embeddings"):
        recluster(tiny_run, tiny_store, features, tmp_path / "run", RECLUSTER)
    with pytest.raises(ConfigError, match="another --out"):
        recluster(embedding_run, tiny_store, features, tiny_run, RECLUSTER)
    with pytest.raises(ConfigError, match="0 vectors cannot make 5 clusters"):
        recluster(embedding_run, tiny_store, features, tmp_path / "run", replace(RECLUSTER, score_threshold=1.0))


@pytest.mark.parametrize("change", [{"thing_clusters": 0}, {"score_threshold": 1.5}, {"max_photos": 0}])
def test_invalid_recluster_options_are_rejected(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        replace(RECLUSTER, **change)  # type: ignore[arg-type]
