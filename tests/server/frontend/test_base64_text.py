"""Base64 as people write it, and what is none."""

from __future__ import annotations

import base64
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.frontend.base64_text import Base64Error, Base64Text


def decode(text: bytes, cuts: list[int] | None = None) -> tuple[bytes, str | None]:
    """In pieces that end at the cuts; without any, in single characters."""
    places = range(len(text) + 1) if cuts is None else [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    reader = Base64Text()
    for start, end in pairwise(places):
        reader.feed(text[start:end])
    return reader.finish()


def refusal(text: bytes) -> str:
    for cuts in ([], [3, 6], None):
        with pytest.raises(Base64Error) as caught:
            decode(text, cuts)
    return str(caught.value)


cuts = st.lists(st.integers(0, 10_000), max_size=8)


@given(
    file=st.binary(max_size=80),
    urlsafe=st.booleans(),
    keep_padding=st.integers(0, 2),
    blanks=st.lists(st.tuples(st.integers(0, 200), st.sampled_from([b" ", b"\n", b"\r\n", b"\t", b"\f"])), max_size=6),
    head=st.sampled_from([b"", b"data:image/png;base64,", b"DATA:Image/PNG;charset=x;BASE64,", b" data:;base64,"]),
    cuts=cuts,
)
def test_every_way_of_writing_it_gives_the_file_however_it_is_cut(
    file: bytes, urlsafe: bool, keep_padding: int, blanks: list[tuple[int, bytes]], head: bytes, cuts: list[int]
) -> None:
    text = base64.urlsafe_b64encode(file) if urlsafe else base64.b64encode(file)
    bare = text.rstrip(b"=")
    text = bare + b"=" * min(keep_padding, len(text) - len(bare))
    for place, blank in blanks:
        place %= len(text) + 1
        text = text[:place] + blank + text[place:]
    expected = (file, "image/png" if b"png" in head.lower() else None)
    assert decode(head + text, cuts) == decode(head + text) == decode(head + text, []) == expected


@given(st.binary(min_size=20, max_size=200), cuts, st.integers(0, 10_000), st.sampled_from(b'%!:.\x00\x7f\xe9"\\=,'))
def test_what_is_no_base64_is_named_by_its_position(file: bytes, cuts: list[int], place: int, bad: int) -> None:
    text = base64.b64encode(file).rstrip(b"=")
    place %= len(text) - 3
    spoilt = text[:place] + bytes([bad]) + text[place + 1 :]
    for where in (cuts, []):
        with pytest.raises(Base64Error) as caught:
            decode(spoilt, where)
        position = int(str(caught.value).rpartition(" ")[2])
        if bad == ord("="):  # it may be padding, up to what comes behind
            assert place <= position <= place + 2
        else:
            assert position == place


@given(st.lists(st.sampled_from([b"A", b"B", b"=", b" ", b"-", b"data:", b",", b";base64", b"%"]), max_size=12), cuts)
def test_a_cut_changes_nothing(pieces: list[bytes], cuts: list[int]) -> None:
    text = b"".join(pieces)
    outcomes: list[object] = []
    for where in (cuts, [], None):
        try:
            outcomes.append(decode(text, where))
        except Base64Error as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1] == outcomes[2]


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        (b"YWJj%", "'%' at position 4"),
        (b"YWJj=", "'=' at position 4"),
        (b"YQ===", "'=' at position 4"),
        (b"YQ==YWJj", "'Y' at position 4"),
        (b"YQ =\n= Y", "'Y' at position 7"),
        (b"=", "'=' at position 0"),
        ("YWé".encode(), "a character at position 2"),
        (b"YWJjY", "begins a byte that does not end"),
        (b"data:image/png;base64,YW%j", "'%' at position 24"),
        (b"\n data:image/png;base64,YW%j", "'%' at position 26"),
        (b"data:image/png,abc", "not one in base64"),
        (b"data:,abc", "not one in base64"),
        (b"data:image/png;base64", "without a comma"),
        (b"data:", "without a comma"),
        (b"data:" + b"x" * 300 + b";base64,YWJj", "without a comma in its first 256"),
        ("data:imagé/png;base64,YWJj".encode(), "beyond ASCII"),
        (b"http://example.org/cat.jpg", "':' at position 4"),
    ],
)
def test_a_refusal_says_what_and_where(text: bytes, detail: str) -> None:
    assert detail in refusal(text)


@pytest.mark.parametrize(("text", "file"), [(b"", b""), (b" \n", b""), (b"data", b"u\xabZ"), (b"dat", b"u\xab")])
def test_what_is_short_is_taken(text: bytes, file: bytes) -> None:
    assert decode(text) == decode(text, []) == (file, None)
