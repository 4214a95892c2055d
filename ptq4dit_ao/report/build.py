"""The report as JSON-safe data."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from torch import Tensor
from torch.fx import GraphModule

from ptq4dit_ao._version import installed_version
from ptq4dit_ao.capture import free_sizes
from ptq4dit_ao.capture.sizes import FreeSizes
from ptq4dit_ao.core.qparams import FLOAT_BITS
from ptq4dit_ao.graph import Site
from ptq4dit_ao.graph.names import joint_name
from ptq4dit_ao.lowering import QuantizedLinear, float_linears
from ptq4dit_ao.lowering.match import IntegerLinear, integer_linears, quantized_products, quantizers_of
from ptq4dit_ao.metrics import LeaveOneOut, PairedError
from ptq4dit_ao.passes import BalanceResult, SiteOutcome, balance_result
from ptq4dit_ao.report.types import (
    AttentionEntry,
    DynamicEntry,
    EvaluationEntry,
    InputSizesEntry,
    LayerEntry,
    LeaveOneOutEntry,
    LeftOutEntry,
    ModelEntry,
    Report,
    SiteEntry,
    SizeEntry,
    WeightBitsEntry,
)

Vector = Literal["b", "salience_x", "salience_w", "timesteps", "salience_t", "rho", "eta"]
_VECTORS: tuple[Vector, ...] = get_args(Vector)
_LEFT = "left as it is: of all that was tried, this leaves least error after rounding"
_PACKAGES = ("ptq4dit-ao", "torch", "torchao", "diffusers")


@dataclass(frozen=True, kw_only=True)
class Diagnostics:
    """Measurements of a quantized graph's linears, by node name."""

    layer_errors: Mapping[str, PairedError]
    weight_clipping: Mapping[str, float]
    """The range of a weight, as a part of the one that holds the largest; mean over channels."""
    leave_one_out: LeaveOneOut | None = None
    leave_one_out_skipped: str | None = None
    """Reason why there is no ``leave_one_out``."""


def build_report(
    converted: GraphModule,
    *,
    title: str,
    recipe: Mapping[str, Any],
    model: ModelEntry,
    seconds: Mapping[str, float],
    evaluation: EvaluationEntry | None = None,
    diagnostics: Diagnostics | None = None,
    weight_bits: WeightBitsEntry | None = None,
    dynamic: DynamicEntry | None = None,
) -> Report:
    """Everything that is known of one quantized model; its size is added when it is saved.

    Args:
        converted: from ``convert_pt2e`` with our quantizer.
        title: headline.
        recipe: as ``Recipe.to_dict`` gives it.
        model: the float model.
        seconds: wall time per stage.
        evaluation: error of its output.
        diagnostics: of its layers.
        weight_bits: how they were chosen, if they were.
        dynamic: how inputs with ranges at run time were chosen, if they were.
    """
    result = balance_result(converted)
    settings = result.settings
    return {
        "title": title,
        "model": model,
        "inputs": _inputs(free_sizes(converted)),
        "recipe": dict(recipe),
        "versions": {name: v for name in _PACKAGES if (v := installed_version(name)) is not None},
        "settings": None
        if settings is None
        else {
            "method": settings.method,
            "alpha": None if settings.method == "repq" else settings.alpha,
            "max_scale": settings.max_scale,
            "fold_form": settings.fold_form,
        },
        "sites": [_site(site, result.outcomes.get(site.name)) for site in result.sites],
        "layers": _layers(converted, result, diagnostics),
        "attention": _attention(converted),
        "weight_bits": weight_bits,
        "dynamic": dynamic,
        "leave_one_out": None if diagnostics is None else _leave_one_out(result, diagnostics),
        "evaluation": evaluation,
        "size": None,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "notes": _notes(result),
    }


def _inputs(sizes: FreeSizes) -> InputSizesEntry:
    return {
        "free": [str(size) for size in sizes.sizes],
        "conditions": list(sizes.conditions),
        "fixed": dict(sizes.fixed),
    }


def summary(report: Report) -> Report:
    """The report without its vectors, small enough for an artifact's manifest."""
    short = copy.copy(report)
    short["sites"] = [cast(SiteEntry, _without(site, _VECTORS)) for site in report["sites"]]
    short["layers"] = [cast(LayerEntry, _without(layer, ("sqnr_db_t",))) for layer in report["layers"]]
    return short


def size_entry(report: Report, converted: GraphModule, artifact_bytes: int) -> SizeEntry:
    """Bytes before and after, of a model whose graph and weights take so many on disk."""
    float32 = 4 * report["model"]["parameters"]
    linears = integer_linears(converted)
    weights = {linear.weight.data_ptr(): linear for linear in linears}.values()
    before = sum(4 * (w.weight.numel() + len(w.weight)) for w in weights)
    stored = sum(w.weight.numel() * w.bits_per_weight / 8 for w in weights)
    after = stored + sum(4 * len(w.weight) for w in weights)
    return {
        "float32_bytes": float32,
        "artifact_bytes": artifact_bytes,
        "ratio": artifact_bytes / float32,
        "quantized_layers_float32_bytes": before,
        "quantized_layers_bytes": int(after),
        "quantized_layers_ratio": after / before,
        "bits_per_weight": 8 * stored / sum(w.weight.numel() for w in weights),
    }


def _without(entry: Mapping[str, object], keys: Sequence[str]) -> dict[str, object]:
    return {key: value for key, value in entry.items() if key not in keys}


def _site(site: Site, outcome: SiteOutcome | None) -> SiteEntry:
    about: SiteEntry = {
        "name": site.name,
        "layers": list(dict.fromkeys(consumer.layer for consumer in site.consumers)),
        "channels": site.channels,
        "variables": site.num_variables,
        "status": "refused" if outcome is None or outcome.method == "none" else "folded",
        "reason": site.refusal if outcome is None or outcome.method != "none" else _LEFT,
        "kind": site.kind,
        "vector_multiplies": len(site.cuts),
        "couples_blocks": site.couples_blocks,
        "folded_into": [path for edit in site.parameters for path in edit.paths]
        + [f"{edit.node}.weight" for edit in site.norms]
        + [f"{edit.node}.{edit.index}" for edit in site.cuts],
        "num_clipped": 0,
    }
    if outcome is not None:
        about["num_clipped"] = int(outcome.clipped.sum())
        about["method"], about["alpha"] = outcome.method, outcome.alpha
        about["centred"] = outcome.offset is not None
        about["scores"] = {name: _float(score) for name, score in outcome.scores.items()}
        about["b_range"] = _float(float(outcome.b.min())), _float(float(outcome.b.max()))
        for name in _VECTORS:
            about[name] = _floats(getattr(outcome, name))
    return about


def _layers(converted: GraphModule, result: BalanceResult, diagnostics: Diagnostics | None) -> list[LayerEntry]:
    integer = {linear.name: linear for linear in integer_linears(converted)}
    names = [*integer, *(node.name for node in float_linears(converted))]
    order = {node.name: i for i, node in enumerate(converted.graph.nodes)}
    return [_layer(name, result, integer.get(name), diagnostics) for name in sorted(names, key=order.__getitem__)]


def _layer(
    name: str, result: BalanceResult, linear: IntegerLinear | None, diagnostics: Diagnostics | None
) -> LayerEntry:
    error = None if diagnostics is None else diagnostics.layer_errors.get(name)
    return {
        "name": result.layers.get(name, name),
        "node": name,
        "status": "float" if linear is None else "integer",
        "weight_bits": None if linear is None else linear.weight_bits,
        "activation_bits": None if linear is None else _activation_bits(linear),
        "dynamic": "token" if linear is not None and linear.per_token is not None else False,
        "activation_clipping": _maybe(result.clipping.get(name)),
        "weight_clipping": None if diagnostics is None else _maybe(diagnostics.weight_clipping.get(name)),
        "sqnr_db": None if error is None else _float(error.sqnr_db),
        "sqnr_db_t": [] if error is None else [(t, _float(db)) for t, db in error.per_timestep.items()],
    }


def _activation_bits(linear: IntegerLinear) -> int:
    return _bits(linear.x_range) if isinstance(linear, QuantizedLinear) else FLOAT_BITS


def _attention(converted: GraphModule) -> AttentionEntry | None:
    """Number and bits of the quantized matrix products of attention; None if attention is float."""
    products = quantized_products(converted)
    bits = {_bits(q.args[3:5]) for q in quantizers_of(products)}
    return {"matmuls": len(products), "bits": sorted(bits)} if products else None


def _leave_one_out(result: BalanceResult, diagnostics: Diagnostics) -> LeaveOneOutEntry:
    found = diagnostics.leave_one_out
    if found is None:
        return {"skipped": diagnostics.leave_one_out_skipped}
    inputs: list[LeftOutEntry] = [
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
