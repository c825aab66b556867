from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import SHAPE, SIDE_PX

from model.backends.runtime import open_session
from model.errors import ConfigError
from model.network.mask_transformer import DecoderShape, MaskDecoder, read_raw
from model.release.export import ExportConfig, export_run
from model.run import load_run, read_run_card
from training.fitting.fit import fit
from training.fitting.transformer.recipe import PRESETS
from training.fitting.transformer.recluster import ReclusterPlan, recluster, rewrite
from training.labels.store import LabelStore

PLAN = ReclusterPlan(clusters=5, score=0.0)


@pytest.fixture(scope="module")
def embedding_run(tmp_path_factory: pytest.TempPathFactory, tiny_store: LabelStore) -> Path:
    """A finished run of four steps whose queries have embeddings; not to be changed."""
    run = tmp_path_factory.mktemp("runs") / "embedding"
    fit(tiny_store, tiny_store.features, run, replace(PRESETS["tiny"], embeds=True))
    return run


def test_a_run_with_new_clusters_keeps_scores_masks_and_stuff(
    tmp_path: Path, tiny_store: LabelStore, embedding_run: Path
) -> None:
    report = recluster(embedding_run, tiny_store, tiny_store.features, tmp_path / "run", PLAN)
    assert (report.photos, report.detections, report.clusters) == (8, 64, 5)
    assert 1 <= report.smallest <= report.largest <= 60
    (_, before), (card, after) = load_run(embedding_run), load_run(tmp_path / "run")
    assert isinstance(card.shape, DecoderShape)
    assert (card.shape.thing_clusters, card.shape.taught_clusters) == (5, 3)
    assert card.provenance["reclustered"]["photos"] == 8
    pixels = torch.randint(0, 256, (2, 3, SIDE_PX, SIDE_PX), dtype=torch.uint8)
    sizes = torch.full((2, 2), SIDE_PX)
    with torch.inference_mode():
        old, new = before(pixels, sizes), after(pixels, sizes)
    torch.testing.assert_close(new.scores, old.scores)
    assert torch.equal(new.masks, old.masks)
    assert torch.equal(new.semantic, old.semantic)


def test_a_run_with_new_clusters_exports_as_any_other(
    tmp_path: Path, tiny_store: LabelStore, embedding_run: Path
) -> None:
    recluster(embedding_run, tiny_store, tiny_store.features, tmp_path / "run", PLAN)
    export_run(tmp_path / "run", tmp_path / "artifact", ExportConfig(name="tiny", version="1", score=0.0, part=0.0), [])
    contract, session = open_session(tmp_path / "artifact", backend="cpu", threads=1)
    assert contract.thing_clusters == 5
    pixels = torch.randint(0, 256, (1, 3, SIDE_PX, SIDE_PX), dtype=torch.uint8)
    sizes = torch.full((1, 2), SIDE_PX)
    with torch.inference_mode():
        expected = load_run(tmp_path / "run")[1](pixels, sizes)
    raw = session.run(pixels.numpy(), sizes.numpy())[0]
    assert raw.clusters.tolist() == expected.clusters[0].tolist()
    assert raw.scores == pytest.approx(expected.scores[0].numpy(), abs=1e-3)  # weights stored in fp16


def test_clusters_can_be_made_anew_from_a_run_whose_clusters_were(
    tmp_path: Path, tiny_store: LabelStore, embedding_run: Path
) -> None:
    recluster(embedding_run, tiny_store, tiny_store.features, tmp_path / "first", PLAN)
    second = replace(PLAN, clusters=2, limit=4)
    report = recluster(tmp_path / "first", tiny_store, tiny_store.features, tmp_path / "second", second)
    assert report.photos == 4
    shape = read_run_card(tmp_path / "second").shape
    assert isinstance(shape, DecoderShape)
    assert (shape.thing_clusters, shape.taught_clusters) == (2, 3)


def test_a_query_goes_to_the_centroid_with_the_smallest_angle() -> None:
    torch.manual_seed(0)
    shape = DecoderShape(side_px=SIDE_PX, thing_clusters=3, stuff_clusters=2, queries=6, layers=1, embedding=2)
    decoder = MaskDecoder(shape, SHAPE).requires_grad_(False)
    centroids = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]], np.float32)
    made = rewrite(decoder, centroids).requires_grad_(False)
    features, pixels = torch.randn(4, 3, 16, 64), torch.zeros(3, 3, SIDE_PX, SIDE_PX)
    prediction = made(features, pixels)
    assert prediction.embeddings is not None
    x, y = prediction.embeddings.unbind(2)
    across, up = x.abs() > y.abs(), y > 0
    expected = torch.where(across, torch.where(x > 0, 0, 2), torch.where(up, 1, 3))
    assert torch.equal(read_raw(prediction).clusters, expected)
    assert len(expected.unique()) > 1


def test_a_run_without_embeddings_is_refused(tmp_path: Path, tiny_store: LabelStore, tiny_run: Path) -> None:
    with pytest.raises(ConfigError, match="--embeds"):
        recluster(tiny_run, tiny_store, tiny_store.features, tmp_path / "run", PLAN)


def test_a_run_is_not_overwritten(tiny_store: LabelStore, tiny_run: Path, embedding_run: Path) -> None:
    with pytest.raises(ConfigError, match="another --out"):
        recluster(embedding_run, tiny_store, tiny_store.features, tiny_run, PLAN)


def test_sure_detections_alone_make_clusters(tmp_path: Path, tiny_store: LabelStore, embedding_run: Path) -> None:
    with pytest.raises(ConfigError, match="0 vectors cannot make 5 clusters"):
        recluster(embedding_run, tiny_store, tiny_store.features, tmp_path / "run", replace(PLAN, score=1.0))


@pytest.mark.parametrize("change", [{"clusters": 0}, {"score": 1.5}, {"limit": 0}])
def test_plans_out_of_range_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        replace(PLAN, **change)  # type: ignore[arg-type]
