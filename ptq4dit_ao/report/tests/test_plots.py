"""Image grids pixel by pixel, and charts by what they plot."""

from __future__ import annotations

import importlib
import math
import os
from io import BytesIO

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib._pylab_helpers import Gcf
from matplotlib.image import imread

from ptq4dit_ao.errors import ArgumentError, MissingDependencyError
from ptq4dit_ao.report import plots

GREY = 128


def pixels(png: bytes) -> np.ndarray:
    """PNG -> (H, W) or (H, W, 3) in 0 .. 255."""
    return np.rint(imread(BytesIO(png)) * 255).astype(int)


def site(name: str, b: list[float | None], **changes: object) -> dict:
    values = {
        "name": name,
        "status": "folded",
        "b": b,
        "salience_x": [4.0, 1.0, 9.0][: len(b)],
        "salience_w": [1.0, 2.0, 3.0][: len(b)],
        "timesteps": [900, 500, 100],
        "salience_t": [9.0, 8.0, 4.0],
        "rho": [0.5, -0.5, 0.0],
        "eta": [0.2, 0.5, 0.3],
    }
    return values | changes


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were about to be encoded."""
    figures = []
    monkeypatch.setattr(plots, "_png", lambda figure: figures.append(figure) or b"")
    return figures


def test_grid_places_images_row_by_row_with_grey_lines_between():
    images = torch.tensor([-1.0, -0.5, 0.0, 1.0]).view(4, 1, 1, 1).expand(4, 1, 2, 3)
    got = pixels(plots.image_grid(images, columns=2, scale=1))
    a, b, c, d = 0, 64, 128, 255
    assert got.tolist() == [
        [a, a, a, GREY, b, b, b],
        [a, a, a, GREY, b, b, b],
        [GREY] * 7,
        [c, c, c, GREY, d, d, d],
        [c, c, c, GREY, d, d, d],
    ]


def test_grid_keeps_orientation_and_colour():
    image = torch.rand(1, 3, 5, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    got = pixels(plots.image_grid(image, columns=1, scale=1))
    want = (image[0].permute(1, 2, 0).double().numpy() + 1) * 127.5
    assert got.shape == (5, 4, 3)
    assert np.abs(got - want).max() <= 0.5 + 1e-4


def test_grid_repeats_pixels_without_interpolation():
    images = torch.rand(4, 1, 3, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1
    small, large = (pixels(plots.image_grid(images, columns=2, scale=scale)) for scale in (1, 5))
    assert np.array_equal(large, np.kron(small, np.ones((5, 5), dtype=int)))


def test_grid_fills_an_incomplete_row_in_grey():
    got = pixels(plots.image_grid(torch.ones(3, 1, 2, 2), columns=2, scale=1))
    assert got.shape == (5, 5)
    assert (got[3:, 3:] == GREY).all() and (got[3:, :2] == 255).all()


def test_grid_clamps_and_draws_nan_black():
    images = torch.tensor([-7.0, 7.0, math.nan, math.inf, -math.inf]).view(5, 1, 1, 1)
    got = pixels(plots.image_grid(images, columns=5, scale=1))
    assert got[0, ::2].tolist() == [0, 255, 0, 255, 0]


def test_grid_computes_half_precision_in_single():
    images = torch.linspace(-1, 1, 64, dtype=torch.bfloat16).view(1, 1, 8, 8).requires_grad_()
    want = plots.image_grid(images.detach().float(), columns=1, scale=1)
    assert plots.image_grid(images, columns=1, scale=1) == want


@pytest.mark.parametrize("shape", [(3, 1, 8), (2, 2, 8, 8), (0, 1, 8, 8), (2, 1, 0, 8)])
def test_grid_refuses_other_shapes(shape):
    with pytest.raises(ArgumentError, match=r"images have shape .* expected \(N, 1 or 3, H, W\)"):
        plots.image_grid(torch.zeros(shape), columns=1, scale=1)


@pytest.mark.parametrize(("columns", "scale"), [(0, 1), (1, 0)])
def test_grid_refuses_counts_below_one(columns, scale):
    with pytest.raises(ArgumentError, match=f"columns is {columns} and scale is {scale}; both must be at least 1"):
        plots.image_grid(torch.zeros(1, 1, 2, 2), columns, scale)


def test_saved_grid_needs_no_matplotlib(tmp_path, monkeypatch):
    images = torch.zeros(20, 1, 2, 2)
    with monkeypatch.context() as patch:
        patch.setattr(importlib, "import_module", lambda name: pytest.fail(f"{name} was imported"))
        plots.save_image_grid(images, tmp_path / "new" / "samples.png")
    assert imread(tmp_path / "new" / "samples.png").shape == ((2 * 3 - 1) * 8, (10 * 3 - 1) * 8)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    target = tmp_path / "samples.png"
    target.write_bytes(b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        plots.save_image_grid(torch.zeros(1, 1, 2, 2), target)
    assert [path.name for path in tmp_path.iterdir()] == ["samples.png"]
    assert target.read_bytes() == b"old"


def test_widest_sites_come_first_once_there_are_too_many():
    sites = [
        site("narrow", [1.0, 2.0]),
        site("wide", [0.01, 1.0]),
        site("no", [], status="refused"),
        site("mid", [9, 1]),
    ]
    assert [s["name"] for s in plots.widest_sites(sites, limit=2)] == ["wide", "mid"]
    assert [s["name"] for s in plots.widest_sites(sites, limit=3)] == ["narrow", "wide", "mid"]


def test_range_of_b_ignores_what_is_not_a_positive_number():
    assert plots.b_range({"b": [None, 0.5, 0.0, 3.0]}) == (0.5, 3.0)
    assert plots.b_range({"b": [None]}) == plots.b_range({}) == (1.0, 1.0)


def test_worst_layers_leave_out_those_not_measured():
    layers = [{"name": name, "sqnr_db": db} for name, db in (("a", 30.0), ("b", None), ("c", -2.0), ("d", 10.0))]
    assert [layer["name"] for layer in plots.worst_layers(layers, limit=2)] == ["c", "d"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0012345, "0.00123"), (12.345, "12.3"), (1000.0, "1,000"), (54321.0, "54,321"), (3e9, "3e+09")],
)
def test_short_numbers(value, text):
    assert plots.short(value) == text


def test_salience_chart_divides_x_and_multiplies_w_in_the_order_of_x(drawn):
    plots.salience_chart([site("block", [2.0, 0.5, 3.0])])
    before, after = drawn[0].axes
    w, x = (list(line.get_ydata()) for line in before.lines)
    assert (x, w) == ([9.0, 4.0, 1.0], [3.0, 1.0, 2.0])
    w, x = (list(line.get_ydata()) for line in after.lines)
    assert (x, w) == ([3.0, 2.0, 2.0], [9.0, 2.0, 1.0])
    assert before.get_yscale() == "log" and after.get_ylim() == before.get_ylim()
    assert after.texts[0].get_text() == "after, b 0.5 to 3"


def test_timestep_chart_sorts_by_timestep_leaves_gaps_and_runs_from_noise_to_image(drawn):
    plots.timestep_sqnr_chart([[900, 10.0], [100, 30.0], [500, None]], 12.0)
    (axes,) = drawn[0].axes
    curve, pooled = axes.lines
    assert list(curve.get_xdata()) == [100, 500, 900]
    assert np.array_equal(curve.get_ydata(), [30.0, np.nan, 10.0], equal_nan=True)
    assert list(pooled.get_ydata()) == [12.0, 12.0]
    assert axes.xaxis_inverted()
    assert "dB" in axes.get_ylabel()


def test_ssc_chart_plots_rho_eta_and_equal_weights(drawn):
    plots.ssc_chart([site("block", [1.0])])
    rho, eta = drawn[0].axes
    assert list(rho.lines[1].get_ydata()) == [0.0, -0.5, 0.5]
    assert list(eta.lines[0].get_ydata()) == [0.3, 0.5, 0.2]
    assert list(eta.lines[1].get_ydata()) == pytest.approx([1 / 3, 1 / 3])


def test_sites_beyond_the_limit_are_grey_and_counted_in_the_legend(drawn):
    sites = [site(f"block.{i}", [1.0, 2.0 + i]) for i in range(plots.MAX_SITES + 5)]
    plots.activation_chart(sites)
    names = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert names == [f"block.{i}" for i in range(plots.MAX_SITES + 4, 4, -1)] + ["the 5 other sites"]
    lines = drawn[0].axes[0].lines
    looks = [(line.get_color(), line.get_linestyle()) for line in lines]
    assert len(lines) == len(sites) and len(set(looks)) == plots.MAX_SITES + 1


def test_layer_chart_draws_from_top_to_bottom(drawn):
    plots.layer_chart([{"name": "worst", "sqnr_db": 3.0}, {"name": "best", "sqnr_db": 9.0}])
    (axes,) = drawn[0].axes
    assert [bar.get_width() for bar in axes.patches] == [3.0, 9.0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["worst", "best"]
    assert axes.yaxis_inverted()


def heated(name: str, *values: float | None) -> dict:
    by_timestep = [[t, db] for t, db in zip((100, 500, 900), values, strict=True)]
    return {"name": name, "sqnr_db_t": by_timestep, "activation_clipping": 0.5, "weight_clipping": 0.75}


def test_heat_map_runs_from_noise_to_image_and_from_the_first_layer_to_the_last(drawn):
    plots.heat_map([heated("first", 1.0, 2.0, 3.0), heated("last", None, 5.0, 6.0)])
    heat, ranges, *_ = drawn[0].axes
    (image,) = heat.images
    assert np.array_equal(np.ma.filled(image.get_array(), np.nan), [[3, 2, 1], [6, 5, np.nan]], equal_nan=True)
    assert [label.get_text() for label in heat.get_xticklabels()] == ["900", "500", "100"]
    assert [label.get_text() for label in heat.get_yticklabels()] == ["first", "last"]
    assert heat.get_ylim()[0] > heat.get_ylim()[1]  # the first on top
    assert [list(line.get_xdata()) for line in ranges.lines] == [[0.5, 0.5], [0.75, 0.75]]


def test_heat_map_of_many_layers_names_some(drawn):
    plots.heat_map([heated(f"layer.{i}", 1.0 + i, 2.0, 3.0) for i in range(300)])
    heat = drawn[0].axes[0]
    names = [label.get_text() for label in heat.get_yticklabels()]
    assert 40 <= len(names) <= 60 and names[1] == "layer.5"
    assert drawn[0].get_size_inches()[1] < 11
    assert heat.images[0].get_clim() == (2.0, 282.0)  # 18 of 900 lie above, as many below


def test_leave_one_out_chart_shows_gains_with_their_sign(drawn):
    plots.leave_one_out_chart([{"name": "a", "gain_db": 1.5}, {"name": "b", "gain_db": -0.25}])
    texts = [text.get_text() for text in drawn[0].axes[0].texts]
    assert texts == ["+1.50", "-0.25"]


@pytest.mark.filterwarnings("error")
def test_charts_take_odd_names_and_missing_numbers_and_leave_no_state():
    odd = site("_$\\frac{$<b>" + "x" * 200, [None, 1.0, 2.0], salience_x=[None, 0.0, 0.0], salience_w=[0.0, None, 0.0])
    odd |= {"salience_t": [None, None, None], "rho": [None, 0.1, 0.2], "eta": None}
    settings = dict(matplotlib.rcParams)
    charts = (
        plots.salience_chart([odd]),
        plots.activation_chart([odd]),
        plots.ssc_chart([odd]),
        plots.layer_chart([{"name": odd["name"], "sqnr_db": -3.0}]),
        plots.timestep_sqnr_chart([[7, 3.0]], None),
        plots.heat_map([heated(odd["name"], -3.0, None, 3.0) | {"weight_clipping": None}]),
        plots.leave_one_out_chart([{"name": odd["name"], "gain_db": -3.0}]),
    )
    assert all(imread(BytesIO(png)).shape[1] == 1760 for png in charts)
    assert dict(matplotlib.rcParams) == settings and not Gcf.figs


def test_a_chart_without_matplotlib_names_the_extra(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name="matplotlib")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(MissingDependencyError, match=r"ptq4dit-ao\[report\]"):
        plots.layer_chart([{"name": "a", "sqnr_db": 1.0}])
