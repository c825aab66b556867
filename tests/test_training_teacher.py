from pathlib import Path

import cv2
import numpy as np
import torch
from tiny import SHAPE, SIDE_PX
from torch.nn import functional

from model.images import read_image
from model.networks.mask_transformer import DecoderConfig, DecoderOutput, MaskDecoder
from model.networks.vit import VisionTransformer
from training.data.dataset import LabeledPhoto
from training.data.features import FeatureCache, compute_features
from training.mask_transformer.crops import full_view
from training.mask_transformer.inference import DecoderInput, predict
from training.self_training.teacher import LEAST_SCORE, make_tta_views, predict_views

GRID, CELLS = 4, 14


def store_photo(folder: Path, height: int, width: int) -> LabeledPhoto:
    """A photo of noise, and noise for its features."""
    generator = np.random.default_rng(0)
    path = folder / "a.png"
    cv2.imwrite(str(path), generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
    FeatureCache(folder).write("a", generator.normal(size=(4, GRID, GRID, 64)).astype(np.float16))
    return LabeledPhoto(path=path, digest="a", label=folder / "none.png", categories={})


def make_decoder() -> MaskDecoder:
    torch.manual_seed(0)
    shape = DecoderConfig(side_px=SIDE_PX, thing_clusters=3, stuff_clusters=2, num_queries=6, num_layers=1)
    return MaskDecoder(shape, SHAPE).requires_grad_(False).eval()


def test_windows_together_show_the_whole_photo_and_lie_on_whole_cells() -> None:
    views = make_tta_views(full_view(56, 56, SIDE_PX), GRID)
    assert [each.is_mirrored for each in views] == [False, True, False, False, False, False]
    shown = np.zeros((CELLS, CELLS), int)
    for view in views[2:]:
        shown[view.cells] += 1
    assert (shown == 1).all()  # windows of two patches of four: the step that keeps cells on cells is as large


def test_a_low_photo_needs_two_windows_of_the_usual_size() -> None:
    views = make_tta_views(full_view(336, 448, 448), 32)
    assert [(each.cells[0].start, each.cells[1].start, each.cells[0].stop) for each in views[2:]] == [
        (0, 0, 84),
        (0, 28, 84),
    ]


def test_smaller_windows_are_four_for_a_photo_of_four_to_three() -> None:
    views = make_tta_views(full_view(336, 448, 448), 32, 0.5625)
    assert [(each.cells[0].start, each.cells[1].start, each.cells[0].stop) for each in views[2:]] == [
        (0, 0, 63),
        (0, 49, 63),
        (21, 0, 84),
        (21, 49, 84),
    ]


def test_an_encoder_looks_at_windows_anew_and_at_nothing_else(tmp_path: Path) -> None:
    photo, cache = store_photo(tmp_path, 56, 56), FeatureCache(tmp_path)
    torch.manual_seed(1)
    encoder = VisionTransformer(SHAPE).eval()
    _, plain = predict_views(make_decoder(), photo, cache)
    _, zoomed = predict_views(make_decoder(), photo, cache, encoder)
    assert len(zoomed) == len(plain) == 6
    for before, after in zip(plain[:2], zoomed[:2], strict=True):
        np.testing.assert_allclose(before.semantic, after.semantic, atol=1e-5)  # float32, in another batch
    window = make_tta_views(full_view(56, 56, SIDE_PX), GRID)[3]
    square = window.frame.cut_pixels(read_image(photo.path).image)
    (maps,) = compute_features(encoder, torch.from_numpy(square[None]))
    prediction = predict(make_decoder(), [DecoderInput(maps=maps, square=square)])
    expected = functional.adaptive_avg_pool2d(prediction.semantic_logits[0].softmax(0), 7).numpy()
    np.testing.assert_allclose(zoomed[3].semantic[(slice(None), *window.cells)], expected, atol=1e-5)
    assert np.abs(plain[3].semantic - zoomed[3].semantic).max() > 0.01


def test_each_connected_part_of_a_mask_is_found_by_itself(tmp_path: Path) -> None:
    """Every query of the decoder draws a bar, one half as long beside it, and a speck."""
    decoder = make_decoder()

    def draw(prediction: DecoderOutput) -> DecoderOutput:
        masks = torch.full_like(prediction.mask_logits, -9.0)
        masks[:, :, 1:3, 1:11] = masks[:, :, 5:7, 1:6] = masks[:, :, 10, 10] = 9.0
        semantic = torch.zeros_like(prediction.semantic_logits)
        semantic[:, 0] = 9.0
        return prediction._replace(mask_logits=masks, semantic_logits=semantic)

    decoder.register_forward_hook(lambda module, given, prediction: draw(prediction))
    _, finds = predict_views(decoder, store_photo(tmp_path, 56, 56), FeatureCache(tmp_path))
    assert finds[0].hard[:2].sum((1, 2)).tolist() == [20, 10]
    assert finds[0].scores[0] == finds[0].scores[1]
    assert {int(each) for each in finds[0].hard.sum((1, 2))} == {20, 10}


def test_every_view_is_told_in_the_cells_of_the_whole_photo(tmp_path: Path) -> None:
    whole, finds = predict_views(make_decoder(), store_photo(tmp_path, 28, 56), FeatureCache(tmp_path))
    assert whole.letterbox.size == (28, 56)
    assert len(finds) == 4  # whole, mirrored, and two windows
    photo = np.zeros((CELLS, CELLS), bool)
    photo[:7] = True
    assert (finds[0].inside == photo).all()
    assert (finds[2].inside == photo & (np.arange(CELLS) < 6)).all()  # of seven cells the last is the rim
    assert (finds[3].inside == photo & (np.arange(CELLS) > 7)).all()
    assert sum(len(each.scores) for each in finds) > 0
    for each in finds:
        assert not each.soft[:, 7:].any()
        assert each.semantic.sum(0)[each.inside].min() > 0.99
        assert each.chances.shape == (len(each.scores), 3)
        assert (each.scores >= LEAST_SCORE).all()
    assert not finds[2].soft[:, :, 7:].any()


def test_a_mirrored_view_of_a_mirrored_photo_says_the_same(tmp_path: Path) -> None:
    """What the second view says of a photo is what the first says of the photo turned over, turned back."""
    photo, cache = store_photo(tmp_path, 56, 56), FeatureCache(tmp_path)
    _, straight = predict_views(make_decoder(), photo, cache)
    image = cv2.imread(str(photo.path))
    assert image is not None
    cv2.imwrite(str(photo.path), np.ascontiguousarray(image[:, ::-1]))
    cache.write("a", np.array(cache.read("a"))[:, :, ::-1].copy())
    _, turned = predict_views(make_decoder(), photo, cache)
    np.testing.assert_allclose(straight[1].semantic, turned[0].semantic[:, :, ::-1], atol=1e-5)  # float32
    np.testing.assert_allclose(straight[1].soft, turned[0].soft[:, :, ::-1], atol=1e-5)
