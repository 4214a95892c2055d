"""report.json as one HTML page: no network, no script, every picture inside the file."""

from __future__ import annotations

import base64
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from string import Template
from typing import Any, TypeVar

from torch import Tensor

from ptq4dit_ao._optional import require
from ptq4dit_ao._paths import as_path
from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.report import plots
from ptq4dit_ao.report.plots import Entry
from ptq4dit_ao.report.reasons import by_reason
from ptq4dit_ao.report.types import (
    AttentionEntry,
    DynamicEntry,
    EvaluationEntry,
    InputSizesEntry,
    LayerEntry,
    LeaveOneOutEntry,
    Report,
    SettingsEntry,
    SiteEntry,
    SizeEntry,
    WeightBitsEntry,
)

E = TypeVar("E", SiteEntry, LayerEntry)

_OPEN_ROWS = 30
"""Tables up to this length are shown unfolded."""
_OPEN_LINES = 8
_GRID_WIDTH_PX = 720
_WHITE_AT = 0.5
"""Pixel difference, in [-1, 1] units, that the difference grid shows as white: a quarter of the whole range."""


def write_html(
    report: Report,
    path: str | os.PathLike[str],
    *,
    float_images: Tensor | None = None,
    quantized_images: Tensor | None = None,
) -> None:
    """Write ``report`` as one self-contained page; an existing file is replaced whole or not at all.

    Args:
        report: what report.json holds; null stands for a number that is infinite or NaN.
        path: the HTML file to write.
        float_images: samples of the float model, (N, 1 or 3, H, W) in [-1, 1].
        quantized_images: samples of the quantized model from the same seeds, same shape.

    Raises:
        ArgumentError: only one of the two batches is given, or their shapes differ.
        MissingDependencyError: matplotlib is not installed.
    """
    require("matplotlib", extra="report")
    sections = (
        _headline(report),
        _notes(report["notes"]),
        _samples(float_images, quantized_images),
        _evaluation(report["evaluation"]),
        _balancing(report),
        _layers(report["layers"]),
        _weight_bits(report["weight_bits"]),
        _dynamic(report.get("dynamic")),
        _costs(report["leave_one_out"]),
        _input_sizes(report["inputs"]),
        _provenance(report),
    )
    page = _PAGE.substitute(
        title=escape(report["title"]), style=_STYLE, header=_header(report), main="\n".join(filter(None, sections))
    )
    plots.replace_file(as_path(path), page.encode("utf-8"))


# Sections, top to bottom


def _header(report: Report) -> str:
    model = report["model"]
    return (
        f'<p class="kicker">Quantization report</p>\n<h1>{escape(report["title"])}</h1>\n'
        f"<p>{escape(model['name'])}, {model['parameters']:,} parameters</p>"
    )


def _headline(report: Report) -> str:
    layers, sites = report["layers"], report["sites"]
    kept = _count(layers, "float")
    refused = _count(sites, "refused")
    cards = (
        _sqnr_card(report["evaluation"]),
        _size_card(report["size"]),
        _card(
            "Balanced sites",
            f"{_count(sites, 'folded')} <small>of {len(sites)}</small>",
            "balancing was off" if report["settings"] is None else f"{refused} refused" if sites else "none found",
        ),
        _card(
            "Integer layers",
            f"{_count(layers, 'integer')} <small>of {len(layers)}</small>",
            (f"{kept} kept in float" if kept else "none kept in float") + _attention(report["attention"]),
        ),
    )
    return f'<section class="cards">{"".join(cards)}</section>'


def _attention(attention: AttentionEntry | None) -> str:
    """The part of a sentence that follows the layers and says what attention computes in."""
    if attention is None:
        return "; attention in float"
    return f"; {attention['matmuls']} matmuls of attention in {' and '.join(map(str, attention['bits']))} bits"


def _sqnr_card(evaluation: EvaluationEntry | None) -> str:
    if evaluation is None:
        return _card("eps SQNR", "–", "not evaluated")
    value = _number(evaluation["sqnr_db"], ".1f")
    return _card("eps SQNR", f"{value} <small>dB</small>", _draws(evaluation))


def _size_card(size: SizeEntry | None) -> str:
    if size is None:
        return _card("Size", "–", "nothing was saved")
    before, after = size["float32_bytes"], size["artifact_bytes"]
    ratio = f"{before / after:.2f} <small>times smaller</small>"
    return _card("Size", ratio, f"{_bytes(before)} in float32 → {_bytes(after)}")


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    return f'<section class="notes"><h2>Please read</h2>{_bullets(notes)}</section>'


def _samples(float_images: Tensor | None, quantized_images: Tensor | None) -> str:
    if float_images is None and quantized_images is None:
        return ""
    if float_images is None or quantized_images is None:
        raise ArgumentError("only one of float_images and quantized_images is given; give both, or neither")
    if float_images.shape != quantized_images.shape:
        raise ArgumentError(
            f"float_images have shape {tuple(float_images.shape)} and quantized_images "
            f"{tuple(quantized_images.shape)}; both must come from the same seeds"
        )
    reference, quantized = float_images.detach().float().cpu(), quantized_images.detach().float().cpu()
    difference = (reference - quantized).abs().amax(1, keepdim=True)
    grids = (
        _grid(reference, "Float", "Samples of the float model"),
        _grid(quantized, "Quantized", "Samples of the quantized model, from the same seeds"),
        _grid(
            difference * (2 / _WHITE_AT) - 1,
            "Difference",
            f"Difference of the two: on average {difference.mean().item():.3f}, at most {difference.max().item():.3f}",
        ),
    )
    caption = (
        f"{len(reference)} samples from the same seeds. Difference: black where equal, white from a difference of "
        f"{_WHITE_AT:g} on, with pixels in [−1, 1]; mean {difference.mean().item():.3f}, "
        f"largest {difference.max().item():.2f}."
    )
    return _section("Samples", "", f'<div class="grids">{"".join(grids)}</div><p class="caption">{caption}</p>')


def _evaluation(evaluation: EvaluationEntry | None) -> str:
    if evaluation is None or not evaluation["per_timestep"]:
        return ""
    per_timestep = evaluation["per_timestep"]
    measured = [(t, db) for t, db in per_timestep if db is not None]
    alt = f"Line chart of the eps SQNR at {len(per_timestep)} timesteps"
    if measured:
        (worst_t, worst), (best_t, best) = (choose(measured, key=lambda pair: pair[1]) for choose in (min, max))
        alt += f": lowest {worst:.1f} dB at t = {worst_t:g}, highest {best:.1f} dB at t = {best_t:g}"
    intro = (
        "Signal-to-quantization-noise ratio of the predicted noise, float against quantized on equal inputs "
        f"({_draws(evaluation)}). Higher is better: at 20&nbsp;dB the error is 10&nbsp;% of the signal, "
        "at 40&nbsp;dB 1&nbsp;%."
    )
    chart = plots.timestep_sqnr_chart(per_timestep, evaluation["sqnr_db"])
    return _section("Predicted noise per timestep", intro, _figure(chart, alt))


def _balancing(report: Report) -> str:
    sites, settings = report["sites"], report["settings"]
    if settings is None and not sites:
        return _section("Balancing", "Balancing was off: the model was quantized as it is.", "")
    intro = "Balancing was off." if settings is None else _settings(settings)
    parts = [_salience(sites), _activations(sites), _ssc(sites, settings), _refusals(sites), _sites_table(sites)]
    return _section("Balancing", intro, "\n".join(filter(None, parts)))


def _settings(settings: SettingsEntry) -> str:
    bound = settings["max_scale"]
    return (
        "Each balanced channel of an activation is divided by its b and the weights that read it are multiplied by "
        "it, which leaves the product as it was. The division is folded into the parameters named below. "
        f"Method {_chosen(settings, ', alpha ')}, "
        f"b bounded to [1/{_number(bound, 'g')}, {_number(bound, 'g')}], "
        f"fold form {escape(str(settings['fold_form']))}."
    )


def _salience(sites: Sequence[SiteEntry]) -> str:
    folded = plots.folded_sites(sites)
    if not folded:
        return ""
    shown = plots.widest_sites(sites)
    lows, highs = zip(*map(plots.b_range, shown), strict=True)
    alt = (
        f"Salience of activations and weights per channel before and after balancing at {len(shown)} sites; "
        f"b lies between {plots.short(min(lows))} and {plots.short(max(highs))}"
    )
    caption = (
        f"{_shown(shown, folded)} Where the peaks of activations (blue) and weights (orange) fall on different "
        "channels, balancing has something to give. Afterwards both sides share the load; with alpha 0.5 they "
        "coincide, unless b was clipped."
    )
    return "<h3>Salience before and after</h3>" + _figure(plots.salience_chart(shown), alt, caption)


def _activations(sites: Sequence[SiteEntry]) -> str:
    measured = [site for site in plots.folded_sites(sites) if site.get("salience_t")]
    if not measured:
        return ""
    largest = max((x for site in measured for x in site["salience_t"] if x is not None), default=math.nan)
    alt = f"Line chart of the largest activation per timestep at {len(measured)} sites, up to {plots.short(largest)}"
    caption = (
        "Measured before balancing. One activation scale serves all timesteps, so where a line is steep that scale is "
        "coarse for some of them."
    )
    return "<h3>Activations over the timesteps</h3>" + _figure(
        plots.activation_chart(measured), alt, f"{_named(measured)} {caption}"
    )


def _ssc(sites: Sequence[SiteEntry], settings: SettingsEntry | None) -> str:
    measured = [site for site in plots.folded_sites(sites) if site.get("rho") or site.get("eta")]
    if not measured:
        return ""
    alt = f"Two line charts over the timesteps at {len(measured)} sites: Spearman's rho, and the weight SSC derives"
    caption = (
        "The fewer channels are loud on both sides (low rho), the more balancing has to give, and the more that "
        "timestep weighs: eta is proportional to exp(−rho)."
    )
    if settings is not None and settings["method"] != "ssc":
        caption += f" This run aggregated with {escape(str(settings['method']))} and did not use these weights."
    return "<h3>Timestep weights</h3>" + _figure(plots.ssc_chart(measured), alt, f"{_named(measured)} {caption}")


def _refusals(sites: Sequence[SiteEntry]) -> str:
    """Each reason with the sites it holds for, so that a folded table hides none."""
    reasons = by_reason((s["name"], s["reason"]) for s in sites if s["status"] == "refused" and s["reason"])
    if not reasons:
        return ""
    items = [f"<li>{escape(why)} {_folded_names(names)}</li>" for why, names in reasons.items()]
    return f'<h3>Not balanced, and why</h3><ul class="reasons">{"".join(items)}</ul>'


def _folded_names(names: Sequence[str]) -> str:
    items = "".join(f"<li>{_code(name)}</li>" for name in names)
    count = f"{len(names)} site{'' if len(names) == 1 else 's'}"
    return f"<details><summary>{count}</summary><ul>{items}</ul></details>"


def _sites_table(sites: Sequence[SiteEntry]) -> str:
    columns = (
        "Site",
        "#Channels",
        "#b",
        "Status",
        "Method, alpha",
        "Range of b",
        "#Clipped",
        "Folded into, or why not",
    )
    rows = [
        (
            _code(site["name"]),
            f"{site['channels']:,}",
            f"{site['variables']:,}",
            _status(site["status"]),
            _chosen(site) if site["status"] == "folded" else "–",
            _site_range(site),
            f"{site['num_clipped']:,}" if site["status"] == "folded" else "–",
            _outcome(site),
        )
        for site in _first(sites, "refused")
    ]
    return _table("site", columns, rows)


def _outcome(site: SiteEntry) -> str:
    if site["status"] == "folded" and site.get("kind") == "premultiply":
        return "its input is multiplied when the model runs"
    paths = site["folded_into"] if site["status"] == "folded" else ()
    return "<br>".join(filter(None, [_reason(site), *map(_code, paths)]))


def _layers(layers: Sequence[LayerEntry]) -> str:
    if not layers:
        return ""
    shown = plots.worst_layers(layers)
    measured = [layer for layer in layers if layer.get("sqnr_db") is not None]
    parts = []
    if shown:
        alt = (
            f"Bar chart of the SQNR of {len(shown)} layers, lowest {shown[0]['sqnr_db']:.1f} dB "
            f"at {shown[0]['name']}, highest shown {shown[-1]['sqnr_db']:.1f} dB"
        )
        caption = "The layers to keep in float, or to give more bits, stand on top."
        if len(shown) < len(measured):
            caption = f"Showing the {len(shown)} layers with the lowest SQNR of {len(measured)}. {caption}"
        parts.append(_figure(plots.layer_chart(shown), alt, caption))
    parts.append(_heat_map(layers))
    columns = (
        "Layer",
        "Status",
        "#Weight bits",
        "#Activation bits",
        "#Weight range",
        "#Activation range",
        "#SQNR, dB",
        "Why it stayed float",
    )
    rows = [
        (
            _code(layer["name"]),
            _status(layer["status"]),
            _number(layer["weight_bits"], "d"),
            _number(layer["activation_bits"], "d") + (" per token" if layer.get("dynamic") else ""),
            _number(layer.get("weight_clipping"), ".0%"),
            _number(layer.get("activation_clipping"), ".0%"),
            _number(layer["sqnr_db"], ".1f"),
            _reason(layer),
        )
        for layer in _first(layers, "float")
    ]
    return _section("Layers", "", "\n".join([*parts, _table("layer", columns, rows)]))


def _heat_map(layers: Sequence[LayerEntry]) -> str:
    shown = plots.layers_by_timestep(layers)
    if not shown:
        return ""
    worst_db, worst_t, worst = min(
        (db, t, layer["name"]) for layer in shown for t, db in layer["sqnr_db_t"] if db is not None
    )
    alt = (
        f"Heat map of the SQNR of {len(shown)} layers at {len(shown[0]['sqnr_db_t'])} timesteps; "
        f"lowest {worst_db:.1f} dB, of {worst} at t = {worst_t:g}"
    )
    caption = (
        "Each layer's output against the float network's, with the error of all layers before it. Layers in the order "
        "of execution, from the top. A dark row is a layer that loses much itself; a row from which all that follow "
        "are dark passes it on; a dark column is a timestep whose values are small for ranges that serve all "
        "timesteps. To the right, the range that is kept of each layer's input and weight: what lies outside is cut."
    )
    return "<h3>Layers over the timesteps</h3>" + _figure(plots.heat_map(shown), alt, caption)


def _weight_bits(choice: WeightBitsEntry | None) -> str:
    if choice is None:
        return ""
    inputs, widths = choice["inputs"], choice["candidates"]
    intro = (
        f"Chosen for each quantized input from {', '.join(map(str, widths))} bits: "
        f"{choice['average_bits']:.2f} on average. The share of noise is what the input's weights alone add to the "
        f"predicted noise's error at {widths[0]} bits, of what all add: measured after rounding, one at a time."
    )
    columns = ("Layers that read one input", "#Weights", "#Share of noise", "#Bits")
    rows = [
        (
            _code(entry["name"]),
            f"{entry['parameters']:,}",
            _number(entry["noise"][0], ".1%"),
            f"{entry['bits']}",
        )
        for entry in sorted(inputs, key=lambda entry: (-entry["bits"], -entry["noise"][0]))
    ]
    return _section("Bits of the weights", intro, _table("choice", columns, rows))


def _dynamic(choice: DynamicEntry | None) -> str:
    if choice is None:
        return ""
    intro = (
        f"Chosen for each quantized input: {choice['share']:.0%} of the linears' multiplications have inputs whose "
        "tokens get ranges of their own at run time. The shares of noise are what the input's quantization alone adds "
        "to the output's error, of what all add with static ranges."
    )
    columns = ("Layers that read one input", "#Multiplications", "#Noise, static", "#Noise, per token", "Range")
    rows = [
        (
            _code(entry["name"]),
            f"{entry['share']:.1%}",
            *(_number(noise, ".1%") for noise in entry["noise"]),
            "per token" if entry["dynamic"] else "static",
        )
        for entry in sorted(choice["inputs"], key=lambda entry: (not entry["dynamic"], -entry["noise"][0]))
    ]
    return _section("Ranges at run time", intro, _table("choice", columns, rows))


def _costs(left_out: LeaveOneOutEntry | None) -> str:
    if left_out is None:
        return ""
    title = "What each layer costs"
    if "skipped" in left_out:
        return _section(title, escape(f"Not measured: {left_out['skipped']}."), "")
    inputs = left_out["inputs"]
    shown = [entry for entry in inputs if entry["gain_db"] is not None][: plots.MAX_INPUTS]
    intro = (
        "The gain in eps SQNR when only the linears that read one input are put back to float, input and weights, and "
        f"all others stay quantized: from {_number(left_out['sqnr_db'], '.1f')}&nbsp;dB, on {left_out['rows']} rows. "
        "Below zero where later layers had been fitted to make up for these."
    )
    if not shown:
        return _section(title, intro, "")
    alt = f"Bar chart of the gain of {len(shown)} inputs, highest {shown[0]['gain_db']:+.2f} dB of {shown[0]['name']}"
    caption = "" if len(shown) == len(inputs) else f"The {len(shown)} that cost most, of {len(inputs)}."
    return _section(title, intro, _figure(plots.leave_one_out_chart(shown), alt, caption))


def _input_sizes(inputs: InputSizesEntry | None) -> str:
    if inputs is None:
        return ""
    fixed = [f"{axis} is fixed: {reason}" for axis, reason in inputs["fixed"].items()]
    return _section(
        "Sizes of the inputs",
        "Sizes that may differ from call to call, the conditions on them, and the sizes that may not.",
        _bullets([*inputs["free"], *(f"where {condition}" for condition in inputs["conditions"]), *fixed]),
    )


def _provenance(report: Report) -> str:
    versions = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in report["versions"].items())
    seconds = "".join(f"<dt>{escape(k)}</dt><dd>{_number(v, '.1f')} s</dd>" for k, v in report["seconds"].items())
    recipe = escape(json.dumps(report["recipe"], indent=2, ensure_ascii=False, default=str))
    return _section(
        "How it was made",
        "",
        f"<details><summary>Recipe</summary><pre>{recipe}</pre></details>"
        f"<details><summary>Versions</summary><dl>{versions}</dl></details>"
        f"<details><summary>Time taken</summary><dl>{seconds}</dl></details>",
    )


# Pieces of a page: text in, escaped markup out


def _section(title: str, intro: str, body: str) -> str:
    paragraph = f"<p>{intro}</p>\n" if intro else ""
    return f"<section><h2>{title}</h2>\n{paragraph}{body}</section>"


def _card(title: str, value: str, detail: str) -> str:
    return f'<div class="card"><h2>{title}</h2><p class="value">{value}</p><p class="detail">{detail}</p></div>'


def _figure(png: bytes, alt: str, caption: str = "") -> str:
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f"<figure>{_image(png, alt)}{below}</figure>"


def _grid(images: Tensor, title: str, alt: str) -> str:
    count, width = images.shape[0], images.shape[-1]
    # Near to a square, up to ten in a row, and if possible without a ragged last row.
    columns = next((n for n in range(math.ceil(math.sqrt(count)), 11) if count % n == 0), 10)
    png = plots.image_grid(images, columns, max(1, _GRID_WIDTH_PX // (columns * width)))
    return f'<figure class="grid"><figcaption>{title}</figcaption>{_image(png, alt)}</figure>'


def _image(png: bytes, alt: str) -> str:
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode("ascii")}">'


def _table(thing: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in <details>; a column whose heading starts with # is set flush right.

    A narrow page shows each row as a block of its own, below the name in its first cell, with a heading at every other.
    """
    if not rows:
        return ""
    headings = [column.lstrip("#") for column in columns]
    classes = [' class="number"' if column.startswith("#") else "" for column in columns]
    heads = (f'<th scope="col"{kind}>{heading}</th>' for kind, heading in zip(classes, headings, strict=True))
    labels = ["", *(f' data-label="{heading}"' for heading in headings[1:])]
    body = "\n".join(f"<tr>{''.join(map('<td{}{}>{}</td>'.format, classes, labels, row))}</tr>" for row in rows)
    state = " open" if len(rows) <= _OPEN_ROWS else ""
    title = f"All {len(rows)} {thing}s" if len(rows) != 1 else f"The only {thing}"
    head = "".join(heads)
    return (
        f"<details{state}><summary>{title}</summary>\n"
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div></details>'
    )


def _code(name: str) -> str:
    """A dotted name, which may be broken after its dots."""
    return f"<code>{escape(name).replace('.', '.<wbr>')}</code>"


def _status(status: str) -> str:
    return f'<span class="status {escape(status)}">{escape(status)}</span>'


def _reason(entry: Entry) -> str:
    return escape(entry.get("reason") or "")


def _bullets(lines: Sequence[str]) -> str:
    items = [f"<li>{escape(line)}</li>" for line in lines]
    first, rest = "".join(items[:_OPEN_LINES]), "".join(items[_OPEN_LINES:])
    if rest:
        rest = f"<details><summary>{len(items) - _OPEN_LINES} more</summary><ul>{rest}</ul></details>"
    return f"<ul>{first}</ul>{rest}"


def _chosen(about: Mapping[str, Any], between: str = " ") -> str:
    """Aggregation, and alpha if it has one."""
    alpha = about["alpha"]
    parts = [about["method"], alpha if alpha is None or isinstance(alpha, str) else _number(alpha, "g")]
    return escape(between.join(part for part in parts if part is not None))


def _site_range(site: SiteEntry) -> str:
    if not site.get("b"):
        return "–"
    low, high = plots.b_range(site)
    return f'<span class="nowrap">{plots.short(low)} to {plots.short(high)}</span>'


def _shown(shown: Sequence[SiteEntry], folded: Sequence[SiteEntry]) -> str:
    if len(shown) == len(folded):
        return ""
    return f"Showing the {len(shown)} sites with the widest b range of {len(folded)}."


def _named(sites: Sequence[SiteEntry]) -> str:
    shown = plots.widest_sites(sites)
    if len(shown) == len(sites):
        return ""
    return f"In colour the {len(shown)} sites with the widest b range of {len(sites)}, the others in grey."


def _draws(evaluation: EvaluationEntry) -> str:
    samples = evaluation["samples"]
    return escape(f"{samples} sample{'' if samples == 1 else 's'}, seed {evaluation['seed']}")


def _count(entries: Iterable[Entry], status: str) -> int:
    return sum(entry["status"] == status for entry in entries)


def _first(entries: Iterable[E], status: str) -> list[E]:
    """Those of a status before the others, each in the order of the model."""
    return sorted(entries, key=lambda entry: entry["status"] != status)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"


_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header>
$header
</header>
<main>
$main
</main>
</body>
</html>
""")

_STYLE = """
:root { --ink: #222; --soft: #595959; --line: #e2e2e2; --blue: #0072b2; --vermillion: #a84300; color-scheme: light; }
* { box-sizing: border-box; }
body { max-width: 1140px; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; background: #fff; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { margin: 0; font-size: 2rem; line-height: 1.2; font-weight: 650; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { margin: 0 0 .5rem; font-size: 1.3rem; font-weight: 650; }
h3 { margin: 2rem 0 .5rem; font-size: 1.05rem; font-weight: 650; }
section > p, figcaption, .caption { max-width: 46rem; }
header p { margin: .25rem 0 0; color: var(--soft); }
.kicker { margin: 0 0 .25rem; font-size: .8rem; text-transform: uppercase; letter-spacing: .08em; }
section { margin-top: 3rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 1rem; margin-top: 2rem; }
.card { padding: 1rem 1.15rem; border: 1px solid var(--line); border-top: 3px solid var(--blue); border-radius: 4px; }
.card h2 { margin: 0; font-size: .85rem; font-weight: 500; color: var(--soft); }
.card p { margin: 0; }
.value { font-size: 1.45rem; line-height: 1.5; font-weight: 650; font-variant-numeric: tabular-nums; }
.value small { font-size: .9rem; font-weight: 400; color: var(--soft); }
.detail { font-size: .85rem; color: var(--soft); }
.notes { margin-top: 1.5rem; padding: 1rem 1.25rem; background: #fff6e5; border-left: 4px solid #e69f00; }
.notes h2 { font-size: 1rem; }
ul { margin: 0; padding-left: 1.2rem; overflow-wrap: anywhere; }
figure { margin: 1rem 0 0; }
img { display: block; max-width: 100%; height: auto; }
figcaption, .caption { margin-top: .5rem; font-size: .88rem; color: var(--soft); }
.grids { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 1.25rem; }
.grid { margin: 0; }
.grid img { width: 100%; }
.grid figcaption { margin: 0 0 .4rem; color: var(--ink); font-weight: 550; }
details { margin-top: 1rem; border-top: 1px solid var(--line); padding-top: .6rem; }
summary { cursor: pointer; font-weight: 550; }
details > * + * { margin-top: .75rem; }
table { width: 100%; border-collapse: collapse; font-size: .85rem; line-height: 1.45; }
th { padding: .4rem .6rem; border-bottom: 2px solid var(--line); text-align: left; font-weight: 600;
  vertical-align: bottom; }
td { padding: .4rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; overflow-wrap: break-word; }
.wide { overflow-x: auto; }
.reasons details { margin: 0; border: 0; padding: 0 0 .3rem; }
.reasons summary { font-size: .88rem; font-weight: 400; color: var(--soft); }
.reasons details > ul { margin-top: .2rem; font-size: .88rem; }
.number { text-align: right; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
code, pre { font: .92em/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { padding: 1rem; background: #f6f6f6; overflow-x: auto; font-size: .85rem; }
.nowrap, .status { white-space: nowrap; }
.status { font-weight: 550; }
.folded, .integer { color: var(--blue); }
.refused, .float { color: var(--vermillion); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.5rem; font-size: .88rem; }
dt { color: var(--soft); }
dd { margin: 0; font-variant-numeric: tabular-nums; }
@media (max-width: 860px) {
  body { padding: 1.5rem 1rem 3rem; }
  thead { display: none; }
  table, tbody, tr, td { display: block; }
  tr { padding: .6rem 0; border-bottom: 1px solid var(--line); }
  td { padding: .1rem 0; border: 0; overflow-wrap: anywhere; }
  td[data-label] { position: relative; padding-left: 9.75rem; text-align: left; }
  td[data-label]::before { content: attr(data-label); position: absolute; left: 0; width: 9rem; color: var(--soft); }
}
@media print { section { break-inside: auto; } figure { break-inside: avoid; } }
"""
