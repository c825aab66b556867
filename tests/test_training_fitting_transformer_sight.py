from pathlib import Path

import torch
from tiny import SIDE_PX

from model.network.mask_transformer import MaskTransformer
from model.run import load_run
from training.features import open_cache
from training.fitting.transformer.sight import open_sight, predict, walk
from training.labels.store import LabelStore


def test_a_decoder_says_of_cached_features_what_its_network_says_of_the_photo(
    tiny_store: LabelStore, tiny_run: Path
) -> None:
    network = load_run(tiny_run)[1]
    assert isinstance(network, MaskTransformer)
    config = tiny_store.read_config()
    cache = open_cache(tiny_store.features, config.encoder_hash, config.side_px)
    sights = [open_sight(photo, cache, SIDE_PX) for photo in tiny_store.read_photos()[:3]]
    prediction = predict(network.decoder, sights)
    with torch.inference_mode():
        raw = network(torch.stack([torch.from_numpy(each.square) for each in sights]), torch.full((3, 2), SIDE_PX))
    # The cache holds features in fp16.
    torch.testing.assert_close(prediction.semantic, raw.semantic, atol=0.02, rtol=0.02)
    torch.testing.assert_close(prediction.masks.sigmoid(), raw.masks, atol=0.01, rtol=0.0)
    assert (prediction.semantic[0] - prediction.semantic[1]).abs().max() > 0.1  # else any photo would do


def test_a_walk_meets_every_photo_once_in_order(tiny_store: LabelStore, tiny_run: Path) -> None:
    network = load_run(tiny_run)[1]
    assert isinstance(network, MaskTransformer)
    config = tiny_store.read_config()
    cache = open_cache(tiny_store.features, config.encoder_hash, config.side_px)
    photos = [*tiny_store.read_photos(), tiny_store.read_photos()[0]]
    parts = list(walk(network.decoder, photos, cache))
    assert [each for some, _ in parts for each in some] == photos
    assert [len(prediction.masks) for _, prediction in parts] == [8, 1]
    torch.testing.assert_close(parts[0][1].masks[0], parts[1][1].masks[0], atol=1e-4, rtol=1e-4)  # float32
