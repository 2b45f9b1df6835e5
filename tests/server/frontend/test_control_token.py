"""The control token: what a file may hold, and that another file counts without a restart."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from server.errors import Forbidden, Unauthorized
from server.frontend.control_token import ControlToken


def bearer(token: str) -> dict[bytes, bytes]:
    return {b"authorization": b"Bearer " + token.encode("latin-1")}


@pytest.mark.parametrize("content", [b"secret", b"secret\n", b"  secret\r\n", b"secret\n\n"])
def test_blanks_around_a_token_are_no_part_of_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "token").write_bytes(content)
    token = ControlToken(tmp_path / "token")
    token.check(bearer("secret"))
    token.check({b"authorization": b"bearer   secret "})
    for headers in (
        {},
        {b"authorization": b"Bearer"},
        {b"authorization": b"Basic secret"},
        {b"authorization": b"secret"},
    ):
        with pytest.raises(Unauthorized):
            token.check(headers)
    for other in ("Secret", "secret2", "s\xe9cret", "secre", "\xff"):
        with pytest.raises(Forbidden):
            token.check(bearer(other))


@pytest.mark.parametrize(
    "content",
    [b"", b" \n", b"two\nlines", b"a b", "gehe\u00efm".encode(), b"\xff\xfe", b"a\0b", b"x" * 5000],
    ids=lambda content: repr(content)[:20],
)
def test_what_is_no_token_is_refused_without_showing_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "token").write_bytes(content)
    with pytest.raises(ValueError, match=r"^(the file is empty|a token is one line|is larger than)") as refused:
        ControlToken(tmp_path / "token")
    assert "two" not in str(refused.value)


def test_nor_is_what_cannot_be_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, cause in (
        (tmp_path / "none", "no such file"),
        (tmp_path, "directory|regular"),
        (tmp_path / "fifo", "regular"),
    ):
        with pytest.raises(ValueError, match=cause):
            ControlToken(path)


def test_a_rotated_token_counts_from_the_next_request_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As Kubernetes does it: a link to a folder is replaced."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "token").write_text(name)
    link = tmp_path / "now"
    link.symlink_to("one")
    token = ControlToken(link / "token")
    token.check(bearer("one"))
    (tmp_path / "next").symlink_to("two")
    os.replace(tmp_path / "next", link)
    token.check(bearer("two"))
    with pytest.raises(Forbidden):
        token.check(bearer("one"))
    with caplog.at_level(logging.WARNING):
        for content in ("", "not one\nline"):
            (tmp_path / "two" / "token").write_text(content)
            for _ in range(3):
                token.check(bearer("two"))
        (tmp_path / "two" / "token").unlink()
        token.check(bearer("two"))
    assert len(caplog.records) == 3
    assert "one\nline" not in caplog.text
    (tmp_path / "two" / "token").write_text("three")
    token.check(bearer("three"))
