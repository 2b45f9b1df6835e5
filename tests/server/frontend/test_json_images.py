"""The JSON body: what is taken, what is refused, and that both do not depend on how the body is cut."""

from __future__ import annotations

import base64
import json
import tracemalloc
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from server.errors import InvalidRequest, ServeError, TooManyImages
from server.frontend.images import EncodedImage
from server.frontend.json_images import JsonImages

MAX_IMAGES = 4


def read(body: bytes, cuts: Iterable[int] = (), max_images: int = MAX_IMAGES) -> list[EncodedImage]:
    """Fed in pieces that end at the cuts."""
    reader = JsonImages(max_images)
    places = [0, *sorted(cut % (len(body) + 1) for cut in cuts), len(body)]
    for start, end in pairwise(places):
        reader.feed(body[start:end])
    return reader.finish()


def one_byte_each(body: bytes) -> list[EncodedImage]:
    return read(body, range(len(body)))


def refusal(body: bytes, **options: Any) -> ServeError:
    with pytest.raises(ServeError) as caught:
        read(body, **options)
    return caught.value


def by_the_library(body: bytes) -> list[bytes] | None:
    """What `json` and `base64` make of a body; None where it is not of the form, or too long."""
    try:
        document = json.loads(body.decode(), object_pairs_hook=list)
    except ValueError:
        return None
    match document:
        case [("images", [_, *_] as texts)] if all(isinstance(text, str) for text in texts):
            pass
        case _:
            return None
    try:
        return [base64.b64decode(text, validate=True) for text in texts] if len(texts) <= MAX_IMAGES else None
    except ValueError:
        return None


files = st.lists(st.binary(max_size=60), min_size=1, max_size=MAX_IMAGES)
cuts = st.lists(st.integers(0, 10_000), max_size=12)
blanks = st.text(" \t\n\r", max_size=3)


@st.composite
def strings(draw: st.DrawFn, text: str) -> str:
    """A JSON string of the text, some of its characters escaped in one of the ways that there are."""
    ways = st.sampled_from(("as it is", "as it is", "as it is", "short", "u", "U"))
    written = []
    for character in text:
        way = draw(ways)
        if way == "short" and character == "/":
            written.append("\\/")
        elif way in "uU":
            code = f"{ord(character):04x}"
            written.append("\\u" + (code.upper() if way == "U" else code))
        else:
            written.append(character)
    return f'"{"".join(written)}"'


@st.composite
def documents(draw: st.DrawFn) -> tuple[bytes, list[bytes]]:
    wanted = draw(files)
    texts = [draw(strings(base64.b64encode(file).decode())) for file in wanted]
    tokens = ["{", draw(strings("images")), ":", "["]
    for text in texts:
        tokens += [text, ","]
    tokens[-1:] = ["]", "}"]
    return "".join(draw(blanks) + token for token in tokens).encode() + draw(blanks).encode(), wanted


@given(documents(), cuts)
def test_a_valid_document_gives_its_files_however_it_is_cut(document: tuple[bytes, list[bytes]], cuts: list[int]):
    body, wanted = document
    assert by_the_library(body) == wanted
    assert read(body, cuts) == one_byte_each(body) == [(file, None) for file in wanted]


tokens = st.sampled_from(
    ["{", "}", "[", "]", ":", ",", "[]", "{}", '"images"', '{"images":[', '"YWJj"', '""', '"YQ"', '"top_k"', "1",
     "-1.5e3", "null", "NaN", " ", "\n", "x", "\x00", "\ufeff", '"', "\\", '"\\u0069mages"', '"YW\\u004aj"', '"\\x"',
     '"\\u12"', '"\\ud800"', '"é"', '"a\nb"']
)  # fmt: skip


@given(
    st.one_of(
        st.lists(tokens, max_size=10).map(lambda parts: "".join(parts).encode()),
        st.lists(tokens, max_size=5).map(lambda parts: b'{"images":["YWJj"' + "".join(parts).encode() + b"]}"),
        st.binary(max_size=30).map(lambda noise: b'{"images":["' + noise + b'"]}'),
        st.tuples(documents(), st.integers(0, 500), st.binary(max_size=2)).map(
            lambda spoilt: spoilt[0][0][: spoilt[1]] + spoilt[2] + spoilt[0][0][spoilt[1] + 1 :]
        ),
    ),
    cuts,
)
@example(b'{"images":["YWJj"]}x', [])
@example(b'{"images":["%\0"]}', [])
@example(b'{"images":["YWJj"],"images":["YWJj"]}', [])
@example(b'\xef\xbb\xbf{"images":["YWJj"]}', [])
@example('{"images":["YWJj"]}'.encode("utf-16-le"), [])
@example(b'{"\0i\0m\0a\0g\0e\0s\0":["YWJj"]}', [])
def test_what_the_library_refuses_is_refused_however_it_is_cut(body: bytes, cuts: list[int]) -> None:
    expected = by_the_library(body)
    if expected is not None:
        assert read(body, cuts) == [(file, None) for file in expected]
        return
    outcomes = []
    for places in ((), cuts, range(len(body))):
        try:
            outcomes.append(read(body, places))
        except (InvalidRequest, TooManyImages) as error:
            outcomes.append((error.code, error.extra))
    assert outcomes[0] == outcomes[1] == outcomes[2]
    if isinstance(outcomes[0], list):  # taken all the same: valid JSON of the form, in one of the other ways of base64
        assert list(json.loads(body)) == ["images"]
        assert all(set(text) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/-_= \t\n\r\f")
                   or "data:" in text.lower() for text in json.loads(body)["images"])  # fmt: skip


@pytest.mark.parametrize(
    ("body", "detail", "index"),
    [
        (b"", "ends too early, after 0 bytes", None),
        (b'{"images": ["YWJj"]', "ends too early, after 19 bytes", None),
        (b'{"images": ["YWJj"]} {}', "byte 21 should not be there", None),
        (b'{"images": ["YWJj",]}', "byte 19 should not be there", None),
        (b'{"images" ["YWJj"]}', "byte 10 should not be there", None),
        (b'{"images": ["YW\nJj"]}', "byte 15 should not be there", None),
        (b'{"images": ["YW\\x41"]}', "byte 15 should not be there", None),
        (b"[]", 'must be {"images": ["<base64>", ...]}', None),
        (b"{}", 'must be {"images": ["<base64>", ...]}', None),
        (b'{"images": ["YWJj"], "images": []}', "and nothing else", None),
        (b'{"image": ["YWJj"]}', "and nothing else", None),
        (b'{"images": []}', "at least one image", None),
        (b'{"images": "YWJj"}', "must be a list", None),
        (b'{"images": ["YWJj", 7]}', "images[1] is not a string", 1),
        (b'{"images": ["YWJj", "YW%j"]}', "images[1] is not valid base64: '%' at position 2", 1),
    ],
)  # fmt: skip
def test_a_refusal_says_what_and_where(body: bytes, detail: str, index: int | None) -> None:
    for error in (refusal(body), refusal(body, cuts=range(len(body)))):
        assert isinstance(error, InvalidRequest)
        assert detail in error.detail
        assert error.extra.get("index") == index


def test_one_image_too_many_is_refused_as_it_begins() -> None:
    reader = JsonImages(max_images=2)
    reader.feed(b'{"images": ["YWJj", "YWJj",')
    with pytest.raises(TooManyImages) as caught:
        reader.feed(b' "')
    assert caught.value.extra == {"max_images": 2}
    assert len(read(b'{"images": ["YWJj", "YWJj"]}', max_images=2)) == 2


@pytest.mark.parametrize(
    ("begin", "unit"),
    [
        (b"", b"["), (b'{"images":[', b"[],"), (b'{"images":[', b"{},"), (b'{"images":[', b"1,"),
        (b"{", b'"k":1,'), (b'{"', b"k"), (b'{"images":[', b'"",'),
    ],
)  # fmt: skip
def test_another_shape_is_refused_in_the_first_chunk(begin: bytes, unit: bytes) -> None:
    with pytest.raises(ServeError):
        JsonImages(64).feed(begin + unit * 100)


@pytest.mark.parametrize(
    ("begin", "unit"),
    [(b"", b" "), (b'{"images":["', b" "), (b'{"images":["', b"AAAA"), (b'{"images":["', b"\\u0041")],
)
def test_what_goes_on_without_end_takes_no_more_memory_than_the_body(begin: bytes, unit: bytes) -> None:
    size = 2**20
    reader = JsonImages(64)
    reader.feed(begin)
    chunk = unit * (2**12 // len(unit))
    tracemalloc.start()
    try:
        for _ in range(size // len(chunk)):
            reader.feed(chunk)
        assert tracemalloc.get_traced_memory()[1] < 1.2 * size
    finally:
        tracemalloc.stop()


def test_single_bytes_take_no_more_memory_than_the_body() -> None:
    reader = JsonImages(64)
    reader.feed(b'{"images":["')
    tracemalloc.start()
    try:
        for _ in range(2**17):
            reader.feed(b"A")
        assert tracemalloc.get_traced_memory()[1] < 1.2 * 2**17
    finally:
        tracemalloc.stop()
