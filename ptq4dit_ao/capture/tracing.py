"""Export of a module with every axis free that the module leaves free."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from ptq4dit_ao.capture.call import Call, with_forward
from ptq4dit_ao.capture.guards import GuardAnalysis, printed
from ptq4dit_ao.capture.interface import BATCH, InputSpec, distinct, resized, set_interface
from ptq4dit_ao.capture.patches import exportable
from ptq4dit_ao.capture.sizes import Expression, FreeSizes, names_in
from ptq4dit_ao.choices import AXIS_KINDS, AxisKind
from ptq4dit_ao.errors import first_line
from ptq4dit_ao.graph.names import placeholders

Axis = tuple[str, int]
"""Name of an input, and an axis of it."""

MOST_CONDITIONS = 4
"""Largest number of conditions on a free size."""

MODEL_FAILS = "the model fails"
"""Beginning of a reason: the module itself does not run at some sizes."""

AGREEMENT = 0.5
"""Exponent on the dtype's eps that gives the tolerated relative error of the graph's output against the model's."""


@dataclass(frozen=True)
class Traced:
    """A graph, and what is known of its inputs."""

    graph_module: GraphModule
    inputs: tuple[InputSpec, ...]
    sizes: FreeSizes


class Tracing:
    """Export of one call of a module.

    Args:
        model: the module.
        call: its call.
        tensors: the example's tensors by name.
        kinds: the axes that may be free, with their meanings.
    """

    def __init__(
        self, model: nn.Module, call: Call, tensors: Mapping[str, Tensor], kinds: Mapping[str, Mapping[int, AxisKind]]
    ) -> None:
        self.model, self.call, self.tensors = model, call, dict(tensors)
        self.kinds: dict[Axis, AxisKind] = {
            (name, axis): kind for name, axes in kinds.items() for axis, kind in axes.items()
        }
        self.fixed: dict[Axis, str] = {
            (name, axis): "the example's size is 1; give an example with a larger one"
            for name, axis in self.kinds
            if tensors[name].shape[axis] == 1
        }
        """Reasons why an axis with a meaning is not free."""

    def export(self, *, verify: bool) -> GraphModule:
        """The graph with as many free axes as the module allows.

        Args:
            verify: whether to compare the graph with the module at other sizes than the example's. Axes at which they
                differ are fixed, or from 2 if they differ at 1 alone.

        Raises:
            ExportError: the module cannot be exported.
        """
        while True:
            traced = self._trace()
            if traced is None:
                continue
            wrong = self._wrong(traced) if verify else {}
            if not wrong:
                break
            for axis in self._axes_of(traced, wrong):
                self.fixed[axis] = wrong[self._name_of(traced, axis)]
        sizes = self._checked_at_one(traced) if verify else traced.sizes
        set_interface(traced.graph_module, traced.inputs, sizes)
        return traced.graph_module

    def _free(self) -> list[Axis]:
        return [axis for axis in self.kinds if axis not in self.fixed]

    def _trace(self) -> Traced | None:
        """Export once. None if some axes had to be fixed, so that it has to be done again."""
        free = self._free()
        try:
            program = self._program(free)
        except Exception as error:  # torch.export raises many types
            varied = [axis for axis in free if self.kinds[axis] != "batch"]
            if not varied:
                raise
            # Code that computes with a number may not take a symbol in its place. The other sizes can be free then.
            first = [axis for axis in varied if axis[0] in self.call.numbers] or varied
            said = f"torch.export cannot capture it with free sizes: {first_line(error)}"
            self.fixed.update(dict.fromkeys(first, said))
            return None
        graph_module = module_of(program)
        values = {name: node.meta["val"] for name, node in self._named(graph_module)}
        raw = {(name, axis): values[name].shape[axis] for name, axis in free}
        sizes = {axis: size for axis, size in raw.items() if isinstance(size, torch.SymInt)}
        env = next((size.node.shape_env for size in sizes.values()), None)
        symbols: dict[str, Axis] = {}
        for axis, size in sizes.items():
            if size.node._expr.is_Symbol:
                symbols.setdefault(str(size.node._expr), axis)
        constant = {axis: "the model fixes it" for axis in free if axis not in sizes}
        if env is None:
            self.fixed.update(constant)
            return self._traced(graph_module, {}, FreeSizes())
        found = GuardAnalysis(
            env,
            {symbol: int(self.tensors[name].shape[axis]) for symbol, (name, axis) in symbols.items()},
            lambda one, other: self.kinds[symbols[one]] == self.kinds[symbols[other]],
        )
        pinned = {symbols[symbol]: reason for symbol, reason in found.pinned.items()}
        if pinned:
            self.fixed.update(pinned | constant)
            return None
        self.fixed.update(constant)
        places = list(sizes)
        found.free.sort(key=lambda symbol: places.index(_first_axis(symbol, sizes)))
        names = self._names({symbol: _first_axis(symbol, sizes) for symbol in found.free})
        free_sizes, conditions, unsayable = found.sizes(names)
        unsayable |= self._entangled(names, conditions)
        if unsayable:
            self.fixed.update({_first_axis(symbol, sizes): reason for symbol, reason in unsayable.items()})
            return None
        return self._traced(graph_module, names, FreeSizes(sizes=free_sizes, conditions=conditions))

    def _program(self, free: Collection[Axis]) -> ExportedProgram:
        names = list(self.tensors)
        inputs = distinct(list(self.tensors.values()))
        batched = [i for i, name in enumerate(names) if self.kinds.get((name, 0)) == "batch" and (name, 0) in free]

        def forward(*tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
            for i in batched[1:]:
                torch._check(tensors[i].shape[0] == tensors[batched[0]].shape[0])
            return self.call(tensors)

        shapes = tuple({axis: Dim.AUTO for name, axis in free if name == own} for own in names)
        with exportable(self.model):
            return torch.export.export(
                with_forward(self.model, names, forward), inputs, dynamic_shapes=shapes, strict=False
            )

    def _names(self, symbols: Mapping[str, Axis]) -> dict[str, str]:
        """A name for each free symbol: the meaning of its first axis, or that number or axis if the name is taken."""
        found: dict[str, str] = {}
        for symbol, (name, axis) in symbols.items():
            wanted = [self.kinds[name, axis], *([name] if name in self.call.numbers else []), f"{name}_axis_{axis}"]
            found[symbol] = next(one for one in wanted if one not in found.values())
        return found

    def _entangled(self, names: Mapping[str, str], conditions: Collection[str]) -> dict[str, str]:
        """The least common size that depends on others in many ways, by symbol, with the reason to fix it."""
        ways = {symbol: sum(name in names_in(text) for text in conditions) for symbol, name in names.items()}
        common: dict[str, int] = {name: place for place, name in enumerate(AXIS_KINDS)}
        many = [symbol for symbol in names if ways[symbol] > MOST_CONDITIONS]
        worst = max(many, key=lambda symbol: common.get(names[symbol], len(common)), default=None)
        return {} if worst is None else {worst: f"it depends on other sizes in {ways[worst]} ways"}

    def _traced(self, graph_module: GraphModule, names: Mapping[str, str], sizes: FreeSizes) -> Traced:
        def spec(name: str, node: Node) -> InputSpec:
            expressions: list[Expression] = []
            for size in node.meta["val"].shape:
                varies = isinstance(size, torch.SymInt) and size.node.expr.free_symbols
                expressions.append(printed(size.node.expr, names) if varies else int(size))
            example = self.tensors[name]
            return InputSpec(name=name, shape=tuple(example.shape), dtype=example.dtype, sizes=tuple(expressions))

        # Where there are as many channels as frames, both axes were tried, and one is free.
        frames = {name for name, axis in self._free() if self.kinds[name, axis] == "frames"}
        said = {
            f"{self.kinds[axis]} of {axis[0]}": reason
            for axis, reason in self.fixed.items()
            if self.kinds[axis] != "frames" or axis[0] not in frames
        }
        specs = tuple(spec(name, node) for name, node in self._named(graph_module))
        return Traced(graph_module, specs, replace(sizes, fixed=said))

    def _named(self, graph_module: GraphModule) -> Iterator[tuple[str, Node]]:
        """The inputs of a graph with the tensors' names. The node of ``input``, a function of Python, has another."""
        return zip(self.tensors, placeholders(graph_module), strict=True)

    def _wrong(self, traced: Traced) -> dict[str, str]:
        """Sizes that are not free, with reasons: the graph differs from the module there, or the module fails."""
        values, still = traced.sizes.other()
        found = dict.fromkeys(still, "no other size fits those of the other inputs")
        problem = self._problem(traced, values)
        if problem is None:
            return found
        moved = [name for name in values if values[name] != traced.sizes.example[name]]
        for name in moved:
            alone = traced.sizes.example | {name: values[name]}
            if traced.sizes.problem(alone) is None and (said := self._problem(traced, alone)):
                found[name] = f"at {name} {alone[name]}, {said}"
        return found or {name: f"at other sizes, {problem}" for name in moved if name != BATCH}

    def _checked_at_one(self, traced: Traced) -> FreeSizes:
        """The free sizes, from 2 where the graph does not stand for the module at 1, alone or with others.

        torch.export takes each size for 2 or more, and records no guard where a module compares it with 1. A module
        that fails at one size of 1 may need others of the same meaning at 1, too.
        """
        sizes = {size.name: size for size in traced.sizes.sizes}
        kinds = {self._name_of(traced, axis): self.kinds[axis] for axis in self._free()}

        def problem(names: Collection[str]) -> str | None:
            values = traced.sizes.example | {name: 1 for name in names if sizes[name].least == 1}
            return None if traced.sizes.problem(values) else self._problem(traced, values)

        for name in [name for name in sizes if sizes[name].least == 1]:
            alike = [other for other in sizes if kinds.get(other) == kinds.get(name)]
            found = problem([name])
            if found is not None and (not found.startswith(MODEL_FAILS) or len(alike) == 1 or problem(alike)):
                sizes[name] = replace(sizes[name], least=2)
        rest = [name for name in sizes if name != BATCH and sizes[name].least == 1]
        found = problem(rest) if len(rest) > 1 else None
        if found is not None and not found.startswith(MODEL_FAILS):
            sizes.update({name: replace(sizes[name], least=2) for name in rest})
        return replace(traced.sizes, sizes=tuple(sizes.values()))

    def _problem(self, traced: Traced, values: Mapping[str, int]) -> str | None:
        """The reason why the graph does not stand for the module at these sizes; None if it does."""
        inputs = [resized(self.tensors[spec.name], spec, values) for spec in traced.inputs]
        try:
            expected = self.call(inputs)
        except Exception as error:  # a model may raise any type
            return f"{MODEL_FAILS} ({first_line(error)})"
        try:
            got = traced.graph_module(*inputs)
        except Exception as error:
            return f"the graph fails ({first_line(error)})"
        return difference(expected, got)

    def _axes_of(self, traced: Traced, names: Collection[str]) -> list[Axis]:
        return [axis for axis in self._free() if self._name_of(traced, axis) in names]

    def _name_of(self, traced: Traced, axis: Axis) -> str:
        name, place = axis
        spec = next(spec for spec in traced.inputs if spec.name == name)
        return str(spec.sizes[place])


def module_of(program: ExportedProgram) -> GraphModule:
    """The module of a program, without the check of its inputs.

    The check includes bounds of the trace, such as no size of 1, which no op of the graph needs.
    """
    graph_module = program.module(check_guards=False)
    graph_module._forward_pre_hooks.clear()
    return graph_module


def _first_axis(symbol: str, sizes: Mapping[Axis, torch.SymInt]) -> Axis:
    """The first axis whose size is a symbol; of the axes that have it in an expression, if none is."""
    exact = [axis for axis, size in sizes.items() if str(size.node.expr) == symbol]
    return (
        exact[0] if exact else next(a for a, size in sizes.items() if symbol in map(str, size.node.expr.free_symbols))
    )


def difference(expected: Any, got: Any) -> str | None:
    """The first output that differs by more than rounding, in words; None if none does."""
    for i, (one, other) in enumerate(zip(tree_leaves(expected), tree_leaves(got), strict=True)):
        if one.shape != other.shape:
            return f"output {i} has shape {tuple(other.shape)}, the model's {tuple(one.shape)}"
        if not one.is_floating_point() or not one.isfinite().all():
            continue
        tolerance = torch.finfo(one.dtype).eps ** AGREEMENT
        one, other = one.double(), other.double()
        error = float((one - other).norm() / one.norm().clamp_min(1e-300))
        if not error <= tolerance:
            return f"output {i} differs by {error:.2g} of its size"
    return None
