"""Images arrive as data URLs and nothing else; a request's images are judged together."""

import base64

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mm_engine.errors import RequestError
from mm_engine.inputs.media import (
    ImageSource,
    MediaLimits,
    load_images,
    read_data_url,
)
from pictures import data_url, encode, png_of_size, quarters


def sources(*urls: str) -> list[ImageSource]:
    return [ImageSource(url, f"messages.0.content.{n}") for n, url in enumerate(urls)]


def test_images_come_back_in_order() -> None:
    urls = [data_url(encode(Image.new("RGB", (n, 1)))) for n in (1, 2, 3)]
    assert [i.width for i in load_images(sources(*urls), MediaLimits())] == [1, 2, 3]


def test_more_images_than_allowed_are_refused() -> None:
    url = data_url(encode(quarters()))
    assert len(load_images(sources(url, url), MediaLimits(max_images=2))) == 2
    with pytest.raises(RequestError, match="too many images: 3"):
        load_images(sources(url, url, url), MediaLimits(max_images=2))


def test_the_sum_of_pixels_is_refused_before_any_image_is_decoded() -> None:
    # The second is corrupt inside: had it been decoded, the error would say so.
    urls = data_url(encode(quarters(50, 50))), data_url(png_of_size(50, 50))
    with pytest.raises(RequestError, match="too many pixels in one request: 5000"):
        load_images(sources(*urls), MediaLimits(max_total_pixels=4999))
    with pytest.raises(RequestError, match="corrupt"):
        load_images(sources(*urls), MediaLimits(max_total_pixels=5000))


@pytest.mark.parametrize(
    ("url", "fact"),
    [
        ("https://example.com/secret.png?token=abc", "remote image URLs are off: https://…"),
        ("HTTP://169.254.169.254/latest", "remote image URLs are off: http://…"),
        (" http://localhost", "remote image URLs are off: http://…"),
        ("file:///etc/secret", "local image files are off: file://…"),
        ("/etc/secret", "not a URL of a known kind"),
        ("", "not a URL of a known kind"),
        ("gopher://secret", "not a URL of a known kind"),
        ("data:", "incomplete"),
        ("data:image/png;base64", "incomplete"),
        ("data:image/png,secret", "not base64"),
        ("data:image/png;base64,", "empty"),
        ("data:;base64,AAAA", "MIME type"),
        ("data:text/html;base64,AAAA", "MIME type"),
        ("data:image/svg+xml;base64,AAAA", "MIME type"),
        ("data:image/png;base64,secret!", "invalid base64"),
        ("data:image/png;base64,AAA", "invalid base64"),
        ("data:image/png;base64,AAAA====", "invalid base64"),
        ("data:image/png;base64,ÄÖÜß", "invalid base64"),
        ("data:image/png;base64,\ud800", "invalid base64"),
        (data_url(encode(quarters(), "JPEG"), "image/png"), "says image/png but holds JPEG"),
    ],
)
def test_bad_urls_are_refused_without_repeating_them(url: str, fact: str) -> None:
    with pytest.raises(RequestError) as raised:
        load_images(sources(url), MediaLimits())
    assert fact in str(raised.value)
    assert "secret" not in str(raised.value)
    assert raised.value.param == "messages.0.content.0"


@pytest.mark.parametrize("mime", ["image/jpeg", "IMAGE/JPEG", "image/jpg", "image/jpeg;a=b"])
def test_spellings_of_a_good_data_url_are_taken(mime: str) -> None:
    encoded = encode(quarters(), "JPEG")
    text = base64.encodebytes(encoded).decode()  # with line breaks, as `base64` prints it
    url = f"data:{mime};base64,{text}"
    assert read_data_url(ImageSource(url, "x"), MediaLimits()) == encoded


def test_a_long_data_url_is_refused_before_it_is_decoded() -> None:
    limits = MediaLimits(max_bytes=3000)
    with pytest.raises(RequestError, match="over 3000 bytes"):
        read_data_url(ImageSource(data_url(b"") + "!" * 5000, "x"), limits)


@settings(max_examples=200)
@given(st.text(max_size=60), st.sampled_from(["", "data:", "data:image/png;base64,", "http:"]))
def test_any_text_is_refused_as_a_url(text: str, start: str) -> None:
    with pytest.raises(RequestError):
        load_images(sources(start + text), MediaLimits())
