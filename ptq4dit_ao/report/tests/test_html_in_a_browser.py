"""The page in a browser, wide and narrow: nothing runs off it, and nothing goes wrong. Needs Chromium."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path

import pytest
import torch
from test_html import folded, full_report, layer, refused, write

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed")]

LONG = "single_transformer_blocks.37.norm1.emb.timestep_embedder"
FIRST = "<script>var errors = []; window.onerror = message => errors.push(message);</script>"
LAST = """<script>
document.querySelectorAll("details").forEach(one => one.open = true);
const beyond = [...document.querySelectorAll("main *")].filter(one => one.getBoundingClientRect().right > innerWidth);
const cut = [...document.querySelectorAll(".wide")].filter(one => one.scrollWidth > one.clientWidth);
parent.document.body.dataset.found = JSON.stringify({
  errors, width: innerWidth, page: document.documentElement.scrollWidth, cut: cut.length,
  beyond: beyond.map(one => one.outerHTML.slice(0, 200)), images: [...document.images].every(one => one.naturalWidth),
});
</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """A report with long names, notes, reasons and values."""
    report = full_report()
    paths = [f"{LONG}.linear_1.weight", f"{LONG}.linear_1.bias"]
    report["sites"] += [folded(f"{LONG}.{i}.{{to_q,to_k,to_v}}", [0.001, 1e6], folded_into=paths) for i in range(9)]
    report["sites"] += [refused(f"{LONG}.{i}.to_out", f"gelu_{i}: {'gelu ' * 30}") for i in range(9)]
    report["layers"] += [layer(f"{LONG}.{i}.linear_1", 12.3, reason="kept in float: " * 9) for i in range(9)]
    report["notes"] += [f"{LONG}.linear_1.weight: " + "x" * 90]
    report["title"] = LONG + LONG
    path = tmp_path_factory.mktemp("report") / "report.html"
    images = torch.rand(20, 1, 8, 8)
    write(report, path, float_images=images, quantized_images=images)
    return path


@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_runs_off_the_page(page, tmp_path, width):
    found = in_browser(page, tmp_path, width)
    assert found["width"] == width and found["page"] <= width
    assert found["cut"] == 0 and found["beyond"] == [] and found["images"]
    assert found["errors"] == []


def in_browser(page: Path, folder: Path, width: int) -> dict:
    """What scripts in a copy of the page find out at a width, with all that can be unfolded unfolded."""
    text = page.read_text(encoding="utf-8")
    watched = text.replace("<head>", f"<head>{FIRST}").replace("</body>", f"{LAST}</body>")
    frame = f'<iframe width="{width}" height="2000" style="border: 0" srcdoc="{escape(watched)}"></iframe>'
    copy = folder / "copy.html"
    copy.write_text(f"<!DOCTYPE html><body>{frame}</body>", encoding="utf-8")  # no window is narrower than 500 pixels
    assert BROWSER is not None
    root = ["--no-sandbox"] * (os.geteuid() == 0)  # Chromium has none for root
    options = ["--headless", *root, "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder / 'profile'}"]
    command = [BROWSER, *options, "--window-size=1600,2200", "--enable-logging=stderr", "--dump-dom", copy.as_uri()]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found is not None, done.stdout[-500:]
    return json.loads(unescape(found[1]))
