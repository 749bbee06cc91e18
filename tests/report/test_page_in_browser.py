"""The report in a real browser, at the width of a desk and of a phone."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megaconsa.report.page import write_report
from tests.support.made_evaluation import made_evaluation
from tests.support.made_runs import write_runs

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome on the PATH"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("runs") / "quickstart"
    write_runs(folder)
    made_evaluation().save(folder / "evaluation" / "evaluation.json")
    return write_report(folder).read_text()


def look(page: str, width: int, folder: Path) -> dict[str, Any]:
    """Opens the page in the browser and returns what look.js saw."""
    script = Path(__file__).with_name("look.js").read_text()
    path = folder / "page.html"
    path.write_text(page.replace("</body>", f"<script>{script}</script></body>"))
    assert BROWSER is not None
    done = subprocess.run(
        [
            BROWSER,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={folder / 'profile'}",
            f"--window-size={width},2000",
            "--dump-dom",
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )
    (seen,) = re.findall(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    found: dict[str, Any] = json.loads(html.unescape(seen))
    return found


@pytest.mark.parametrize("width", [1300, 400])
def test_ticks_overlaps_empty_axes_hover_and_zoom(page: str, width: int, tmp_path: Path) -> None:
    seen = look(page, width, tmp_path)
    assert seen["wrong"] == []
    assert abs(seen["width"] - width) < 120
    assert seen["charts"] >= 20
    assert any("validation" in said for said in seen["said"])


def test_the_look_finds_what_is_wrong(page: str, tmp_path: Path) -> None:
    """Small text, a missing scale and a hidden curve are noticed."""
    spoiled = page.replace("font-size: 9.5px", "font-size: 4px")
    spoiled = spoiled.replace("</style>", ".xtick { display: none; }</style>", 1)
    wrong = " ".join(look(spoiled, 1300, tmp_path)["wrong"])
    assert "px" in wrong
    assert "0 names on xtick" in wrong
