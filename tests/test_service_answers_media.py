"""The type of an answer follows the caller's wishes, as RFC 9110 orders them."""

import pytest

from model.errors import AnswerUnsupported
from service.answers.media import choose_media


@pytest.mark.parametrize(
    ("accept", "media"),
    [
        ("", "application/json"),
        ("*/*", "application/json"),
        ("application/json", "application/json"),
        ("image/png", "image/png"),
        ("IMAGE/JPEG", "image/jpeg"),
        ("image/*", "image/png"),
        ("image/*, image/png;q=0", "image/jpeg"),
        ("image/png;q=0.5, image/jpeg;q=0.9", "image/jpeg"),
        ("image/png;q=0.5, */*;q=0.1", "image/png"),
        ("text/html, application/xhtml+xml, image/avif, */*;q=0.8", "application/json"),
        ('image/png;profile="coco-panoptic"', "image/png"),
        ("application/json;q=oops, image/jpeg;q=0.001", "image/jpeg"),
    ],
)
def test_the_best_liked_type_is_chosen(accept: str, media: str) -> None:
    assert choose_media(accept) == media


@pytest.mark.parametrize("accept", ["text/html", "application/*;q=0", "*/*;q=0", "image/webp", "*/*;q=nan", ";;;"])
def test_nothing_liked_is_an_error_that_lists_what_there_is(accept: str) -> None:
    with pytest.raises(AnswerUnsupported, match="we speak application/json, image/png, image/jpeg"):
        choose_media(accept)
