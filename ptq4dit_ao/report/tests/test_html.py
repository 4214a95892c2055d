"""The page as a browser sees it: well-formed, complete, closed to the outside."""

from __future__ import annotations

import base64
import importlib
import re
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from ptq4dit_ao.errors import ArgumentError, MissingDependencyError
from ptq4dit_ao.report import plots
from ptq4dit_ao.report.html import write_html

VOID = {"br", "img", "meta", "wbr"}
REASON = "to_v also feeds a norm, which <cannot> be divided"
HOSTILE = '<script>alert("1")</script>'


class Page(HTMLParser):
    """Checks that every tag is closed in order; keeps the tags, their attributes and the text."""

    def __init__(self, markup: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(markup)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open and self._open[-1] == tag, f"</{tag}> closes {self._open[-1:]}"
        self._open.pop()

    def handle_data(self, data):
        if self._open[-1:] != ["style"]:
            self.text += data

    def images(self) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == "img"]


def folded(name: str, b: list[float], **changes: object) -> dict:
    return {
        "name": name,
        "layers": [name],
        "channels": 2 * len(b),
        "variables": len(b),
        "status": "folded",
        "reason": None,
        "folded_into": [f"{name}.norm.weight", f"{name}.norm.bias"],
        "num_clipped": 1,
        "method": "ssc",
        "alpha": 0.7,
        "b": b,
        "salience_x": [4.0] * len(b),
        "salience_w": [1.0] * len(b),
        "timesteps": [900, 100],
        "salience_t": [4.0, 2.0],
        "rho": [0.5, -0.5],
        "eta": [0.3, 0.7],
    } | changes


def refused(name: str, reason: str) -> dict:
    about = {"name": name, "layers": [name], "channels": 4, "variables": 4, "status": "refused", "reason": reason}
    return about | {"folded_into": [], "num_clipped": 0}


def layer(name: str, sqnr_db: float | None, **changes: object) -> dict:
    about = {"name": name, "status": "integer", "reason": None, "weight_bits": 4, "activation_bits": 8}
    ranges = {"weight_clipping": 0.87, "activation_clipping": 0.423}
    return about | ranges | {"sqnr_db": sqnr_db, "sqnr_db_t": [[100, sqnr_db], [900, sqnr_db]]} | changes


def left_out(count: int) -> dict:
    inputs = [{"name": f"blocks.{i}.ff", "sqnr_db": 25.0 - i, "gain_db": 1.5 - i / 10} for i in range(count)]
    return {"sqnr_db": 23.5, "rows": 42, "inputs": inputs}


def full_report() -> dict:
    return {
        "title": "digits_w4a8 on reference",
        "model": {"name": "reference", "parameters": 2134784},
        "recipe": {"version": 1, "weights": {"bits": 4}, "description": HOSTILE},
        "versions": {"ptq4dit_ao": "0.1.0", "torch": "2.13.0"},
        "settings": {"method": "ssc", "alpha": 0.5, "max_scale": 1000.0, "fold_form": "constant"},
        "sites": [
            folded("blocks.0.attn.{to_q,to_k,to_v}", [0.25, 1000.0]),
            folded(f"blocks.{HOSTILE}.ff", [2.0, 3.0, 5.0]),
            refused("blocks.0.attn.to_out", REASON),
        ],
        "layers": [
            layer("blocks.0.attn.to_q", 21.25),
            layer("blocks.0.ff", None),
            layer(
                HOSTILE, None, status="float", reason="kept in float: <safe>", weight_bits=None, activation_bits=None
            ),
        ],
        "attention": None,
        "leave_one_out": left_out(2),
        "weight_bits": {
            "candidates": [4, 8],
            "average_bits": 4.876,
            "inputs": [
                {"name": "blocks.0.attn.to_q", "parameters": 12345, "noise": [0.123, 0.0005], "bits": 4},
                {"name": HOSTILE, "parameters": 64, "noise": [0.877, 0.0035], "bits": 8},
            ],
        },
        "evaluation": {"sqnr_db": 24.31, "per_timestep": [[900, 30.0], [100, 18.5]], "samples": 8, "seed": 3},
        "inputs": {
            "free": ["height: from 2, a multiple of 2"],
            "conditions": ["height < width"],
            "fixed": {"text of prompt": HOSTILE},
        },
        "size": {"float32_bytes": 8_600_000, "artifact_bytes": 1_340_000, "ratio": 6.42},
        "seconds": {"export": 2.14, "calibrate": 13.4, "convert": 1.0},
        "notes": [f"b of {HOSTILE} was clipped"],
    }


def empty_report() -> dict:
    nothing: dict = {"settings": None, "evaluation": None, "size": None, "sites": [], "layers": [], "notes": []}
    nothing |= {"leave_one_out": None, "weight_bits": None, "inputs": None}
    return full_report() | nothing


def write(report: dict, path, **images: torch.Tensor) -> str:
    write_html(report, path, **images)
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def markup(tmp_path_factory) -> str:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(20, 1, 4, 4, generator=generator) - 0.5
    path = tmp_path_factory.mktemp("report") / "report.html"
    return write(full_report(), path, float_images=images, quantized_images=images + 0.25)


@pytest.fixture(scope="module")
def page(markup) -> Page:
    return Page(markup)


@pytest.fixture
def charts(monkeypatch) -> dict[str, list]:
    """Replaces the charts, which take seconds; chart -> what it was asked to draw."""
    asked: dict[str, list] = {}

    def record(name):
        return lambda entries, *_: asked.update({name: list(entries)}) or b"png"

    monkeypatch.setattr(plots, "leave_one_out_chart", record("leave_one_out_chart"))
    for name in ("salience_chart", "activation_chart", "ssc_chart", "layer_chart", "timestep_sqnr_chart", "heat_map"):
        monkeypatch.setattr(plots, name, record(name))
    return asked


def test_page_says_which_sizes_are_free(page):
    for text in ("height: from 2, a multiple of 2", "where height < width", f"text of prompt is fixed: {HOSTILE}"):
        assert text in page.text


def test_page_is_well_formed_and_has_every_section(page):
    for title in ("Please read", "Samples", "Predicted noise per timestep", "Balancing", "Layers", "How it was made"):
        assert title in page.text
    assert {tag for tag, _ in page.tags} >= {"html", "head", "title", "header", "main", "table", "details"}


def test_page_is_closed_to_the_outside(markup, page):
    assert not re.search(r"https?:|@import|url\(|//[a-z]", re.sub(r"base64,[A-Za-z0-9+/=]+", "", markup))
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "a", "form"}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on") or name == "href"]
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.images())


def test_every_picture_is_a_png_with_a_description(page):
    assert len(page.images()) == 3 + 1 + 3 + 2 + 1
    for image in page.images():
        assert len(image["alt"]) > 20
        assert imread(BytesIO(base64.b64decode(image["src"].partition(",")[2]))).size


def test_every_site_layer_reason_and_path_is_named(page):
    report = full_report()
    for site in report["sites"]:
        assert site["name"] in page.text
        assert all(path in page.text for path in site["folded_into"])
    for name in (entry["name"] for entry in report["layers"]):
        assert name in page.text
    for text in (REASON, "kept in float: <safe>", *report["notes"]):
        assert text in page.text


def test_names_are_text_and_never_markup(markup, page):
    assert "<script" not in markup
    assert page.text.count(HOSTILE) >= 5  # a note, a site, its two paths, a layer


def test_headline_numbers(page):
    for text in (
        "digits_w4a8 on reference",
        "2,134,784 parameters",
        "24.3 dB8 samples, seed 3",
        "6.42 times smaller8.6 MB in float32 → 1.34 MB",
        "2 of 31 refused",
        "2 of 31 kept in float",
        "0.25 to 1,000",
        "13.4 s",
        "from 23.5\N{NO-BREAK SPACE}dB, on 42 rows",
        "from 4, 8 bits: 4.88 on average",
        "87%",
        "42%",
        '"bits": 4',
    ):
        assert text in page.text


def test_difference_grid_is_white_at_half_a_unit(page):
    image = next(image for image in page.images() if image["alt"].startswith("Difference"))
    pixels = np.rint(imread(BytesIO(base64.b64decode(image["src"].partition(",")[2]))) * 255)
    assert abs(pixels[0, 0] - 127.5) <= 1  # 0.25 of 0.5
    assert "on average 0.250, at most 0.250" in image["alt"]


def test_refused_sites_and_float_layers_come_first_in_their_tables(markup):
    rows = markup.replace("<wbr>", "")
    tables = [re.findall(r"<tr><td><code>(.*?)</code>", table) for table in rows.split("<tbody>")[1:]]
    assert [table[0] for table in tables] == [
        "blocks.0.attn.to_out",
        "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;",
        "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;",  # 8 bits before 4
    ]
    assert [len(table) for table in tables] == [3, 3, 2]


def test_a_report_of_nothing_says_so(tmp_path):
    page = Page(write(empty_report(), tmp_path / "report.html"))
    assert not page.images()
    for text in ("not evaluated", "nothing was saved", "Balancing was off: the model was quantized as it is."):
        assert text in page.text
    assert "Please read" not in page.text and "Samples" not in page.text


def test_balancing_that_found_no_site_is_not_called_off(tmp_path):
    page = Page(write(empty_report() | {"settings": full_report()["settings"]}, tmp_path / "report.html"))
    assert "0 of 0none found" in page.text
    assert "Balancing was off" not in page.text


def test_null_numbers_become_dashes(tmp_path, charts):
    report = full_report()
    report["evaluation"] |= {"sqnr_db": None, "per_timestep": [[900, None]]}
    report["sites"][0] |= {"b": [None, None], "salience_t": [None, None]}
    report["seconds"] = {"export": None}
    text = Page(write(report, tmp_path / "report.html")).text
    assert "– dB" in text and "– s" in text
    assert "nan" not in text and "None" not in text


def test_a_large_model_shows_a_choice_and_tables_all(tmp_path, charts):
    report = full_report()
    report["sites"] = [folded(f"blocks.{i:02}.ff", [1.0, 2.0 + i]) for i in range(84)]
    report["layers"] = [layer(f"blocks.{i:03}.linear", 50.0 - i / 10) for i in range(280)]
    report["notes"] = [f"note number {i}." for i in range(30)]
    text = Page(write(report, tmp_path / "report.html")).text
    assert "Showing the 12 sites with the widest b range of 84." in text
    assert "Showing the 40 layers with the lowest SQNR of 280." in text
    assert [site["name"] for site in charts["salience_chart"]] == [f"blocks.{i}.ff" for i in range(83, 71, -1)]
    assert [entry["name"] for entry in charts["layer_chart"]] == [f"blocks.{i}.linear" for i in range(279, 239, -1)]
    for entry in (*report["sites"], *report["layers"]):
        assert entry["name"] in text
    assert all(note in text for note in report["notes"]) and "22 more" in text


def test_what_costs_most_is_shown_and_the_rest_counted(tmp_path, charts):
    report = full_report() | {"leave_one_out": left_out(30)}
    text = Page(write(report, tmp_path / "report.html")).text
    assert [entry["name"] for entry in charts["leave_one_out_chart"]] == [f"blocks.{i}.ff" for i in range(20)]
    assert "The 20 that cost most, of 30." in text


def test_why_no_layer_was_left_out(tmp_path, charts):
    report = full_report() | {"leave_one_out": {"skipped": "8 samples are too few for <30> quantized inputs"}}
    text = Page(write(report, tmp_path / "report.html")).text
    assert (
        "Not measured: 8 samples are too few for <30> quantized inputs." in text and "leave_one_out_chart" not in charts
    )


def test_layers_without_several_timesteps_have_no_heat_map(tmp_path, charts):
    report = full_report()
    assert [entry["name"] for entry in plots.layers_by_timestep(report["layers"])] == ["blocks.0.attn.to_q"]
    for entry in report["layers"]:
        entry["sqnr_db_t"] = entry["sqnr_db_t"][:1]
    Page(write(report, tmp_path / "report.html"))
    assert "heat_map" not in charts


def test_refusals_stand_under_their_reason_with_the_sites_they_hold_for(tmp_path, charts):
    sites = [refused(f"blocks.{i}.ff", f"gelu_{i}: <gelu> does not commute") for i in range(40)]
    sites += [refused("blocks.0.out", "its input: no channel is free"), refused("x", "left as it is: it is best")]
    page = Page(write(full_report() | {"sites": sites}, tmp_path / "report.html"))
    reasons = page.text[page.text.index("Not balanced, and why") : page.text.index("All 42 sites")]
    assert reasons.count("<gelu> does not commute 40 sites") == 1 and "gelu_" not in reasons
    assert "no channel is free 1 site" in reasons and "left as it is: it is best 1 site" in reasons
    assert all(site["name"] in reasons for site in sites)


def test_every_cell_but_the_name_tells_its_heading_to_a_narrow_page(tmp_path, charts):
    page = Page(write(full_report(), tmp_path / "report.html"))
    cells = [attributes for tag, attributes in page.tags if tag == "td"]
    assert len(cells) == 3 * 8 + 3 * 8 + 2 * 4
    assert [cell.get("data-label") for cell in cells[:3]] == [None, "Channels", "b"]
    assert sum("data-label" not in cell for cell in cells) == 8


def test_other_aggregations_do_not_claim_the_ssc_weights(tmp_path, charts):
    report = full_report()
    report["settings"]["method"] = "max"
    claim = "This run aggregated with max and did not use these weights."
    assert claim in Page(write(report, tmp_path / "report.html")).text


def test_an_entry_without_optional_keys_is_enough(tmp_path, charts):
    report = full_report()
    for entry in report["layers"]:
        del entry["reason"]
        del entry["sqnr_db_t"]
    for key in ("rho", "eta", "salience_t"):
        del report["sites"][0][key]
    Page(write(report, tmp_path / "report.html"))
    assert [site["name"] for site in charts["ssc_chart"]] == [report["sites"][1]["name"]]


@pytest.mark.parametrize("given", ["float_images", "quantized_images"])
def test_one_batch_alone_is_refused(tmp_path, given):
    with pytest.raises(ArgumentError, match="only one of float_images and quantized_images is given"):
        write_html(empty_report(), tmp_path / "report.html", **{given: torch.zeros(1, 1, 2, 2)})


def test_batches_of_different_shape_are_refused(tmp_path):
    images = {"float_images": torch.zeros(2, 1, 2, 2), "quantized_images": torch.zeros(1, 1, 2, 2)}
    with pytest.raises(ArgumentError, match=r"float_images have shape \(2, 1, 2, 2\) and quantized_images \(1, 1"):
        write_html(empty_report(), tmp_path / "report.html", **images)


def test_without_matplotlib_the_extra_is_named_and_the_old_page_stays(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name="matplotlib")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(MissingDependencyError, match=r"ptq4dit-ao\[report\]"):
        write_html(empty_report(), path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
