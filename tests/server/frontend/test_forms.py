"""The multipart body: which parts are files, what stands around them, and that cuts change nothing."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import InvalidRequest, ServeError, TooManyImages, UnsupportedMediaType
from server.frontend.forms import FormFiles
from server.frontend.images import EncodedImage

MAX_IMAGES = 4
IMAGE = b'Content-Disposition: form-data; name="image"; filename="a.png"\r\nContent-Type: image/png'


def read(body: bytes, cuts: list[int] | None = None, boundary: bytes = b"b") -> list[EncodedImage]:
    """In pieces that end at the cuts; without any, in single bytes."""
    places = range(len(body) + 1) if cuts is None else [0, *sorted(cut % (len(body) + 1) for cut in cuts), len(body)]
    form = FormFiles(f"multipart/form-data; boundary={boundary.decode()}", MAX_IMAGES)
    for start, end in pairwise(places):
        form.feed(body[start:end])
    return form.finish()


def outcome(body: bytes, cuts: list[int] | None) -> object:
    try:
        return read(body, cuts)
    except (InvalidRequest, TooManyImages, UnsupportedMediaType) as error:
        return (error.code, error.detail)


def part(headers: bytes, content: bytes = b"x") -> bytes:
    return b"--b\r\n" + headers + b"\r\n\r\n" + content + b"\r\n"


def refusal(body: bytes) -> ServeError:
    for cuts in ([], None):
        with pytest.raises(ServeError) as caught:
            read(body, cuts)
    return caught.value


cuts = st.lists(st.integers(0, 10_000), max_size=12)
# Not random bytes: what looks nearly like a boundary.
contents = st.lists(
    st.sampled_from([b"\r", b"\n", b"\r\n", b"-", b"--", b"b", b"\r\n-", b"\r\n--", b"--b", b"\r\n--a", b"\xff", b"x"]),
    max_size=12,
).map(b"".join).filter(lambda content: b"\r\n--b" not in b"\r\n" + content)  # fmt: skip
text = st.sampled_from([b"", b"This is a multi-part message in MIME format.", b"\r\n\r\n", b"-", b"--", b"--\r\n--a"])


@given(st.lists(contents, min_size=1, max_size=MAX_IMAGES), text, text, st.sampled_from([b"", b" ", b"\t  "]), cuts)
def test_the_files_come_out_in_order_however_the_body_is_cut(
    files: list[bytes], preamble: bytes, epilogue: bytes, padding: bytes, cuts: list[int]
) -> None:
    parts = b"".join(b"--b" + padding + b"\r\n" + IMAGE + b"\r\n\r\n" + file + b"\r\n" for file in files)
    body = (preamble + b"\r\n" if preamble else b"") + parts + b"--b--" + epilogue
    expected = [(file, "image/png") for file in files]
    assert read(body, cuts) == read(body) == read(body, []) == expected


@given(
    st.lists(
        st.sampled_from(
            [b"--b", b"\r\n", b"--", b"\r\n\r\n", b"x", b": ", b"a", b" ", IMAGE, b"\r\n--b", b"\r\n--b--", b"\n"]
        ),
        max_size=14,
    ).map(b"".join),
    cuts,
)  # fmt: skip
def test_a_cut_changes_nothing_and_anything_is_taken_or_refused(body: bytes, cuts: list[int]) -> None:
    assert outcome(body, cuts) == outcome(body, None) == outcome(body, [])


@pytest.mark.parametrize(
    ("headers", "media_type"),
    [
        (b'Content-Disposition: form-data; name="image"; filename="a.jpg"\r\nContent-Type: image/jpeg', "image/jpeg"),
        (b'Content-Disposition: form-data; name="file"; filename="a.jpg"\r\nContent-Type: image/jpeg', "image/jpeg"),
        (b'content-disposition:form-data;name="any name";filename="a.jpg"', None),
        (b'Content-Disposition: form-data; name="x"; filename=""', None),
        (b"Content-Disposition: form-data; name=\"x\"; filename*=utf-8''%C3%A4.jpg", None),
        (b'Content-Disposition: form-data; name="image"', None),
        (b"Content-Disposition: form-data; name=image", None),
        (b'Content-Disposition: form-data; name="x"\r\nContent-Type: image/png', "image/png"),
        (b"Content-Type: application/octet-stream", "application/octet-stream"),
        (b"Content-Type: image/gif", "image/gif"),
        (IMAGE + b"\r\nContent-Transfer-Encoding: binary\r\nContent-Length: 1", "image/png"),
    ],
)  # fmt: skip
def test_every_file_is_taken_whatever_its_name(headers: bytes, media_type: str | None) -> None:
    assert read(part(headers) + b"--b--\r\n") == [(b"x", media_type)]


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b"", "ends before its last boundary"),
        (b"no boundary here", "ends before its last boundary"),
        (part(IMAGE), "ends before its last boundary"),
        (b"--b--\r\n", "has no file"),
        (b"preamble\r\n--b--\r\n", "has no file"),
        (part(IMAGE) + part(b'Content-Disposition: form-data; name="top_k"') + b"--b--", "'top_k' is a text field"),
        (part(b"Content-Disposition: a; name=t\r\nContent-Type: text/plain") + b"--b--", "'t' is a text field"),
        (b"--b\r\n\r\nx\r\n--b--", "has no name"),
        (part(b"Content-Disposition: form-data") + b"--b--", "has no name"),
        (part(b"no colon") + b"--b--", "A header of a part is not valid"),
        (part(b"na me: x") + b"--b--", "A header of a part is not valid"),
        (part(b": x") + b"--b--", "A header of a part is not valid"),
        (part(IMAGE + b"\r\n folded: x") + b"--b--", "A header of a part is not valid"),
        (part(IMAGE + b"\r\na: b" * 15) + b"--b--", "more than 16 headers"),
        (part(b"a: " + b"b" * 9000) + b"--b--", "longer than 8192 bytes"),
        (b"--b\r\na: " + b"b" * 9000, "longer than 8192 bytes"),
        (b"--b" + b" " * 300, "More than 256 blanks"),
        (part(IMAGE, b"x\r\n--bc") + b"--b--", "begins with the boundary, but goes on"),
    ],
)  # fmt: skip
def test_a_refusal_says_what(body: bytes, detail: str) -> None:
    error = refusal(body)
    assert isinstance(error, InvalidRequest)
    assert detail in error.detail


def test_an_encoding_of_its_own_is_refused() -> None:
    error = refusal(part(IMAGE + b"\r\nContent-Transfer-Encoding: base64") + b"--b--")
    assert isinstance(error, UnsupportedMediaType)


def test_one_image_too_many_is_refused_as_it_begins() -> None:
    form = FormFiles("multipart/form-data; boundary=b", 2)
    form.feed(part(IMAGE) * 2)
    with pytest.raises(TooManyImages) as caught:
        form.feed(b"--b\r\n")
    assert caught.value.extra == {"max_images": 2}


@pytest.mark.parametrize("parameters", ["", "; boundary=", "; boundary=" + "b" * 300])
def test_a_boundary_is_needed_and_not_a_long_one(parameters: str) -> None:
    with pytest.raises(InvalidRequest, match="boundary"):
        FormFiles("multipart/form-data" + parameters, MAX_IMAGES)


def test_a_quoted_boundary_is_taken() -> None:
    form = FormFiles('multipart/form-data; charset=x; boundary="a b:?"', MAX_IMAGES)
    form.feed(b"--a b:?\r\n" + IMAGE + b"\r\n\r\nx\r\n--a b:?--")
    assert form.finish() == [(b"x", "image/png")]


@pytest.mark.parametrize("begin", [b"", part(IMAGE)[:-3], part(IMAGE) + b"--b--"])
def test_single_bytes_take_no_more_memory_than_the_body(begin: bytes) -> None:
    form = FormFiles("multipart/form-data; boundary=b", MAX_IMAGES)
    form.feed(begin)
    tracemalloc.start()
    try:
        for _ in range(2**16):
            form.feed(b"\r")
            form.feed(b"\n")
        assert tracemalloc.get_traced_memory()[1] < 1.2 * 2**17
    finally:
        tracemalloc.stop()
