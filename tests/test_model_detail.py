"""Detail: the windows that a network sees, and the merging of their outputs."""

from dataclasses import replace

import numpy as np
import pytest
from tiny import make_contract

from model.contract import Contract, InputSize, RawOutputs, Thresholds
from model.detail import prepare_image, run_image
from model.embeddings import l2_normalize
from model.errors import InvalidParameter
from model.postprocessing.panoptic import Segmentation, embed_patches, postprocess

CONTRACT = make_contract(2, 1, 64, max_detections=1, thresholds=Thresholds(score_threshold=0.3))


class BrightSession:
    """Detects the bright pixels of each input as one object of cluster 2; everything else is stuff."""

    backend = "fake"

    def run(self, pixels: np.ndarray, sizes: np.ndarray) -> list[RawOutputs]:
        return [self._detect(each) for each in pixels]

    def _detect(self, pixels: np.ndarray) -> RawOutputs:
        bright = pixels[0].reshape(16, 4, 16, 4).mean((1, 3)) > 200
        rows, columns = (np.flatnonzero(bright.any(axis)) * 4 for axis in (1, 0))
        box = [columns[0], rows[0], columns[-1] + 4, rows[-1] + 4] if bright.any() else [0, 0, 0, 0]
        semantic = np.stack([np.where(bright, 5.0, -5.0), np.where(bright, -5.0, 5.0)])
        return RawOutputs(
            scores=np.array([0.9 if bright.any() else 0.0], np.float32),
            clusters=np.array([1]),
            boxes=np.array([box], np.float32),
            masks=bright[None].astype(np.float32),
            semantic=semantic.astype(np.float32),
        )


def draw(height: int, width: int, *squares: tuple[int, int, int, int]) -> np.ndarray:
    image = np.zeros((height, width, 3), np.uint8)
    for top, left, down, across in squares:
        image[top : top + down, left : left + across] = 255
    return image


def segment(image: np.ndarray, contract: Contract = CONTRACT) -> Segmentation:
    raw, prepared = run_image(BrightSession(), image, contract, "high")
    return postprocess(raw, prepared.letterbox, contract, "instance", prepared.override(contract.thresholds))


@pytest.mark.parametrize(
    ("height", "width", "starts"),
    [
        (64, 64, [(0, 0), (0, 48), (48, 0), (48, 48)]),  # 112 px: 64 and 64, 16 px in common
        (192, 256, [(0, 0), (0, 48), (20, 0), (20, 48)]),  # 48x64 px at scale 1, so 84x112 px
        (16, 256, [(0, 0), (0, 48)]),  # no higher than a window
    ],
)
def test_windows_cover_the_enlarged_image(height: int, width: int, starts: list[tuple[int, int]]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    prepared = prepare_image(image, CONTRACT, "high")
    whole, *windows = prepared.inputs
    np.testing.assert_array_equal(whole.pixels, prepare_image(image, CONTRACT).inputs[0].pixels)
    assert [(each.top, each.left) for each in windows] == starts
    covered = np.zeros(prepared.letterbox.size, bool)
    for each in windows:
        covered[each.top : each.top + each.size[0], each.left : each.left + each.size[1]] = True
    assert covered.all()


def test_an_object_in_a_window_is_placed_where_it_is() -> None:
    # 8x8 px in a corner: two cells of the whole image, and inside the last window.
    square = (48, 48, 8, 8)
    (found,) = segment(draw(64, 64, square)).segments
    assert (found.cluster, round(found.score, 3)) == (2, 0.9)
    raw, prepared = run_image(BrightSession(), draw(64, 64, square), CONTRACT, "high")
    assert prepared.letterbox.size == (112, 112)
    assert raw.masks.shape == (2, 28, 28)
    for mask in raw.masks:
        rows, columns = (np.flatnonzero((mask > 0.5).any(axis)) * 4 * 64 / 112 for axis in (1, 0))
        assert 44 <= min(rows[0], columns[0]) <= max(rows[-1], columns[-1]) < 56
    np.testing.assert_allclose(raw.boxes[0], np.array([48, 48, 56, 56]) * 112 / 64, atol=0.5)
    np.testing.assert_allclose(raw.boxes[1], raw.boxes[0], atol=4)


def test_an_object_that_only_windows_resolve_is_found() -> None:
    # 3 px are less than a cell of the whole image, and 5 px in a window; weighted by 0.8.
    image = draw(64, 64, (4, 4, 3, 3))
    assert BrightSession().run(prepare_image(image, CONTRACT).inputs[0].pixels[None], np.zeros((1, 2)))[0].scores == [0]
    segments = segment(image).segments
    assert [round(each.score, 2) for each in segments] == [0.72]


def test_an_object_that_windows_cut_comes_from_the_whole_image_once() -> None:
    segmentation = segment(draw(64, 64, (8, 8, 48, 48)))
    assert [round(each.score, 2) for each in segmentation.segments] == [0.9]
    assert np.count_nonzero(segmentation.label_map) == pytest.approx(48 * 48, rel=0.1)


def test_masks_inside_boxes_are_moved_with_them() -> None:
    contract = replace(CONTRACT, box_mask_size=16)
    raw, _ = run_image(BrightSession(), draw(64, 64, (48, 48, 8, 8)), contract, "high")
    assert raw.masks.shape == (2, 16, 16)
    np.testing.assert_allclose(raw.boxes[0], np.array([48, 48, 56, 56]) * 112 / 64, atol=0.5)


def test_low_detail_uses_its_own_input_sizes() -> None:
    image = draw(64, 64)
    with pytest.raises(InvalidParameter, match="a 1 has no detail 'low': send 'standard' or 'high'"):
        prepare_image(image, CONTRACT, "low")
    contract = replace(CONTRACT, low_input_sizes=(InputSize.square(32),))
    assert prepare_image(image, contract, "low").inputs[0].pixels.shape == (3, 32, 32)


@pytest.mark.parametrize(("height", "width"), [(64, 40), (37, 64), (64, 64)])
def test_a_segment_has_the_embedding_that_it_has_at_the_standard_detail(height: int, width: int) -> None:
    vectors = np.random.default_rng(0).normal(size=(4, 4, 8)).astype(np.float32)
    values = l2_normalize(vectors).transpose(2, 0, 1)
    image = np.zeros((height, width, 3), np.uint8)
    label_map = np.ones((height, width), np.uint8)
    label_map[: height // 2, : width // 2] = 2
    pooled = []
    for detail in ("standard", "high"):
        prepared = prepare_image(image, CONTRACT, detail)
        outputs = [
            replace(BrightSession().run(each.pixels[None], np.zeros((1, 2)))[0], embeddings=values)
            for each in prepared.inputs
        ]
        patches = embed_patches(prepared.merge(outputs), prepared.letterbox)
        assert patches is not None
        pooled.append(patches.pool_segments(label_map, [1, 2]))
    np.testing.assert_allclose(pooled[1], pooled[0], atol=1e-6)
