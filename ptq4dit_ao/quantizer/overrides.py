"""Bit widths and exceptions per layer, written into the annotations of any base quantizer."""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.observer import MinMaxObserver
from torchao.quantization.pt2e.quantizer import QuantizationSpec
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from ptq4dit_ao.choices import Dynamic
from ptq4dit_ao.core.expansion import EXPANDED_BITS, Expansion
from ptq4dit_ao.core.qparams import FLOAT_BITS
from ptq4dit_ao.errors import ArgumentError, OverrideError
from ptq4dit_ao.graph.names import adapters, layer_name, linears
from ptq4dit_ao.observers.qdq import FLOAT

logger = logging.getLogger(__name__)

MIN_BITS, MAX_BITS = 2, 8
FIELDS = ("skip", "weight_bits", "activation_bits", "dynamic", "balance")
"""Fields of an :class:`Override` that change a :class:`LayerPlan`."""


@dataclass(frozen=True, kw_only=True)
class Override:
    """Exception for the layers whose module name matches ``pattern`` (``fnmatch``: ``*`` crosses dots).

    If several overrides match a layer, the later one wins, field by field. ``None`` leaves a field unchanged.
    """

    pattern: str
    skip: bool | None = None
    weight_bits: int | None = None
    activation_bits: int | None = None
    dynamic: Dynamic | None = None
    balance: bool | None = None
    must_match: bool = True
    """Whether a model in which no layer matches is refused."""

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str) or not self.pattern:
            raise OverrideError(
                f"the pattern of an override is {self.pattern!r}; give the name of a layer, or 'blocks.0.*'"
            )
        fields = [getattr(self, name) for name in FIELDS]
        if all(value is None for value in fields):
            raise OverrideError(f"override {self.pattern!r} changes nothing; set skip, bits, dynamic or balance")
        if self.skip and any(value is not None for value in fields[1:]):
            raise OverrideError(
                f"override {self.pattern!r} skips a layer and sets its bits, dynamic or balance; do one of them"
            )
        if self.weight_bits is not None:
            check_bits("weight_bits", self.weight_bits)
        if self.activation_bits is not None:
            check_activation_bits(self.activation_bits)
        if self.activation_bits == FLOAT_BITS and self.dynamic:
            raise OverrideError(
                f"override {self.pattern!r} keeps inputs float (activation_bits 16) and makes them dynamic; do one of "
                "them"
            )
        if self.dynamic is not None:
            check_dynamic(self.dynamic)


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """Quantization of one linear: skipped or not, bit widths, ranges of its input, balanced or not."""

    layer: str
    skip: bool = False
    weight_bits: int = 8
    activation_bits: int = 8
    dynamic: Dynamic = False
    balance: bool = True

    def expands(self, expansion: Expansion | None) -> bool:
        """Whether the weight expands from 4 bits by a rule, which is for weights of 4 bits."""
        return expansion is not None and self.weight_bits == EXPANDED_BITS

    @property
    def is_dynamic(self) -> bool:
        """Whether each token of the input is quantized in a range of its own. Inputs of 16 bits stay float."""
        return bool(self.dynamic) and self.activation_bits != FLOAT_BITS and not self.skip


def plan_layers(
    model: GraphModule,
    *,
    weight_bits: int,
    activation_bits: int,
    dynamic: Dynamic = False,
    overrides: Sequence[Override],
) -> dict[str, LayerPlan]:
    """Plan of every linear by its node name. Linears of adapters that were not fused stay float.

    Raises:
        OverrideError: an override matches no layer.
    """
    plans = {}
    beside = adapters(model)
    if beside:
        names = sorted(map(layer_name, beside))
        logger.info("%d linears of adapters stay float (%s, ...); fuse them to quantize them", len(names), names[0])
    matched: set[str] = set()
    for node in linears(model):
        plan = LayerPlan(
            layer=layer_name(node), weight_bits=weight_bits, activation_bits=activation_bits, dynamic=dynamic
        )
        for override in overrides if node not in beside else ():
            if fnmatchcase(plan.layer, override.pattern):
                matched.add(override.pattern)
                plan = _apply(plan, override)
        plans[node.name] = dataclasses.replace(plan, skip=True) if node in beside else plan
    for override in overrides:
        if override.must_match and override.pattern not in matched:
            names = [plans[node.name].layer for node in linears(model) if node not in beside]
            near = difflib.get_close_matches(override.pattern, names, n=1, cutoff=0.3)
            hint = f"; the nearest layer is {near[0]!r}" if near else ""
            raise OverrideError(
                f"override {override.pattern!r} matches none of the model's {len(names)} linear layers{hint}"
            )
    return plans


def _apply(plan: LayerPlan, override: Override) -> LayerPlan:
    changes = {name: value for name in FIELDS if (value := getattr(override, name)) is not None}
    if "skip" not in changes and not changes.keys() <= {"balance"}:
        changes["skip"] = False  # an override that says how to quantize undoes the skip of an earlier one
    return dataclasses.replace(plan, **changes)


def apply_plan(node: Node, plan: LayerPlan, expansion: Expansion | None = None) -> None:
    """Rewrite a linear's annotation; do nothing if the base quantizer did not annotate it.

    Args:
        node: the linear.
        plan: its plan.
        expansion: rule by which weights of 4 bits expand to 8; None for integers of 4 bits.

    Raises:
        ArgumentError: there is a rule, but the base quantizer does not give weights int8 and a scale for each row.
    """
    annotation = node.meta.get(Q_ANNOTATION_KEY)
    if annotation is None:
        return
    if plan.skip:
        del node.meta[Q_ANNOTATION_KEY]
        return
    x, weight = node.args[:2]
    expands = plan.expands(expansion)
    for source, bits in ((x, plan.activation_bits), (weight, MAX_BITS if expands else plan.weight_bits)):
        spec = annotation.input_qspec_map.get(source)
        if isinstance(spec, QuantizationSpec):
            annotation.input_qspec_map[source] = with_bits(spec, bits)
            if source is weight and expands:
                _check_expandable(plan.layer, spec)
    activation = annotation.input_qspec_map.get(x)
    if plan.is_dynamic and isinstance(activation, QuantizationSpec):
        annotation.input_qspec_map[x] = as_dynamic(activation)


def as_dynamic(spec: QuantizationSpec) -> QuantizationSpec:
    """The spec of an activation whose tokens have ranges of their own."""
    # Our observers replace that of the base quantizer, which may not allow a dynamic range.
    return dataclasses.replace(spec, is_dynamic=True, observer_or_fake_quant_ctr=MinMaxObserver)


def _check_expandable(layer: str, spec: QuantizationSpec) -> None:
    rows = spec.qscheme == torch.per_channel_symmetric and spec.ch_axis == 0
    if spec.dtype != torch.int8 or not rows:
        raise ArgumentError(
            f"{layer!r}: the base quantizer gives its weight {spec.dtype} and {spec.qscheme}; an expansion needs "
            "torch.int8 and torch.per_channel_symmetric along axis 0: leave the expansion out, or use another base"
        )


def with_bits(spec: QuantizationSpec, bits: int) -> QuantizationSpec:
    """The spec with the integer range of ``bits`` in the same dtype; 8 bits keep the base quantizer's range.

    16 bits, for activations only, are the spec of one that is observed and stays float.
    """
    if bits == FLOAT_BITS:
        return dataclasses.replace(
            spec, dtype=FLOAT, quant_min=None, quant_max=None, observer_or_fake_quant_ctr=MinMaxObserver
        )
    if bits == MAX_BITS or spec.dtype not in (torch.int8, torch.uint8):
        return spec
    half = 2 ** (bits - 1)
    low, high = (-half, half - 1) if spec.dtype == torch.int8 else (0, 2 * half - 1)
    return dataclasses.replace(spec, quant_min=low, quant_max=high)


def check_bits(name: str, bits: int) -> None:
    """Raise ArgumentError unless ``bits`` is an integer from 2 to 8."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise ArgumentError(f"{name} is {bits!r}; it must be an integer from {MIN_BITS} to {MAX_BITS}")


def check_activation_bits(bits: int) -> None:
    """Raise ArgumentError unless ``bits`` is an integer from 2 to 8, or 16 for inputs that stay float."""
    if bits != FLOAT_BITS or isinstance(bits, bool):
        try:
            check_bits("activation_bits", bits)
        except ArgumentError as error:
            raise ArgumentError(f"{error}, or {FLOAT_BITS} to quantize weights only") from None


def check_dynamic(value: object) -> None:
    """Raise ArgumentError unless ``value`` is ``token`` or False."""
    if value is not False and value != "token":
        raise ArgumentError(f"dynamic is {value!r}; give 'token' for a range for each token at run time, or False")


def _skip(*patterns: str) -> tuple[Override, ...]:
    return tuple(Override(pattern=pattern, skip=True, must_match=False) for pattern in patterns)


_EMBEDDERS = (
    "*timestep_embedder*", "*time_embed*", "*t_embedder*", "*class_embedder*", "*y_embedder*",
    "*x_embedder*", "pos_embed*", "patch_embed*",
)  # fmt: skip
_FINAL = ("proj_out", "proj_out_1", "proj_out_2", "norm_out*", "final_layer*")

SAFE_LAYERS = _skip(*_EMBEDDERS, *_FINAL)
"""Overrides that keep embedders and the final layer float: they have few parameters and are the most sensitive."""

PAPER_LAYERS: tuple[Override, ...] = tuple(
    Override(pattern=pattern, weight_bits=8, must_match=False) for pattern in _FINAL
)
"""Overrides of the PTQ4DiT paper: all linears are quantized, embedders included; the last layer keeps 8 bits."""
