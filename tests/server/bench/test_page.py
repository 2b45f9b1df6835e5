"""The report: one file that asks for nothing else, whatever a server calls itself; looked at in a real browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.bench.figures import figures
from server.bench.orders import Client, Outcome
from server.bench.page import _decades, _round_ticks, page
from tests.server.bench.test_figures import BODIES, log_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "<script>document.title='owned'</script><img src=//evil.example/x>"


def document(count: int = 400, **more: Any) -> dict[str, Any]:
    outcomes = [*[Outcome.ANSWERED] * 6, *Outcome]
    rows = [
        (n / 100, 0.0005, 0.004 * (n % 50 + 1), outcomes[n % len(outcomes)], Client.PLAIN, n % 2, 1 + n % 3, n % 5 > 0)
        for n in range(count)
    ]
    told = figures(log_of(rows), BODIES, warm_up=0.5, seconds=4, timeout_ms=150)
    told["driver"] |= {"processes": 1, "ceiling_per_s": 5000.0}
    load = {"clients": None, "trace": None, "rates": [], "arrivals": "poisson", "seed": 0, "together": 1}
    return {
        **told,
        "url": "http://127.0.0.1:8000",
        "load": load | {"timeout_ms": 150.0, "capacity_per_s": None},
        "doubts": [],
        "interrupted": False,
        "server": {"before": {"model": {"name": "photo10-dvt", "version": "1"}, "budget": None}, "after": None},
        "release": "0.1.0",
        "date": "2026-01-01",
        "machine": "Linux x86_64",
        **more,
    }


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


def hostile() -> dict[str, Any]:
    made = document(doubts=[HOSTILE], url=HOSTILE)
    made["server"]["before"]["model"]["name"] = HOSTILE
    made["errors"] = {HOSTILE: 3}
    made["load"]["trace"] = HOSTILE
    return made


@pytest.mark.parametrize(
    "made", [document(), document(0), document(3), hostile()], ids=["full", "none", "few", "hostile"]
)
def test_a_report_asks_for_nothing_else(made: dict[str, Any]) -> None:
    text = page(made)
    seen = _Tags()
    seen.feed(text)
    assert not seen.tags & {"script", "link", "img", "iframe", "object", "base"}
    assert not seen.attributes & {"src", "href", "srcset", "onload", "onerror"}
    assert "@import" not in text
    assert "url(" not in text
    for picture in re.findall(r"<svg.*?</svg>", text, re.S):
        ElementTree.fromstring(picture)
        assert not re.search(r"\b(nan|inf)\b", picture)


@given(low=st.floats(1e-3, 1e6), factor=st.floats(1, 1e6))
def test_a_logarithmic_axis_has_room_for_all(low: float, factor: float) -> None:
    ticks = _decades(low, low * factor)
    assert ticks[0] <= low * 1.0001
    assert ticks[-1] >= low * factor * 0.9999
    assert len(ticks) >= 2


@given(most=st.floats(0, 1e9))
def test_an_axis_from_0_has_few_round_ticks(most: float) -> None:
    ticks = _round_ticks(most)
    assert ticks[0] == 0
    assert ticks[-1] >= most * 0.9999
    assert 2 <= len(ticks) <= 7


@pytest.mark.skipif(CHROMIUM is None, reason="no browser is installed (apt-get install chromium)")
@pytest.mark.parametrize("made", [document(), document(0), hostile()], ids=["full", "none", "hostile"])
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_all_of_it_at_the_width_of_a_phone_and_of_a_desk(
    made: dict[str, Any], width: int, tmp_path: Path
) -> None:
    outer = f"""<!doctype html><iframe style="border:0" width={width} height=900 srcdoc="{html.escape(page(made))}">
    </iframe><pre id="seen"></pre><script>
    const frame = document.querySelector("iframe");
    frame.onload = () => {{
      const inner = frame.contentDocument, root = inner.documentElement;
      const within = [...inner.querySelectorAll("h1,h2,p,.tile,section,svg")]
        .every(element => element.getBoundingClientRect().right <= root.clientWidth + 1);
      const texts = [...inner.querySelectorAll("svg text")].map(text => text.getBoundingClientRect());
      document.getElementById("seen").textContent = JSON.stringify({{
        title: inner.title, wide: root.scrollWidth, within, plots: inner.querySelectorAll("svg").length,
        scripts: inner.scripts.length, images: inner.images.length,
        smallest: Math.min(99, ...texts.map(box => box.height)) }});
    }};</script>"""
    (tmp_path / "outer.html").write_text(outer)
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    shown = subprocess.run(
        [*command, "--window-size=1400,1000", "--virtual-time-budget=2000", "--dump-dom", str(tmp_path / "outer.html")],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    found = re.search(r'<pre id="seen">(.+?)</pre>', shown)
    assert found, shown[-2000:]
    seen = json.loads(html.unescape(found[1]))
    assert seen["wide"] <= width, "it does not scroll sideways"
    assert seen["within"]
    assert seen["scripts"] == seen["images"] == 0
    assert seen["title"].endswith(": load report")
    assert seen["plots"] == (4 if made["requests"]["answered"] else 2)
    assert seen["smallest"] > 9, "labels can be read"
