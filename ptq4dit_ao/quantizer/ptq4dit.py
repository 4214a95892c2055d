"""``PTQ4DiTQuantizer``, which applies any torchao quantizer to a balanced and folded graph."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal

from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import ObserverOrFakeQuantize
from torchao.quantization.pt2e.quantizer import EdgeOrNode, QuantizationSpec, Quantizer
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from ptq4dit_ao._modes import own_modes
from ptq4dit_ao.capture.float_model import check_float_graph
from ptq4dit_ao.choices import BALANCE_METHODS, BalanceMethod, Dynamic, FoldForm, RoundingMethod
from ptq4dit_ao.core.expansion import Expansion
from ptq4dit_ao.core.qparams import FLOAT_BITS
from ptq4dit_ao.errors import ArgumentError, BalanceError, check_choice, check_type, renamed
from ptq4dit_ao.graph import Site, SitePolicy, find_sites, first_refusals, premultiplied_sites, refuse_sites
from ptq4dit_ao.graph.attention import Attention, decompose_attention, find_attention
from ptq4dit_ao.graph.constants import constants
from ptq4dit_ao.graph.names import TIMESTEP_NAMES, layer_name, linears, placeholders, timestep_placeholder, weight_path
from ptq4dit_ao.graph.shapes import batch_axis, shape_of
from ptq4dit_ao.observers import (
    AttentionObserver,
    InputObserver,
    Moments,
    RangeObserver,
    SalienceObserver,
    TimestepClock,
    WeightObserver,
)
from ptq4dit_ao.observers.qdq import DEFAULT_EPS, FLOAT, QuantSpec
from ptq4dit_ao.passes import BalanceSettings
from ptq4dit_ao.passes.offset import find_shifts
from ptq4dit_ao.quantizer.attention import annotate_attention
from ptq4dit_ao.quantizer.linear import LinearQuantizer
from ptq4dit_ao.quantizer.overrides import (
    SAFE_LAYERS,
    LayerPlan,
    Override,
    apply_plan,
    check_activation_bits,
    check_bits,
    check_dynamic,
    plan_layers,
)
from ptq4dit_ao.quantizer.plan import BalancePlan
from ptq4dit_ao.rounding import RoundingSettings

logger = logging.getLogger(__name__)


class PTQ4DiTQuantizer(Quantizer):
    """Balance, fold and quantize an exported diffusion transformer with torchao's own PT2E functions.

    ::

        prepared = prepare_pt2e(exported, PTQ4DiTQuantizer(weight_bits=4))
        for x, t, y in samples:
            prepared(x, t, y)
        quantized = convert_pt2e(prepared)

    Calibration records minimum and maximum per timestep and channel. ``convert_pt2e`` computes the balancing vectors,
    folds them into existing parameters, and quantizes the result. The converted graph has the ops that the base
    quantizer alone would leave. The only addition is one multiply by a vector where one layer modulates all blocks.

    Args:
        base: the quantizer that decides which tensors are quantized, and to which dtypes; ``None`` takes
            :class:`LinearQuantizer`.
        weight_bits: 2 to 8, for every linear weight, per output channel.
        activation_bits: 2 to 8, for every linear input, per tensor; or 16, with which inputs stay float and weights
            alone are quantized.
        expansion: rule by which weights of 4 bits expand to integers of 8 bits, with levels as for a normal
            distribution; ``None`` gives weights of 4 bits the integers -8 to 7.
        dynamic: ``token`` gives every token (row of a linear's input) a range of its own, which is found at run time;
            the graph then has a few more operations on rows for each of these inputs. ``False`` calibrates one range.
        attention_bits: 2 to 8, for attention's operands (q, k, v and the probabilities), per tensor; ``None`` leaves
            attention float. An attention that is a single op becomes matmul, softmax, matmul.
        balance: how salience over timesteps becomes one vector: ``ssc``, ``max`` (SmoothQuant) or ``mean``;
            ``none`` does not balance, ``auto`` lets each site choose. ``repq`` (RepQ-ViT) aligns the per-channel
            quantization ranges, in step size and in offset, where adaLN or a norm adds a shift.
        alpha: exponent of ``b = s(X)^alpha / s(W)^(1 - alpha)``; ``auto`` lets each site choose by the error after
            rounding. ``repq`` has no exponent.
        center: whether the middle of each channel's range is subtracted from inputs that a parameter shifts; with a
            search, each site chooses.
        max_scale: bound on b, to [1/max_scale, max_scale].
        rounding: ``nearest``; or ``gptq``, which rounds weights, clips ranges and corrects biases to keep the layers'
            outputs (observers then also keep the second moment of every quantized input, C_in^2 numbers); or
            ``adaround``, which learns the rounding block by block (with ``sequential``); or :class:`RoundingSettings`.
        sequential: round layer by layer for the inputs of the quantized network, which is more exact. Call
            :func:`~ptq4dit_ao.round_sequentially` before ``convert_pt2e``.
        fold_form: where the 1 of ``1 + scale`` goes; see :mod:`ptq4dit_ao.passes.fold`.
        layers: exceptions by default; :data:`SAFE_LAYERS` or :data:`PAPER_LAYERS`.
        overrides: exceptions by module name, applied after ``layers``.
        timestep_input: name of the graph input that holds the timestep; not needed if it is called
            ``timestep``, ``timesteps`` or ``t``.
        policy: which folds to take; see :class:`~ptq4dit_ao.SitePolicy`.
        verify: whether to run the float graph before and after balancing, and undo any site that changes its output.

    Raises:
        ArgumentError: an argument is out of range; or (from ``prepare_pt2e``) there is no attention to quantize.
        BalanceError: (from ``prepare_pt2e``) nothing in the model can be balanced.
        ExportError: (from ``prepare_pt2e``) the graph is quantized or prepared already, or is on the meta device.
        OverrideError: (from ``prepare_pt2e``) an override matches no layer.
        CalibrationError: (from the calibration loop or ``convert_pt2e``) samples are missing, too few or not finite.
    """

    @renamed(aggregation="balance")
    def __init__(
        self,
        base: Quantizer | None = None,
        *,
        weight_bits: int = 8,
        activation_bits: int = 8,
        expansion: Expansion | None = None,
        dynamic: Dynamic = False,
        attention_bits: int | None = None,
        balance: BalanceMethod | str = "ssc",
        alpha: float | Literal["auto"] = 0.5,
        center: bool = False,
        rounding: RoundingMethod | RoundingSettings = "nearest",
        sequential: bool = False,
        max_scale: float = 1000.0,
        fold_form: FoldForm = "constant",
        layers: Sequence[Override] = SAFE_LAYERS,
        overrides: Sequence[Override] = (),
        timestep_input: str | None = None,
        policy: SitePolicy | None = None,
        verify: bool = True,
    ) -> None:
        super().__init__()
        check_type("base", base, (Quantizer, type(None)), "a quantizer of torchao, or None for LinearQuantizer")
        check_type("rounding", rounding, (str, RoundingSettings), "its name, or RoundingSettings")
        check_type("expansion", expansion, (Expansion, type(None)), "an Expansion, or None")
        check_type("policy", policy, (SitePolicy, type(None)), "a SitePolicy")
        for name, given in (("layers", layers), ("overrides", overrides)):
            for override in given:
                check_type(f"an item of {name}", override, Override, "an Override")
        check_bits("weight_bits", weight_bits)
        check_activation_bits(activation_bits)
        if activation_bits == FLOAT_BITS and dynamic:
            raise ArgumentError(
                "activation_bits is 16, which keeps inputs float, and dynamic is 'token'; leave one of them out"
            )
        if attention_bits is not None:
            check_bits("attention_bits", attention_bits)
        check_choice("balance", balance, BALANCE_METHODS)
        check_type("center", center, bool, "true or false")
        if center and balance == "none":
            raise ArgumentError("center is on, but balance is 'none'; leave one of them out")
        check_dynamic(dynamic)
        self._base = LinearQuantizer() if base is None else base
        self._bits = {"weight_bits": weight_bits, "activation_bits": activation_bits}
        self._dynamic: Dynamic = dynamic
        self._attention_bits = attention_bits
        self._expansion = expansion
        self._settings = (
            None
            if balance == "none"
            else BalanceSettings(
                method=balance,  # type: ignore[arg-type]  # checked there
                alpha=alpha,
                center=center,
                max_scale=max_scale,
                fold_form=fold_form,
            )
        )
        if isinstance(rounding, str):
            rounding = RoundingSettings(rounding=rounding, ranges="output" if rounding == "gptq" else "minmax")
        if rounding.learned and not sequential:
            raise ArgumentError("rounding is 'adaround', which learns block by block; pass sequential=True with it")
        self._rounding = rounding
        self._sequential = sequential
        self._overrides = (*layers, *overrides)
        self._timestep_input = timestep_input
        self._policy, self._verify = policy, verify
        self._layers: dict[str, LayerPlan] = {}

    def variant(
        self, *, weight_bits: int | None = None, dynamic: Dynamic | None = None, sequential: bool | None = None
    ) -> PTQ4DiTQuantizer:
        """The same quantizer with another value of what is not None."""
        other = copy.copy(self)
        if weight_bits is not None:
            check_bits("weight_bits", weight_bits)
            other._bits = {**self._bits, "weight_bits": weight_bits}
        if dynamic is not None:
            check_dynamic(dynamic)
            other._dynamic = dynamic
        if sequential is not None:
            other._sequential = sequential
        return other

    def plan(self, model: GraphModule) -> dict[str, LayerPlan]:
        """Plan of every linear of an exported graph, by its node name.

        Raises:
            ArgumentError: a layer is to have dynamic inputs, and the method is ``repq``.
            OverrideError: an override matches no layer.
        """
        plans = plan_layers(model, **self._bits, dynamic=self._dynamic, overrides=self._overrides)
        if self._settings is not None and self._settings.method == "repq":
            for plan in plans.values():
                if plan.is_dynamic:
                    raise ArgumentError(
                        f"{plan.layer!r} is to have dynamic inputs, and balance='repq' gives all channels one static "
                        "range; balance with another method, or leave dynamic out"
                    )
        return plans

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """Check a float graph and decompose its attention if that is quantized; called by ``prepare_pt2e``."""
        check_float_graph(model)
        if self._attention_bits is not None:
            decompose_attention(model)
        return self._base.transform_for_annotation(model)

    def annotate(self, model: GraphModule) -> GraphModule:
        """Let the base quantizer annotate a graph, then apply bits and exceptions; called by ``prepare_pt2e``."""
        self._layers = self.plan(model)
        model = self._base.annotate(model)
        fixed = constants(model)
        for node in linears(model):
            if node.args[0] in fixed:  # its output never changes
                node.meta.pop(Q_ANNOTATION_KEY, None)
            apply_plan(node, self._layers[node.name], self._expansion)
        if self._attention_bits is not None:
            annotate_attention(model, self._attention_bits)
        return model

    def validate(self, model: GraphModule) -> None:
        """Let the base quantizer validate a graph; called by ``prepare_pt2e``."""
        self._base.validate(model)

    @own_modes()
    def prepare_obs_or_fq_callback(
        self, model: GraphModule, edge_or_node_to_obs_or_fq: dict[EdgeOrNode, ObserverOrFakeQuantize]
    ) -> None:
        """Replace the base quantizer's observers by those that balance on conversion; called by ``prepare_pt2e``."""
        self._base.prepare_obs_or_fq_callback(model, edge_or_node_to_obs_or_fq)
        quantized = [node for node in linears(model) if _activation_spec(node) is not None]
        if not quantized:
            raise BalanceError(
                "no linear layer is left to quantize; check 'layers', the overrides and the base quantizer"
            )
        clock = TimestepClock()
        plan = BalancePlan(
            sites=self._sites(model, quantized),
            settings=self._settings,
            rounding=self._rounding,
            sequential=self._sequential,
            clock=clock,
            verify=self._verify,
            layers={name: layer.layer for name, layer in self._layers.items()},
            weights={node.name: weight_path(node) for node in linears(model)},
        )
        swap = _Swap(model, plan, clock, edge_or_node_to_obs_or_fq, self._layers, self._expansion)
        for node in quantized:
            swap.linear(node)
        for attention in find_attention(model) if self._attention_bits is not None else ():
            swap.attention(attention)
        self._observe_inputs(model, clock)

    def _sites(self, model: GraphModule, quantized: list[Node]) -> tuple[Site, ...]:
        """The graph's sites; those with a consumer that may not be balanced are refused."""
        if self._settings is None:
            return ()
        excluded = {name for name, plan in self._layers.items() if not plan.balance}
        only = {node.name for node in quantized} - excluded
        sites = refuse_sites(find_sites(model, only, self._policy), excluded, "an override switches its balancing off")
        if self._policy is not None and self._policy.premultiply:
            sites = premultiplied_sites(sites, only)
        if self._settings.method == "repq":
            sites = find_shifts(model, sites)
        elif self._settings.center:
            sites = find_shifts(model, sites, needed=False)
        found = [s for s in sites if s.refusal is None]
        if not found:
            reasons = first_refusals(sites) or "every layer is excluded"
            raise BalanceError(
                f"none of the {len(quantized)} quantized linears can be balanced ({reasons}); "
                "use balance='none' to quantize without balancing"
            )
        for site in sites:
            logger.debug("%s: %s", site.name, site.refusal or f"{site.num_variables} of {site.channels} channels")
        logger.info(
            "%d of %d quantized linears in %d of %d sites will be balanced%s",
            len({consumer.node for site in found for consumer in site.consumers}),
            len(quantized),
            len(found),
            len(sites),
            f"; refused: {first_refusals(refused)}" if (refused := [s for s in sites if s.refusal is not None]) else "",
        )
        return tuple(sites)

    def _observe_inputs(self, model: GraphModule, clock: TimestepClock) -> None:
        inputs, timestep = placeholders(model), timestep_placeholder(model, self._timestep_input)
        if timestep is None and self._settings is not None and self._settings.method not in ("max", "repq"):
            raise ArgumentError(
                f"the graph has no input called {' or '.join(map(repr, TIMESTEP_NAMES))}; its inputs are "
                f"{', '.join(repr(node.name) for node in placeholders(model))}: name the one that holds the timestep "
                "with timestep_input=..., or use balance='max'"
            )
        observer = InputObserver(clock, None if timestep is None else inputs.index(timestep))
        model.add_submodule("ptq4dit_inputs", observer)
        with model.graph.inserting_after(inputs[-1]):
            model.graph.call_module("ptq4dit_inputs", tuple(inputs))


class _Swap:
    """Replace the base quantizer's observers; edges that shared an observer still share one."""

    def __init__(
        self,
        model: GraphModule,
        plan: BalancePlan,
        clock: TimestepClock,
        observers: dict[EdgeOrNode, ObserverOrFakeQuantize],
        layers: Mapping[str, LayerPlan],
        expansion: Expansion | None,
    ) -> None:
        self.plan, self.clock, self.observers = plan, clock, observers
        self.layers, self.expansion = layers, expansion
        self.ours: set[ObserverOrFakeQuantize] = set()
        self.site_input = {
            (consumer.node, consumer.input): (key, len(consumer.variables))
            for site in plan.sites
            if site.refusal is None
            for key, first in site.inputs.items()
            for consumer in site.consumers
            if consumer.input == first.input
        }

    def linear(self, node: Node) -> None:
        x, weight = node.args[:2]
        assert isinstance(x, Node) and isinstance(weight, Node)
        specs: dict[Node, object] = node.meta[Q_ANNOTATION_KEY].input_qspec_map
        activation = _activation_spec(node)
        assert activation is not None
        if activation.is_dynamic and not self.layers[node.name].is_dynamic:
            raise ArgumentError(
                f"{layer_name(node)!r}: the base quantizer asks for dynamic activations, which have no calibrated "
                "range; balance first (collect_salience, balance), then use the base by itself"
            )
        self._swap((x, node), activation, lambda spec: self._activation_observer(node, x, spec))
        if activation.is_dynamic:  # convert_pt2e would look for its own op that finds dynamic ranges
            specs[x] = dataclasses.replace(activation, is_dynamic=False)
        elif activation.dtype == FLOAT:
            del specs[x]
        weight_spec = specs.get(weight)
        if isinstance(weight_spec, QuantizationSpec):
            expansion = self.expansion if self.layers[node.name].expands(self.expansion) else None
            self._swap(
                (weight, node),
                weight_spec,
                lambda spec: WeightObserver(dataclasses.replace(spec, expansion=expansion), self.plan),
            )

    def attention(self, attention: Attention) -> None:
        for name, (x, product) in attention.operands.items():
            spec = product.meta[Q_ANNOTATION_KEY].input_qspec_map[x]
            self._swap((x, product), spec, partial(self._operand_observer, x, f"{attention.name} ({name})"))

    def _swap(
        self,
        edge: tuple[Node, Node],
        spec: QuantizationSpec,
        make: Callable[[QuantSpec], ObserverOrFakeQuantize],
    ) -> None:
        old = self.observers[edge]
        if old in self.ours:  # shared with an earlier edge
            return
        new = make(QuantSpec.of(spec, eps=float(getattr(old, "eps", DEFAULT_EPS))))
        self.ours.add(new)
        for key, observer in self.observers.items():
            if observer is old:
                self.observers[key] = new

    def _activation_observer(self, node: Node, x: Node, spec: QuantSpec) -> ObserverOrFakeQuantize:
        layer = layer_name(node)
        found = self.site_input.get((node.name, x.name))
        if found is None:
            return RangeObserver(spec, self.plan, layer, self.clock, self._moments(x, searched=False))
        key, channels = found
        moments = self._moments(x, searched=True)
        observer = SalienceObserver(spec, self.plan, layer, self.clock, channels, batch_axis(x), moments)
        self.plan.observers.setdefault(key, []).append(observer)
        return observer

    def _operand_observer(self, x: Node, name: str, spec: QuantSpec) -> ObserverOrFakeQuantize:
        divided = [site.activations[x.name] for site in self.plan.sites if x.name in site.activations]
        axes = {axis for variables in divided for axis, size in enumerate(variables.shape) if size > 1}
        observer = AttentionObserver(spec, self.plan, name, self.clock, axes)
        self.plan.operands.setdefault(x.name, []).append(observer)
        return observer

    def _moments(self, x: Node, *, searched: bool) -> Moments | None:
        """Second moments of an input, if rounding or the search for b will need them."""
        rounded = not self.plan.sequential and not self.plan.rounding.plain
        searched = searched and self.plan.settings is not None and self.plan.settings.searches
        return Moments(shape_of(x)[-1]) if rounded or searched else None


def _activation_spec(node: Node) -> QuantizationSpec | None:
    annotation = node.meta.get(Q_ANNOTATION_KEY)
    spec = None if annotation is None else annotation.input_qspec_map.get(node.args[0])
    return spec if isinstance(spec, QuantizationSpec) else None
