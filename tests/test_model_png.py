"""PNG files of our own are read by Pillow and by OpenCV as they were meant."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from model.png import write_png

NOISE = np.random.default_rng(53)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (31, 17), (40, 60, 3), (1, 1, 3)])
def test_every_value_comes_back(shape: tuple[int, ...]) -> None:
    picture = NOISE.integers(0, 256, shape, np.uint8)
    content = write_png(picture)
    read = Image.open(io.BytesIO(content))
    read.load()
    assert read.mode == ("L" if len(shape) == 2 else "RGB")
    np.testing.assert_array_equal(np.asarray(read), picture)
    np.testing.assert_array_equal(
        cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED),
        picture[..., ::-1] if read.mode == "RGB" else picture,
    )


def test_an_even_map_takes_next_to_nothing() -> None:
    assert len(write_png(np.full((1000, 1000, 3), 7, np.uint8))) < 20_000


def test_a_view_of_a_picture_is_written_as_it_is_seen() -> None:
    picture = NOISE.integers(0, 256, (8, 9, 3), np.uint8)
    turned = picture.transpose(1, 0, 2)[::-1]
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(write_png(turned)))), turned)
