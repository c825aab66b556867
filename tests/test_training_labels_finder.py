from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny

from model.weights.checkpoints import load_encoder
from training.features import fill_cache, open_cache
from training.labels.clusters.photo_view import open_view
from training.labels.finder import Finder, find_salient, sample_views
from training.labels.masks.discovery_recipe import DiscoveryConfig
from training.labels.masks.keys import fill_keys, open_key_cache
from training.photos import scan_photos


def test_every_way_of_finding_gives_masks_on_the_patches_that_show_the_photo(
    tmp_path: Path, tiny_encoder: Path, tiny_photos: Path
) -> None:
    encoder = load_encoder(str(tiny_encoder), tiny.SIDE_PX)
    photos = scan_photos(tiny_photos).photos
    cache, keys = (each(tmp_path, "0" * 64, tiny.SIDE_PX) for each in (open_cache, open_key_cache))
    fill_cache(cache, photos, encoder, tiny.SIDE_PX)
    fill_keys(keys, photos, encoder, tiny.SIDE_PX)
    view = partial(open_view, cache, side_px=tiny.SIDE_PX)
    finders = {
        "patches": Finder(config=DiscoveryConfig(proposals="maskcut", threshold=0.6), encoder=encoder),
        "keys": Finder(
            config=DiscoveryConfig(proposals="maskcut", threshold=0.1, tokens="keys", centred=True),
            encoder=encoder,
            keys=keys,
        ),
        "vote": Finder(
            config=DiscoveryConfig(proposals="vote"), encoder=encoder, views=sample_views(photos, view, encoder, 0)
        ),
    }
    wide = view(photos[0])  # 48 x 64 on a square of 56: three of four rows
    for name, finder in finders.items():
        found = finder.find(wide)
        assert found.soft.shape[1:] == (3, 4), name
        assert len(found.soft) == len(found.scores) > 0, name
        assert ((found.soft >= 0.0) & (found.soft <= 1.0)).all(), name


def test_what_maskcut_finds_is_salient(tmp_path: Path, tiny_encoder: Path, tiny_photos: Path) -> None:
    encoder = load_encoder(str(tiny_encoder), tiny.SIDE_PX)
    photo = scan_photos(tiny_photos).photos[0]
    cache = open_cache(tmp_path, "0" * 64, tiny.SIDE_PX)
    fill_cache(cache, [photo], encoder, tiny.SIDE_PX)
    view = open_view(cache, photo, tiny.SIDE_PX)
    found = Finder(config=DiscoveryConfig(proposals="maskcut"), encoder=encoder).find(view)
    assert (find_salient(encoder, view) == found.hard.any(0)).all()
    alike = np.zeros_like(view.maps)
    alike[..., 0] = 1.0
    assert not find_salient(encoder, replace(view, maps=alike)).any()


def test_views_do_not_depend_on_anything_but_the_seed(tmp_path: Path, tiny_encoder: Path, tiny_photos: Path) -> None:
    encoder = load_encoder(str(tiny_encoder), tiny.SIDE_PX)
    photos = scan_photos(tiny_photos).photos
    cache = open_cache(tmp_path, "0" * 64, tiny.SIDE_PX)
    fill_cache(cache, photos, encoder, tiny.SIDE_PX)
    one, other = (sample_views(photos, partial(open_view, cache, side_px=tiny.SIDE_PX), encoder, 1) for _ in range(2))
    assert one.mean == pytest.approx(other.mean, abs=0.0)
