"""NNCF plugin: balance a model as a recipe says, and get the arguments of NNCF's functions that quantize it.

::

    ready = balance_for_nncf(transformer, load_recipe("dit_w8a8"), samples)
    quantized = nncf.quantize(**ready.quantize())  # an openvino.Model
    compressed = nncf.compress_weights(**ready.compress_weights(bits=4))  # another one
    converted = quantize_pt2e(**ready.quantize_pt2e())  # nncf.experimental.torch.fx; a graph for ptq4dit_ao.lower

A method returns the arguments of NNCF's function of that name. Each of them can be changed before the call.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule

from ptq4dit_ao._modes import own_modes
from ptq4dit_ao._optional import require
from ptq4dit_ao.calibration import CalibrationSamples
from ptq4dit_ao.capture import export_transformer
from ptq4dit_ao.errors import ArgumentError, CalibrationError, LoweringError
from ptq4dit_ao.graph.names import LINEAR
from ptq4dit_ao.lowering.openvino import to_openvino
from ptq4dit_ao.passes import balance, collect_salience
from ptq4dit_ao.quantizer.overrides import LayerPlan, plan_layers
from ptq4dit_ao.recipe import Recipe
from ptq4dit_ao.workflow.apply import SHUFFLE_SEED
from ptq4dit_ao.workflow.exported import export_for
from ptq4dit_ao.workflow.from_recipe import (
    balance_settings,
    dynamic_of,
    overrides_of,
    quantizer_from_recipe,
    site_policy,
    weight_bits_of,
)

Batch = tuple[Tensor, ...]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BalancedForNNCF:
    """A balanced float model, with its calibration batches and the recipe's plan for its layers."""

    graph: GraphModule
    batches: Sequence[Batch]
    recipe: Recipe
    plans: Mapping[str, LayerPlan]
    """Node name of each linear -> how the recipe quantizes it."""

    def quantize(self) -> dict[str, Any]:
        """Arguments of ``nncf.quantize``, without SmoothQuant, since the model is balanced. Convolutions stay float.

        A patch embedding in 8 bits would cost more accuracy than all linears together. Layers whose inputs have ranges
        per token stay float, too, because NNCF calibrates one range for each.

        Raises:
            LoweringError: the recipe asks for other than 8 bits, or for ranges per token everywhere.
        """
        self._need_eight_bits("nncf.quantize", "use compress_weights(), or apply_recipe and the backend 'openvino'")
        nncf, model = require("nncf", extra="openvino"), self.openvino_model()
        smoothing = nncf.AdvancedSmoothQuantParameters(convolution=-1, matmul=-1)
        return {
            "model": model,
            "calibration_dataset": nncf.Dataset(self.batches, _by_index),
            "model_type": nncf.ModelType.TRANSFORMER,
            "ignored_scope": self._ignored(model, self._skipped() | self._dynamic(), "Convolution"),
            "advanced_parameters": nncf.AdvancedQuantizationParameters(smooth_quant_alphas=smoothing),
        }

    def compress_weights(self, *, bits: int) -> dict[str, Any]:
        """Arguments of ``nncf.compress_weights``: int4 or int8, symmetric, per output channel.

        With ``levels: normal``, weights of 4 bits get NNCF's own normal levels (NF4), and the recipe's groups. The
        arguments cover only the layers to whose weights the recipe gives ``bits`` bits. Where it has layers of both,
        call the function for each.

        Raises:
            ArgumentError: ``bits`` is neither 4 nor 8.
            LoweringError: the recipe gives no layer that many bits.
        """
        nncf, weights = require("nncf", extra="openvino"), self.recipe.weights
        mode = nncf.CompressWeightsMode.NF4 if weights.levels == "normal" else nncf.CompressWeightsMode.INT4_SYM
        modes = {
            4: {"mode": mode, "ratio": 1.0, "group_size": weights.group or -1, "all_layers": True},
            8: {"mode": nncf.CompressWeightsMode.INT8_SYM},
        }
        if bits not in modes:
            raise ArgumentError(f"bits is {bits!r}; NNCF compresses weights to 4 or 8")
        others = {name for name, plan in self.plans.items() if plan.weight_bits != bits} | self._skipped()
        if others == self.plans.keys():
            raise LoweringError(f"no layer is to have weights of {bits} bits ({self._widths()}); choose another recipe")
        model = self.openvino_model()
        return {"model": model, "ignored_scope": self._ignored(model, others, "Convolution", "Gather"), **modes[bits]}

    def quantize_pt2e(self) -> dict[str, Any]:
        """Arguments of ``nncf.experimental.torch.fx.quantize_pt2e``.

        Raises:
            LoweringError: the recipe asks for other than 8 bits, which NNCF would silently change to 8.
        """
        self._need_eight_bits("quantize_pt2e", "use apply_recipe, or torchao's prepare_pt2e and convert_pt2e")
        done = self.recipe.balance.model_copy(update={"method": "none", "center": False})
        skipped = {"skip": True, "dynamic": None, "weight_bits": None, "activation_bits": None, "balance": None}
        overrides = tuple(o.model_copy(update=skipped) if o.dynamic else o for o in self.recipe.overrides)
        return {
            "model": self.graph,
            "quantizer": quantizer_from_recipe(
                self.recipe.model_copy(update={"balance": done, "overrides": overrides})
            ),
            "calibration_dataset": require("nncf", extra="openvino").Dataset(self.batches),
            "do_copy": True,
        }

    def openvino_model(self) -> Any:
        """The balanced float model as a new ``openvino.Model``."""
        model, _ = to_openvino(self.graph, self.batches[0])
        return model

    def _skipped(self) -> set[str]:
        return {name for name, plan in self.plans.items() if plan.skip}

    def _dynamic(self) -> set[str]:
        """Layers of single overrides whose inputs have ranges per token, which NNCF leaves in float."""
        found = {name for name, plan in self.plans.items() if plan.is_dynamic}
        if found:
            logger.warning(
                "%d linears with ranges per token stay float in NNCF, which has one range for each", len(found)
            )
        return found

    def _ignored(self, model: Any, linears: set[str], *types: str) -> Any:
        """NNCF's scope of these linears, by the names of their MatMuls, and of operation types."""
        exported = [node.name for node in self.graph.graph.nodes if node.target is LINEAR]
        # The model was exported again, which numbers linears in the same order and merges equal ones.
        names = {f"linear_{i}" if i else "linear" for i, name in enumerate(exported) if name in linears}
        nodes = {name: f"{name}/aten.linear.default/MatMul" for name in names}
        present = {node.get_friendly_name() for node in model.get_ops()}
        scope = require("nncf", extra="openvino").IgnoredScope
        return scope(names=sorted(present & set(nodes.values())), types=list(types), validate=False)

    def _need_eight_bits(self, function: str, instead: str) -> None:
        plans = [plan for plan in self.plans.values() if not plan.skip]
        static = [plan for plan in plans if not plan.is_dynamic]
        if plans and not static:
            raise LoweringError(
                f"{function} calibrates one range for each input, and the recipe gives all of them dynamic ones; "
                f"{instead}"
            )
        plans = static
        attention = self.recipe.attention.quantize and self.recipe.attention.bits != 8
        if attention or any((plan.weight_bits, plan.activation_bits) != (8, 8) for plan in plans):
            raise LoweringError(
                f"{function} quantizes to 8 bits, whatever it is asked for ({self._widths()}); {instead}"
            )

    def _widths(self) -> str:
        plans = [plan for plan in self.plans.values() if not plan.skip]
        widths = sorted({f"W{plan.weight_bits}A{plan.activation_bits}" for plan in plans})
        attention = self.recipe.attention
        rest = f", and {attention.bits} bits for attention" if attention.quantize else ""
        return f"the recipe says {' and '.join(widths)}{rest}"


@own_modes()
def balance_for_nncf(
    model: nn.Module, recipe: Recipe, samples: CalibrationSamples | Iterable[Sequence[Tensor]]
) -> BalancedForNNCF:
    """Balance a model on the CPU as a recipe says. NNCF calibrates on the same samples.

    Args:
        model: an eval-mode module, or the graph that ``export_transformer`` made of it. It is not changed.
        recipe: a recipe that balances.
        samples: as for :func:`~ptq4dit_ao.apply_recipe`.

    Raises:
        ArgumentError: the recipe does not balance.
        CalibrationError: there are no samples.
        PTQ4DiTError: see :func:`~ptq4dit_ao.collect_salience` and :func:`~ptq4dit_ao.balance`.
    """
    settings, policy = balance_settings(recipe), site_policy(recipe)
    exported = model if isinstance(model, GraphModule) else None
    if isinstance(samples, CalibrationSamples):
        exported = export_for(model, samples) if exported is None else exported
        samples = samples.shuffled(SHUFFLE_SEED).batches(recipe.calibration.rows)
    batches = [tuple(batch) for batch in samples]
    if not batches:
        raise CalibrationError("there are no calibration samples; pass at least one tuple of inputs")
    exported = export_transformer(model, batches[0]) if exported is None else exported
    plans = plan_layers(
        exported,
        weight_bits=weight_bits_of(recipe),
        activation_bits=recipe.activations.bits,
        dynamic=dynamic_of(recipe),
        overrides=overrides_of(recipe),
    )
    exclude = [plan.layer for plan in plans.values() if not plan.balance]
    statistics = collect_salience(exported, batches, exclude=exclude, policy=policy)
    graph = balance(exported, statistics, settings, exclude=exclude, policy=policy, verify=recipe.balance.verify)
    return BalancedForNNCF(graph=graph, batches=batches, recipe=recipe, plans=plans)


def _by_index(batch: Batch) -> dict[int, Any]:
    return {i: tensor.numpy() for i, tensor in enumerate(batch)}
