"""Self-check that a balanced graph has the same output as before, and undoes the sites that change it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves, tree_map
from torchao.quantization.pt2e import ObserverBase

from ptq4dit_ao._modes import without_autocast
from ptq4dit_ao.capture.interface import BATCH, free_sizes, input_specs, random_inputs
from ptq4dit_ao.choices import FoldForm
from ptq4dit_ao.errors import BalanceError
from ptq4dit_ao.graph import Site
from ptq4dit_ao.graph.names import placeholders
from ptq4dit_ao.graph.pending import pending, tensor_at
from ptq4dit_ao.graph.shapes import tensor_of
from ptq4dit_ao.passes.edit import Snapshot
from ptq4dit_ao.passes.vectors import SiteOutcome, apply_outcome

logger = logging.getLogger(__name__)

NARROW = (torch.bfloat16, torch.float16)
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""Tolerated relative error of the output, by the parameters' dtype.

Rounding the balanced parameters changes the output of small models by 2e-7 in float32 and by 4e-3 in bfloat16. The
tolerance of float64 is large because float64 models of diffusers cast to float32 inside.
"""

ROWS = 2
"""Number of samples of a batch that the self-check runs."""


class SelfCheck:
    """Output of a float graph before it is balanced, to compare with the output afterwards.

    Args:
        model: a captured or prepared graph; observers are skipped.
        example: inputs to run, of which at most two rows are used; random inputs of the graph's shapes if None.
    """

    def __init__(self, model: GraphModule, example: Sequence[Tensor] | None = None) -> None:
        self.inputs = _few_rows(model, example) if example is not None else example_inputs(model)
        self.dtype = _narrowest(model)
        self.before = Snapshot(model)
        self.expected = self._run(model)

    def error(self, model: GraphModule) -> float:
        """Relative error ``|y - y0| / |y0|``, the largest over the outputs; infinite if one is not finite."""
        return relative_error(self.expected, self._run(model))

    @property
    def tolerance(self) -> float:
        """Tolerated relative error, well above the effect of rounding and below that of a wrong fold."""
        return TOLERANCE[self.dtype]

    def settle(
        self, model: GraphModule, sites: Sequence[Site], outcomes: Mapping[str, SiteOutcome], form: FoldForm
    ) -> tuple[tuple[Site, ...], dict[str, SiteOutcome]]:
        """Undo, in place, the sites that change the graph's output, and log a warning for each.

        Returns:
            All sites, with a refusal for those that were undone, and the remaining outcomes.

        Raises:
            BalanceError: the output differs although no site is balanced.
        """
        if not all(leaf.isfinite().all() for leaf in self.expected):
            logger.warning("the float model's output is not finite; the effect of balancing on it was not checked")
            return tuple(sites), dict(outcomes)
        error, undone = self.error(model), {}
        remaining = list(outcomes.values())
        while not error <= self.tolerance and remaining:
            wrong = self._first_wrong(model, remaining, form)
            undone[wrong.site.name] = f"the self-check found that it changes the output by {error:.2g} of its size"
            logger.warning("%s: %s; undone. Please report this model", wrong.site.name, undone[wrong.site.name])
            remaining.remove(wrong)
            self._fold_only(model, remaining, form)
            error = self.error(model)
        if not error <= self.tolerance:
            raise BalanceError(
                f"the graph changed by {error:.2g} of its output's size although no site is balanced; if it draws "
                "random numbers, make it deterministic, otherwise please report this model"
            )
        kept = {outcome.site.name: outcome for outcome in remaining}
        return tuple(replace(s, refusal=f"{s.name}: {undone[s.name]}") if s.name in undone else s for s in sites), {
            name: kept[name] for name in outcomes if name in kept
        }

    def _first_wrong(self, model: GraphModule, folded: list[SiteOutcome], form: FoldForm) -> SiteOutcome:
        """The first site that changes the graph's output, found by bisection."""
        right, wrong = 0, len(folded)
        while wrong - right > 1:
            middle = (right + wrong) // 2
            self._fold_only(model, folded[:middle], form)
            if self.error(model) <= self.tolerance:
                right = middle
            else:
                wrong = middle
        return folded[wrong - 1]

    def _fold_only(self, model: GraphModule, outcomes: Sequence[SiteOutcome], form: FoldForm) -> None:
        """Restore the graph and fold only these sites, in place."""
        self.before.restore(model)
        for outcome in outcomes:
            apply_outcome(model, outcome, form)
        model.recompile()

    def _run(self, model: GraphModule) -> list[Tensor]:
        runner = _Float32(model) if self.dtype in NARROW else _PastObservers(model)
        with torch.no_grad(), without_autocast():
            return floating_outputs(runner.run(*self.inputs))


def example_inputs(model: GraphModule) -> tuple[Tensor, ...]:
    """Random inputs of the exported shapes, with a batch of two.

    Raises:
        BalanceError: the graph does not have the shapes of its inputs.
    """
    specs = input_specs(model)
    if specs is None:
        name = next(node.name for node in placeholders(model) if tensor_of(node) is None)
        raise BalanceError(f"the graph does not say what input {name!r} looks like; pass an example")
    values = free_sizes(model).example
    if BATCH in values:
        values |= {BATCH: ROWS}
    return random_inputs(specs, next((p.device for p in model.parameters()), None), values=values)


def _few_rows(model: GraphModule, example: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The first :data:`ROWS` rows of the inputs that carry the batch, and the other inputs as a whole."""
    specs = input_specs(model)
    batched = [spec.batched for spec in specs] if specs is not None else [False] * len(example)
    return tuple(x[:ROWS] if free else x for x, free in zip(example, batched, strict=True))


def _narrowest(model: GraphModule) -> torch.dtype:
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def relative_error(expected: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """Relative error ``|got - expected| / |expected|``, the largest over pairs; infinite if one is not finite."""
    worst = 0.0
    for one, other in zip(expected, got, strict=True):
        one, other = one.to(torch.float64), other.to(torch.float64)
        error = float((other - one).norm() / one.norm().clamp_min(torch.finfo(torch.float64).tiny))
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def floating_outputs(output: Any) -> list[Tensor]:
    """The floating-point tensors in a model's output."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


@dataclass(frozen=True)
class _Weight:
    """Placeholder value of a weight that has pending factors."""

    path: str


class _PastObservers(Interpreter):
    """Interpreter that runs a prepared graph without its observers, as the float graph it was made from."""

    module: GraphModule

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Graphs read all weights first. Multiplying pending factors only where a weight is used saves memory.
        return _Weight(target) if target in pending(self.module) else super().get_attr(target, args, kwargs)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(self.fetch_attr(target), ObserverBase):  # self.submodules lists a shared observer only once
            return args[0]
        return super().call_module(target, args, kwargs)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = tree_map(self._multiplied, (args, kwargs))
        return super().call_function(target, args, kwargs)

    def _multiplied(self, value: Any) -> Any:
        return tensor_at(self.module, value.path) if isinstance(value, _Weight) else value


class _Float32(_PastObservers):
    """Interpreter that runs a 16-bit graph in float32, so that rounding neither hides nor resembles a wrong fold."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        return super().run(*tree_map(_widen, args), **kwargs)

    def run_node(self, n: Node) -> Any:
        if n.target is torch.ops.aten._assert_tensor_metadata.default:
            return None
        return tree_map(_widen, super().run_node(n))

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for i, inner in enumerate(args):
            if isinstance(inner, GraphModule):  # a region with autocast switched off, or without gradients
                return _Float32(inner).run(*args[i + 1 :])
        args, kwargs = tree_map(self._multiplied, (args, kwargs))
        return super().call_function(target, tree_map(_widen, args), tree_map(_widen, kwargs))


def _widen(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype in NARROW:
        return value.to(torch.float32)
    return torch.float32 if value in NARROW and isinstance(value, torch.dtype) else value
