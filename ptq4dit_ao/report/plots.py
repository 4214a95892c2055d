"""The pictures of a report: plain data in, PNG bytes out.

Image grids are encoded with the standard library alone, so sampling needs no plotting package. The charts import
matplotlib when they are drawn, use its object-oriented interface and leave no global state behind.
"""

from __future__ import annotations

import math
import os
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ptq4dit_ao._files import replacing_file
from ptq4dit_ao._optional import require
from ptq4dit_ao._paths import as_path
from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.report.types import LayerEntry, LeftOutEntry, SiteEntry

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

Entry = Mapping[str, Any]
"""A site or a layer, as report.json holds it."""
Curve = Literal["salience_t", "rho", "eta"]
"""A vector of a site with an element for each timestep."""
_CLIPPING: tuple[Literal["activation_clipping"], Literal["weight_clipping"]]
_CLIPPING = ("activation_clipping", "weight_clipping")

# Okabe and Ito's palette without yellow and black: told apart with any kind of colour vision, and on white.
BLUE, VERMILLION, GREEN, PURPLE, SKY, ORANGE = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"
GREY, INK = "#9a9a9a", "#222222"
_COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, SKY, ORANGE)
_SERIES = tuple((colour, style, marker) for style, marker in (("-", "o"), ("--", "^")) for colour in _COLOURS)

MAX_SITES = 12
"""Sites drawn by name; a DiT-XL/2 has 84."""
MAX_LAYERS = 40
"""Bars of the layer chart."""
MAX_INPUTS = 20
"""Bars of the chart of what layers cost."""

_GREY_LEVEL = 128
_WIDTH_IN = 11.0
_DPI = 160
_SMALL, _TEXT = 7.5, 8.5
_ROW_IN, _PANEL_IN, _GAP_IN, _INNER_GAP_IN = 1.75, 1.2, 0.5, 0.14
_HEAT_ROW_IN, _HEAT_IN, _HEAT_COLUMNS = 0.155, 9.3, 26
_TOP_IN, _BOTTOM_IN, _LEFT_IN, _RIGHT_IN = 0.05, 0.5, 0.75, 0.12


# Image grids


def image_grid(images: Tensor, columns: int, scale: int) -> bytes:
    """Images side by side, left to right and top to bottom, each pixel ``scale`` pixels wide.

    A grey line of ``scale`` pixels parts them, and grey fills up an incomplete last row. NaN is drawn black.

    Args:
        images: (N, 1 or 3, H, W) in [-1, 1]; values outside are clamped.
        columns: images per row.
        scale: how often each pixel is repeated both ways; nothing is interpolated.

    Returns:
        A PNG of ``(columns * (W + 1) - 1) * scale`` by ``(ceil(N / columns) * (H + 1) - 1) * scale`` pixels.

    Raises:
        ArgumentError: ``images`` has another shape, or ``columns`` or ``scale`` is below 1.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise ArgumentError(f"images have shape {tuple(images.shape)}; expected (N, 1 or 3, H, W), none of them 0")
    if columns < 1 or scale < 1:
        raise ArgumentError(f"columns is {columns} and scale is {scale}; both must be at least 1")
    count, channels, height, width = images.shape
    rows = math.ceil(count / columns)
    # Every cell carries its parting line below and to the right; those of the last row and column are cut off.
    cells = torch.full((rows * columns, channels, height + 1, width + 1), _GREY_LEVEL, dtype=torch.uint8)
    cells[:count, :, :-1, :-1] = _to_uint8(images)
    grid = cells.reshape(rows, columns, channels, height + 1, width + 1).permute(0, 3, 1, 4, 2)
    grid = grid.reshape(rows * (height + 1), columns * (width + 1), channels)[:-1, :-1]
    return _encode_png(grid.repeat_interleave(scale, 0).repeat_interleave(scale, 1))


def save_image_grid(images: Tensor, path: str | os.PathLike[str], columns: int = 10, scale: int = 8) -> None:
    """Write :func:`image_grid` to ``path``; an existing file is replaced whole or not at all."""
    replace_file(as_path(path), image_grid(images, columns, scale))


def replace_file(path: Path, data: bytes) -> None:
    """Write ``data`` in place of what was there; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as temporary:
        temporary.write_bytes(data)


def _to_uint8(images: Tensor) -> Tensor:
    images = images.detach().to("cpu", torch.float32).nan_to_num(nan=-1.0)
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def _encode_png(pixels: Tensor) -> bytes:
    """(H, W, 1 or 3) uint8 -> PNG, 8 bits a channel."""
    height, width, channels = pixels.shape
    colour_type = {1: 0, 3: 2}[channels]
    # Every row starts with the number of its filter; 0 stores the pixels as they are.
    rows = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), pixels.reshape(height, -1)], dim=1)
    header = struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)
    body = zlib.compress(rows.numpy().tobytes())
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


# What to draw


def numbers(values: Iterable[float | None] | None) -> list[float]:
    """JSON numbers as floats; null, which stands for infinite or NaN, becomes NaN and is not drawn."""
    return [math.nan if value is None else float(value) for value in values or ()]


def short(value: float) -> str:
    """About three digits, never as a power of ten for 1000 and the like."""
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e6 else f"{value:.3g}"


def b_range(site: SiteEntry) -> tuple[float, float]:
    """Smallest and largest b of a site; (1, 1) where it has none."""
    b = [value for value in numbers(site.get("b")) if value > 0]
    return (min(b), max(b)) if b else (1.0, 1.0)


def folded_sites(sites: Iterable[SiteEntry]) -> list[SiteEntry]:
    """The sites that were balanced, in the order of the model."""
    return [site for site in sites if site["status"] == "folded"]


def widest_sites(sites: Iterable[SiteEntry], limit: int = MAX_SITES) -> list[SiteEntry]:
    """The ``limit`` folded sites whose b spans the most, widest first; all in the model's order if they fit."""
    folded = folded_sites(sites)
    if len(folded) <= limit:
        return folded

    def span(site: SiteEntry) -> float:
        low, high = b_range(site)
        return high / low

    return sorted(folded, key=span, reverse=True)[:limit]


def worst_layers(layers: Iterable[LayerEntry], limit: int = MAX_LAYERS) -> list[LayerEntry]:
    """The ``limit`` layers of the lowest measured SQNR, lowest first."""
    measured = [layer for layer in layers if layer.get("sqnr_db") is not None]
    return sorted(measured, key=lambda layer: layer["sqnr_db"] or 0.0)[:limit]


def layers_by_timestep(layers: Iterable[LayerEntry]) -> list[LayerEntry]:
    """The layers that have an error at some of several timesteps."""
    measured = [layer for layer in layers if any(db is not None for _, db in layer.get("sqnr_db_t") or ())]
    return measured if len({t for layer in measured for t, _ in layer["sqnr_db_t"]}) > 1 else []


# Charts


def timestep_sqnr_chart(per_timestep: Sequence[Sequence[float | None]], pooled_db: float | None) -> bytes:
    """SQNR of the predicted noise over the timesteps, with the pooled value as a dashed line."""
    figure = _figure(2.9)
    axes = figure.subplots()
    _timestep_axes(axes, "eps SQNR (dB)")
    timesteps, (sqnr,) = _by_timestep([t for t, _ in per_timestep], [db for _, db in per_timestep])
    axes.plot(timesteps, sqnr, color=BLUE, linewidth=1.6, **_dots(timesteps, "o"))
    if pooled_db is not None:
        axes.axhline(pooled_db, color=INK, linewidth=1, linestyle="--")
        _annotate(axes, f"pooled over all timesteps: {pooled_db:.1f} dB", pooled_db)
    return _png(figure)


def salience_chart(sites: Sequence[SiteEntry]) -> bytes:
    """Two panels for each site, before and after balancing: s(X) and s(W) of every b, sorted by s(X) before."""
    columns = min(2, len(sites))
    rows = math.ceil(len(sites) / columns)
    height_in = _TOP_IN + rows * _ROW_IN + _BOTTOM_IN
    # Laid out by hand: constrained layout takes seconds for this many panels.
    figure = _figure(height_in, layout=None)
    pair_in = (_WIDTH_IN - _LEFT_IN - _RIGHT_IN + _GAP_IN) / columns
    panel_in = (pair_in - _GAP_IN - _INNER_GAP_IN) / 2
    handles: list[Line2D] = []
    for index, site in enumerate(sites):
        row, column = divmod(index, columns)
        left, bottom = _LEFT_IN + column * pair_in, _BOTTOM_IN + (rows - 1 - row) * _ROW_IN
        before, after = (
            figure.add_axes((x / _WIDTH_IN, bottom / height_in, panel_in / _WIDTH_IN, _PANEL_IN / height_in))
            for x in (left, left + panel_in + _INNER_GAP_IN)
        )
        handles = _salience_pair(before, after, site)
    label: dict[str, Any] = {"fontsize": _TEXT, "color": INK}
    figure.supxlabel("balanced channel, sorted by s(X) before balancing", y=0.06 / height_in, va="bottom", **label)
    figure.supylabel("salience, largest magnitude", x=0.005, ha="left", **label)
    _legend(figure, handles, ["s(X), activations", "s(W), weights"], loc="upper right", markerscale=2)
    return _png(figure)


def activation_chart(sites: Sequence[SiteEntry]) -> bytes:
    """Largest magnitude of any channel over the timesteps, a line a site; beyond MAX_SITES the rest is grey."""
    figure = _figure(3.3 + 0.16 * _legend_rows(sites))
    axes = figure.subplots()
    _timestep_axes(axes, "largest |x| of any channel")
    handles, names = _site_lines(axes, sites, "salience_t")
    _log_scale(axes)
    _legend(figure, handles, names, loc="outside lower left")
    return _png(figure)


def ssc_chart(sites: Sequence[SiteEntry]) -> bytes:
    """Spearman's rho and the weight that SSC gives each timestep, a line a site."""
    figure = _figure(2.9 + 0.16 * _legend_rows(sites))
    left, right = figure.subplots(1, 2)
    _timestep_axes(left, "Spearman's $\\rho_t$ of s(X) and s(W)")
    left.axhline(0, color=INK, linewidth=0.8, linestyle="--")
    handles, names = _site_lines(left, sites, "rho")
    _timestep_axes(right, "SSC weight $\\eta_t$ (sums to 1)")
    _site_lines(right, sites, "eta")
    counts = {len(site.get("eta") or ()) for site in sites} - {0}
    if len(counts) == 1:
        equal = 1 / counts.pop()
        right.axhline(equal, color=INK, linewidth=0.8, linestyle="--")
        _annotate(right, "equal weights", equal)
    _legend(figure, handles, names, loc="outside lower left")
    return _png(figure)


def layer_chart(layers: Sequence[LayerEntry]) -> bytes:
    """SQNR of each layer as a horizontal bar, in the order given, top to bottom."""
    return _bars(layers, "sqnr_db", "SQNR (dB), higher is better", "%.1f")


def leave_one_out_chart(inputs: Sequence[LeftOutEntry]) -> bytes:
    """Bars of what the output gains when these layers alone are put back to float, top to bottom."""
    return _bars(inputs, "gain_db", "gain in eps SQNR (dB) if only these layers stayed float", "%+.2f")


def _bars(entries: Sequence[Entry], key: str, label: str, form: str) -> bytes:
    figure = _figure(0.7 + 0.19 * len(entries))
    axes = figure.subplots()
    _style(axes, label, "")
    bars = axes.barh(range(len(entries)), numbers(entry[key] for entry in entries), color=BLUE, height=0.7)
    axes.bar_label(bars, fmt=form, padding=3, fontsize=_SMALL, color=INK)
    axes.set_yticks(range(len(entries)), [_shorten(entry["name"], 64) for entry in entries], parse_math=False)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.06)
    axes.set_ylim(len(entries) - 0.5, -0.5)
    return _png(figure)


def heat_map(layers: Sequence[LayerEntry]) -> bytes:
    """SQNR of each layer at each timestep, in execution order from the top, and beside it what its ranges cover."""
    timesteps = sorted({t for layer in layers for t, _ in layer["sqnr_db_t"]}, reverse=True)
    rows = [numbers(dict(layer["sqnr_db_t"]).get(t) for t in timesteps) for layer in layers]
    figure = _figure(1.2 + min(len(layers) * _HEAT_ROW_IN, _HEAT_IN))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(5, 1))
    _style(left, "timestep t (sampling runs left to right, from noise to image)", "")
    left.grid(visible=False)
    finite = sorted(db for row in rows for db in row if math.isfinite(db))
    low, high = finite[len(finite) // 50], finite[-1 - len(finite) // 50]  # 2 % off each end: a few would eat the scale
    image = left.imshow(rows, aspect="auto", cmap="viridis", vmin=low, vmax=high, interpolation="nearest")
    left.set_facecolor("#dddddd")
    bar = figure.colorbar(image, ax=left, location="top", aspect=90, pad=0.01, extend="both")
    bar.set_label("SQNR (dB)", fontsize=_TEXT, color=INK)
    bar.ax.tick_params(labelsize=_SMALL, labelcolor=INK)
    _some_ticks(left.xaxis, [f"{t:g}" for t in timesteps], _HEAT_COLUMNS)
    _some_ticks(left.yaxis, [_shorten(layer["name"], 48) for layer in layers], int(_HEAT_IN / _HEAT_ROW_IN))
    _ranges(right, layers)
    return _png(figure)


def _ranges(axes: Axes, layers: Sequence[LayerEntry]) -> None:
    """Dots of how much of the largest values each layer's ranges cover."""
    _style(axes, "range, of min to max", "")
    inputs, weights = ([layer[key] for layer in layers] for key in _CLIPPING)
    for found, colour, label in ((inputs, BLUE, "input"), (weights, ORANGE, "weight")):
        values = numbers(found)
        axes.plot(values, range(len(layers)), color=colour, linestyle="none", marker="o", markersize=2.5, label=label)
    axes.tick_params(axis="y", left=False, labelleft=False)
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, max(1.05, axes.dataLim.xmax * 1.05))
    axes.legend(fontsize=_SMALL, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), handletextpad=0.2)


def _some_ticks(axis: Axis, names: Sequence[str], most: int) -> None:
    """A name at every position, or at every so manieth if there are more than fit."""
    positions = range(0, len(names), math.ceil(len(names) / most))
    axis.set_ticks(positions, [names[i] for i in positions], fontsize=_SMALL, parse_math=False)


def _salience_pair(before: Axes, after: Axes, site: SiteEntry) -> list[Line2D]:
    b, salience_x, salience_w = (numbers(site[key]) for key in ("b", "salience_x", "salience_w"))
    order = sorted(range(len(b)), key=lambda i: math.inf if math.isnan(salience_x[i]) else -salience_x[i])
    balanced_x = [x / scale for x, scale in zip(salience_x, b, strict=True)]
    balanced_w = [w * scale for w, scale in zip(salience_w, b, strict=True)]
    handles = _salience_panel(before, [salience_x[i] for i in order], [salience_w[i] for i in order])
    _salience_panel(after, [balanced_x[i] for i in order], [balanced_w[i] for i in order])
    after.sharey(before)
    _log_scale(before)
    after.tick_params(labelleft=False)
    low, high = b_range(site)
    before.set_title(_shorten(site["name"], 58), loc="left", fontsize=_TEXT, color=INK, parse_math=False)
    for axes, label in ((before, "before"), (after, f"after, b {short(low)} to {short(high)}")):
        _text(axes, label, 0.98, 0.97, transform=axes.transAxes, ha="right", va="top")
    return handles


def _salience_panel(axes: Axes, salience_x: list[float], salience_w: list[float]) -> list[Line2D]:
    _style(axes, "", "")
    # Points, since neighbours in this order have nothing else in common. X lies on top as small points in wide ones,
    # for after balancing the two coincide.
    wide, small = (4.4, 1.8) if len(salience_x) <= 256 else (2.4, 0.9)
    style: dict[str, Any] = {"linestyle": "none", "marker": "o", "markeredgewidth": 0}
    (weights,) = axes.plot(salience_w, color=ORANGE, markersize=wide, **style)
    (activations,) = axes.plot(salience_x, color=BLUE, markersize=small, **style)
    return [activations, weights]


def _site_lines(axes: Axes, sites: Sequence[SiteEntry], key: Curve) -> tuple[list[Line2D], list[str]]:
    """One line a site; returns those to name in a legend, and the names."""
    named = widest_sites(sites)
    chosen = {id(site) for site in named}
    handles: list[Line2D] = []
    names = [_shorten(site["name"], 70) for site in named]
    rest = [site for site in sites if id(site) not in chosen]
    for site in rest:
        (line,) = _site_line(axes, site, key, color="#cccccc", linewidth=0.8, marker="")
        handles[:] = [line]
    for site, (colour, style, marker) in zip(named, _SERIES, strict=False):
        handles += _site_line(axes, site, key, color=colour, linestyle=style, linewidth=1.5, marker=marker)
    if rest:
        handles.append(handles.pop(0))
        names.append(f"the {len(rest)} other sites")
    return handles, names


def _site_line(axes: Axes, site: SiteEntry, key: Curve, **style: Any) -> list[Line2D]:
    measured = site.get(key) or ()
    timesteps, (values,) = _by_timestep(site["timesteps"] if measured else (), measured)
    return list(axes.plot(timesteps, values, **{**style, **_dots(timesteps, style["marker"])}))


def _by_timestep(
    timesteps: Sequence[float | None], *series: Sequence[float | None]
) -> tuple[list[float], list[list[float]]]:
    t = numbers(timesteps)
    order = sorted(range(len(t)), key=t.__getitem__)
    return [t[i] for i in order], [[values[i] for i in order] for values in map(numbers, series)]


def _dots(values: Sequence[float], marker: str) -> dict[str, Any]:
    """Mark the measured points as long as they can be told apart."""
    return {"marker": marker if len(values) <= 60 else "", "markersize": 3}


# Style


def _figure(height_in: float, layout: str | None = "constrained") -> Figure:
    module = require("matplotlib.figure", extra="report")
    figure: Figure = module.Figure(figsize=(_WIDTH_IN, height_in), dpi=_DPI, layout=layout, facecolor="white")
    return figure


def _png(figure: Figure) -> bytes:
    canvas = require("matplotlib.backends.backend_agg", extra="report").FigureCanvasAgg(figure)
    buffer = BytesIO()
    canvas.print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def _style(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set_facecolor("white")
    axes.set_axisbelow(True)
    axes.grid(color="#e6e6e6", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#bbbbbb")
    axes.tick_params(labelsize=_SMALL, color="#bbbbbb", labelcolor=INK)
    axes.set_xlabel(x_label, fontsize=_TEXT, color=INK)
    axes.set_ylabel(y_label, fontsize=_TEXT, color=INK)


def _timestep_axes(axes: Axes, y_label: str) -> None:
    _style(axes, "timestep t (sampling runs left to right, from noise to image)", y_label)
    axes.invert_xaxis()


def _log_scale(axes: Axes) -> None:
    """Logarithmic y, unless there is no positive value to show on it."""
    if math.isfinite(axes.dataLim.minposy):
        axes.set_yscale("log", nonpositive="mask")
        ticker = require("matplotlib.ticker", extra="report")
        low, high = axes.dataLim.minposy, axes.dataLim.ymax
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axes.minorticks_off()


def _annotate(axes: Axes, text: str, y: float) -> None:
    """Text at the right end of a horizontal line at ``y``."""
    _text(axes, text, 0.995, y, transform=axes.get_yaxis_transform(), ha="right", va="bottom")


def _text(axes: Axes, text: str, x: float, y: float, **place: Any) -> None:
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
    axes.text(x, y, text, fontsize=_SMALL, color=INK, bbox=box, **place)


def _legend(figure: Figure, handles: Sequence[Line2D], names: Sequence[str], **place: Any) -> None:
    # Names go in afterwards, as plain text: "$" would be typeset, and before 3.10 a name that starts with "_" left out.
    legend = figure.legend(handles, ["-"] * len(handles), ncols=2, fontsize=_SMALL, frameon=False, **place)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(text=name, parse_math=False, color=INK)


def _legend_rows(sites: Sequence[SiteEntry]) -> int:
    return math.ceil(min(len(sites), MAX_SITES + 1) / 2)


def _shorten(name: str, length: int) -> str:
    """Cut the middle out of a long name; its ends tell the block and the layer."""
    if len(name) <= length:
        return name
    half = (length - 1) // 2
    return f"{name[:half]}…{name[-half:]}"
