"""The report as JSON-safe data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from ptq4dit_ao.graph import Site
from ptq4dit_ao.graph.names import joint_name
from ptq4dit_ao.lowering import float_linears, quantized_linears
from ptq4dit_ao.lowering.match import quantized_products, quantizers_of
from ptq4dit_ao.metrics import LeaveOneOut, PairedError
from ptq4dit_ao.passes import BalanceResult, SiteOutcome, balance_result

_VECTORS = ("b", "salience_x", "salience_w", "timesteps", "salience_t", "rho", "eta")
_LEFT = "left as it is: of all that was tried, this leaves least error after rounding"
_PACKAGES = ("ptq4dit-ao", "torch", "torchao", "diffusers")


@dataclass(frozen=True, kw_only=True)
class Diagnostics:
    """What was measured of a quantized graph's linears, by node name."""

    layer_errors: Mapping[str, PairedError]
    weight_clipping: Mapping[str, float]
    """The range of a weight, as a part of the one that holds the largest; mean over channels."""
    leave_one_out: LeaveOneOut | None = None
    leave_one_out_skipped: str | None = None
    """Why there is none."""


def build_report(
    converted: GraphModule,
    *,
    title: str,
    recipe: Mapping[str, object],
    model: Mapping[str, object],
    seconds: Mapping[str, float],
    evaluation: Mapping[str, object] | None = None,
    diagnostics: Diagnostics | None = None,
    weight_bits: Mapping[str, object] | None = None,
    size: Mapping[str, object] | None = None,
) -> dict[str, Any]:
    """Everything that is known of one quantized model.

    Args:
        converted: from ``convert_pt2e`` with our quantizer.
        title: headline.
        recipe: as ``Recipe.to_dict`` gives it.
        model: ``name`` and number of ``parameters``.
        seconds: wall time per stage.
        evaluation: ``sqnr_db``, ``per_timestep`` [[t, dB]], ``samples``, ``seed``.
        diagnostics: of its layers.
        weight_bits: how they were chosen, if they were.
        size: ``float32_bytes``, ``artifact_bytes``, ``ratio``.
    """
    result = balance_result(converted)
    settings = result.settings
    return {
        "title": title,
        "model": dict(model),
        "recipe": dict(recipe),
        "versions": {name: v for name in _PACKAGES if (v := _version(name)) is not None},
        "settings": None
        if settings is None
        else {
            "aggregation": settings.aggregation,
            "alpha": None if settings.aggregation == "repq" else settings.alpha,
            "max_scale": settings.max_scale,
            "fold_form": settings.fold_form,
        },
        "sites": [_site(site, result.outcomes.get(site.name)) for site in result.sites],
        "layers": _layers(converted, result, diagnostics),
        "attention": _attention(converted),
        "weight_bits": None if weight_bits is None else dict(weight_bits),
        "leave_one_out": None if diagnostics is None else _leave_one_out(result, diagnostics),
        "evaluation": None if evaluation is None else dict(evaluation),
        "size": None if size is None else dict(size),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "notes": _notes(result),
    }


def summary(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report without its vectors, small enough for an artifact's manifest."""
    sites = [{key: value for key, value in site.items() if key not in _VECTORS} for site in report["sites"]]
    layers = [{key: value for key, value in layer.items() if key != "sqnr_db_t"} for layer in report["layers"]]
    return {**report, "sites": sites, "layers": layers}


def _site(site: Site, outcome: SiteOutcome | None) -> dict[str, Any]:
    about: dict[str, Any] = {
        "name": site.name,
        "layers": list(dict.fromkeys(consumer.layer for consumer in site.consumers)),
        "channels": site.channels,
        "variables": site.num_variables,
        "status": "refused" if outcome is None or outcome.aggregation == "none" else "folded",
        "reason": site.refusal if outcome is None or outcome.aggregation != "none" else _LEFT,
        "kind": site.kind,
        "vector_multiplies": len(site.cuts),
        "couples_blocks": site.couples_blocks,
        "folded_into": [path for edit in site.parameters for path in edit.paths]
        + [f"{edit.node}.weight" for edit in site.norms]
        + [f"{edit.node}.{edit.index}" for edit in site.cuts],
        "clipped": 0,
    }
    if outcome is not None:
        about["clipped"] = int(outcome.clipped.sum())
        about |= {"aggregation": outcome.aggregation, "alpha": outcome.alpha}
        about["scores"] = {name: _float(score) for name, score in outcome.scores.items()}
        about["b_range"] = [_float(float(outcome.b.min())), _float(float(outcome.b.max()))]
        about |= {name: _floats(getattr(outcome, name)) for name in _VECTORS}
    return about


def _layers(converted: GraphModule, result: BalanceResult, diagnostics: Diagnostics | None) -> list[dict[str, Any]]:
    integer = {linear.name: linear for linear in quantized_linears(converted)}
    names = [*integer, *(node.name for node in float_linears(converted))]
    order = {node.name: i for i, node in enumerate(converted.graph.nodes)}
    return [
        {
            "name": result.layers.get(name, name),
            "node": name,
            "status": "integer" if name in integer else "float",
            "weight_bits": _bits(integer[name].weight_range) if name in integer else None,
            "activation_bits": _bits(integer[name].x_range) if name in integer else None,
            "activation_clipping": _maybe(result.clipping.get(name)),
            **_diagnosed(name, diagnostics),
        }
        for name in sorted(names, key=order.__getitem__)
    ]


def _attention(converted: GraphModule) -> dict[str, Any] | None:
    """How many matrix products of attention are quantized, and to how many bits; None if attention is float."""
    products = quantized_products(converted)
    bits = {_bits(q.args[3:5]) for q in quantizers_of(products)}
    return {"matmuls": len(products), "bits": sorted(bits)} if products else None


def _diagnosed(name: str, diagnostics: Diagnostics | None) -> dict[str, Any]:
    error = None if diagnostics is None else diagnostics.layer_errors.get(name)
    return {
        "weight_clipping": None if diagnostics is None else _maybe(diagnostics.weight_clipping.get(name)),
        "sqnr_db": None if error is None else _float(error.sqnr_db),
        "sqnr_db_t": [] if error is None else [[t, _float(db)] for t, db in error.per_timestep.items()],
    }


def _leave_one_out(result: BalanceResult, diagnostics: Diagnostics) -> dict[str, Any]:
    found = diagnostics.leave_one_out
    if found is None:
        return {"skipped": diagnostics.leave_one_out_skipped}
    inputs = [
        {
            "name": joint_name(result.layers.get(name, name) for name in names),
            "nodes": list(names),
            "sqnr_db": _float(found.without[names].sqnr_db),
            "gain_db": _float(gain),
        }
        for names, gain in sorted(found.gains_db.items(), key=lambda item: -item[1])
    ]
    return {"sqnr_db": _float(found.quantized.sqnr_db), "rows": found.quantized.rows, "inputs": inputs}


def _notes(result: BalanceResult) -> list[str]:
    notes = []
    for name, outcome in result.outcomes.items():
        if clipped := int(outcome.clipped.sum()):
            assert result.settings is not None
            notes.append(
                f"{name}: {clipped} of {len(outcome.b)} balancing factors were clipped to "
                f"1/{result.settings.max_scale:g} .. {result.settings.max_scale:g}"
            )
        if constant := int((outcome.rho == 0).sum()):
            notes.append(f"{name}: Spearman's rho is 0 (or undefined, taken as 0) at {constant} timesteps")
        if partial := outcome.site.channels - int((outcome.site.consumers[0].variables > 0).sum()):
            notes.append(f"{name}: {partial} of {outcome.site.channels} channels cannot carry a balancing factor")
    return notes


def _bits(bounds: Sequence[Any]) -> int:
    return round(math.log2(bounds[1] - bounds[0] + 1))


def _floats(values: Tensor) -> list[float | None]:
    return [_float(value) for value in values.tolist()]


def _maybe(value: float | None) -> float | None:
    return None if value is None else _float(value)


def _float(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
