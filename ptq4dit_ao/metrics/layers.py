"""Sources of a quantized graph's error: its layers, at each timestep."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import functional

from ptq4dit_ao._modes import own_modes
from ptq4dit_ao._progress import OnProgress, ignore, part_of
from ptq4dit_ao.core import fake_quantize
from ptq4dit_ao.core.per_token import fake_quantize_tokens
from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.graph.names import LINEAR, calls, get_attribute, writes_in_place
from ptq4dit_ao.metrics.paired import PairedError, energies, rows_of, timesteps_of
from ptq4dit_ao.metrics.walk import Instead, Walk
from ptq4dit_ao.observers.per_token import per_token
from ptq4dit_ao.observers.qdq import quantized as ops


@own_modes()
def layer_errors(
    balanced: GraphModule,
    quantized: GraphModule,
    batches: Iterable[tuple[Tensor, ...]],
    *,
    timestep_index: int | None = 1,
) -> dict[str, PairedError]:
    """Error of every linear's output, including the error accumulated before it: node name -> a row for each batch.

    Both graphs run side by side, and no output is kept.

    Args:
        balanced: the float graph after folding. Its linears have the names of the quantized graph's.
        quantized: the converted graph.
        batches: input tuples, each of one timestep.
        timestep_index: index of the input that holds the timestep; None if none does.

    Raises:
        ArgumentError: a batch mixes timesteps, or a linear is missing in the float graph.
    """
    found = defaultdict(list)
    for inputs in batches:
        t = timesteps_of(inputs, timestep_index).unique()
        if len(t) != 1:
            raise ArgumentError(f"a batch holds {len(t)} timesteps; give batches of one timestep each")
        float_outputs = _linear_outputs(balanced, inputs)
        for name, actual in _linear_outputs(quantized, inputs):
            expected = next((value for other, value in float_outputs if other == name), None)
            if expected is None:
                raise ArgumentError(
                    f"the float graph has no linear {name!r} where the quantized graph has it; give the float graph "
                    "that the quantized one was made of"
                )
            # The output is compared as one row, because its samples may lie along any axis.
            found[name].append(energies(t, expected.double().unsqueeze(0), actual.double().unsqueeze(0)))
    return {name: PairedError.of(parts) for name, parts in found.items()}


def _linear_outputs(graph_module: GraphModule, inputs: tuple[Tensor, ...]) -> Iterator[tuple[str, Tensor]]:
    outputs = {}
    for node in graph_module.graph.find_nodes(op="call_function", target=LINEAR):
        around = per_token(node)
        outputs[node if around is None else around.output] = node.name
    return ((outputs[node], value) for node, value in Walk(graph_module, inputs).steps() if node in outputs)


@dataclass(frozen=True, kw_only=True)
class LeaveOneOut:
    """Errors of the output when the linears of one input at a time are not quantized, and all others are."""

    quantized: PairedError
    """Error with everything quantized."""
    without: dict[tuple[str, ...], PairedError]
    """Node names of the linears that read one quantized input -> error with these in float, in execution order."""

    @property
    def gains_db(self) -> dict[tuple[str, ...], float]:
        """Gain of each entry of :attr:`without` in dB.

        It is below 0 where other linears compensated for their error.
        """
        return {names: error.sqnr_db - self.quantized.sqnr_db for names, error in self.without.items()}


@own_modes()
def leave_one_out(
    balanced: GraphModule,
    quantized: GraphModule,
    batches: Iterable[tuple[Tensor, ...]],
    *,
    timestep_index: int | None = 1,
    on_progress: OnProgress = ignore,
) -> LeaveOneOut:
    """Restore the linears of one quantized input at a time to float, input and weights.

    The nodes before that input run once for all, so that a batch costs half a run of the graph for each input.

    Args:
        balanced: the float graph after folding. Its linears have the names of the quantized graph's.
        quantized: the converted graph.
        batches: input tuples.
        timestep_index: index of the input that holds the timestep; None if none does.
        on_progress: called after every such run.

    Raises:
        ArgumentError: the quantized graph has no linear with a quantized input.
    """
    twins = _by_name(balanced)
    changes: dict[Node, dict[Node, Callable[..., Tensor]]] = {}
    for source, linears in quantized_inputs(quantized).items():
        quantizers = [] if source.target is LINEAR else [source, *source.users]
        changes[source] = dict.fromkeys(quantizers, _as_it_is)
        for node in linears:
            changes[source] |= _restored(node, balanced, twins[node.name])
    *without, everything = _one_by_one(quantized, changes, balanced, batches, timestep_index, on_progress)
    return LeaveOneOut(quantized=everything, without=dict(zip(_names(quantized), without, strict=True)))


@own_modes()
def weight_errors(
    balanced: GraphModule,
    quantized: GraphModule,
    batches: Iterable[tuple[Tensor, ...]],
    *,
    only: Container[str] | None = None,
    timestep_index: int | None = 1,
    on_progress: OnProgress = ignore,
) -> dict[tuple[str, ...], PairedError]:
    """Errors of the output when only the weights that read one quantized input are quantized, and all else is float.

    The layers must have been rounded independently, in one pass or to nearest. Weights rounded layer by layer
    compensate for errors of other layers, which do not occur here.

    Args:
        balanced, quantized, batches, timestep_index, on_progress: as for :func:`leave_one_out`.
        only: names of the linears to measure; None is all.

    Returns:
        Node names of the linears that read one quantized input -> error, in execution order.

    Raises:
        ArgumentError: the quantized graph has no linear with a quantized input.
    """
    twins = _by_name(balanced)
    changes, names = {}, []
    for linears in quantized_inputs(quantized).values():
        linears = [node for node in linears if only is None or node.name in only]
        if linears:
            changes[twins[linears[0].name]] = {twins[node.name]: _linear_with(quantized, node) for node in linears}
            names.append(tuple(node.name for node in linears))
    *alone, _ = _one_by_one(balanced, changes, balanced, batches, timestep_index, on_progress)
    return dict(zip(names, alone, strict=True))


@own_modes()
def input_errors(
    balanced: GraphModule,
    quantized: GraphModule,
    batches: Iterable[tuple[Tensor, ...]],
    *,
    only: Container[str] | None = None,
    timestep_index: int | None = 1,
    on_progress: OnProgress = ignore,
) -> dict[tuple[str, ...], tuple[PairedError, PairedError]]:
    """Errors of the output when one input alone is quantized, and all else is float: statically, and per token.

    Args:
        balanced, quantized, batches, timestep_index, on_progress: as for :func:`leave_one_out`. The quantized graph's
            inputs have static ranges.
        only: names of the linears whose inputs are measured; None is all.

    Returns:
        Node names of the linears that read one quantized input -> both errors, in execution order.

    Raises:
        ArgumentError: the quantized graph has no linear with a quantized input.
    """
    twins, batches = _by_name(balanced), list(batches)
    groups = {
        source: [node for node in linears if only is None or node.name in only]
        for source, linears in quantized_inputs(quantized).items()
        if source.target is not LINEAR
    }
    groups = {source: linears for source, linears in groups.items() if linears}
    errors = []
    for part, per_row in enumerate((False, True)):
        changes = {
            twins[linears[0].name]: {twins[node.name]: _with_input(source, per_row) for node in linears}
            for source, linears in groups.items()
        }
        progress = part_of(on_progress, part, 2)
        errors.append(_one_by_one(balanced, changes, balanced, batches, timestep_index, progress)[:-1])
    names = (tuple(node.name for node in linears) for linears in groups.values())
    return dict(zip(names, zip(*errors, strict=True), strict=True))


def _with_input(quantize: Node, per_row: bool) -> Callable[..., Tensor]:
    """A linear whose input is quantized as by a node, or with a range for each row."""
    arguments: Any = quantize.args
    _, scale, zero_point, low, high, _ = arguments

    def linear(x: Tensor, *parameters: Tensor) -> Tensor:
        q = fake_quantize_tokens(x, low, high) if per_row else fake_quantize(x, scale, zero_point, low, high)
        return functional.linear(q, *parameters)

    return linear


def quantized_inputs(quantized: GraphModule) -> dict[Node, list[Node]]:
    """First node of each quantized input -> the linears that read it, in execution order.

    It is the quantize node. Of an input that stays float and is read by integer weights, it is the first linear.

    Raises:
        ArgumentError: there are none.
    """
    groups: dict[Node, list[Node]] = defaultdict(list)
    for node in quantized.graph.nodes:
        if node.target is not LINEAR:
            continue
        if calls(node.args[0], ops.dequantize_per_tensor.default):
            groups[node.args[0].args[0]].append(node)
        elif calls(node.args[1], ops.dequantize_per_channel.default):
            readers = (user for user in node.args[0].users if user in groups and user.args[0] is node.args[0])
            groups[next(readers, node)].append(node)
    if not groups:
        raise ArgumentError("this graph has no linear with a quantized input; give one from convert_pt2e")
    return dict(groups)


def _one_by_one(
    graph_module: GraphModule,
    changes: Mapping[Node, Instead],
    reference: GraphModule,
    batches: Iterable[tuple[Tensor, ...]],
    timestep_index: int | None,
    on_progress: OnProgress,
) -> list[PairedError]:
    """Errors of a graph with each change, keyed by the first node that it affects.

    The last one is without any change.
    """
    batches, in_place = list(batches), writes_in_place(graph_module)
    starts = [node for node in graph_module.graph.nodes if node in changes]
    parts: dict[Node | None, list[Tensor]] = {node: [] for node in (*changes, None)}
    for batch, inputs in enumerate(batches):
        t, expected = timesteps_of(inputs, timestep_index), rows_of(reference(*inputs))
        walk = Walk(graph_module, inputs)
        for done, start in enumerate(starts, start=batch * len(starts) + 1):
            if not in_place:  # otherwise a run would change the values that the next one starts from
                walk.advance(start)
            parts[start].append(energies(t, expected, rows_of(walk.fork(changes[start]).finish())))
            on_progress(done, len(batches) * len(starts))
        parts[None].append(energies(t, expected, rows_of(walk.finish())))
    return [PairedError.of(part) for part in parts.values()]


def _linear_with(graph_module: GraphModule, node: Node) -> Callable[..., Tensor]:
    """A linear with the weight and bias of a node of this graph."""

    def linear(x: Tensor, *_: object) -> Tensor:
        return functional.linear(x, *_parameters(graph_module, node))

    return linear


def _restored(linear: Node, balanced: GraphModule, twin: Node) -> Instead:
    """A quantized graph's linear with the weight and bias of its twin in the float graph."""
    around = per_token(linear)
    if around is None:
        return {linear: _linear_with(balanced, twin)}

    def weight(x: Tensor) -> Tensor:
        value: Tensor = _parameters(balanced, twin)[0].to(x.dtype)
        return value

    # Rows are shifted and scaled as before, and the shift is undone with the float weight's sums.
    instead: dict[Node, Callable[..., Tensor]] = {
        linear: lambda x, *_: functional.linear(x, weight(x)),
        around.shift: lambda middle, _: middle * weight(middle).sum(1),
    }
    if around.biased is not None:
        instead[around.biased] = lambda shift, bias: (
            shift + _parameters(balanced, twin)[1] if len(twin.args) > 2 else shift
        )
    return instead


def _parameters(graph_module: GraphModule, node: Node) -> list[Any]:
    """Weight of a linear and, if it has one, its bias."""
    around = per_token(node)
    biases = node.args[2:] if around is None else [around.bias]
    return [_value(graph_module, source) for source in (node.args[1], *biases) if source is not None]


def _value(graph_module: GraphModule, source: object) -> Any:
    """Value of a constant node, or of a node that dequantizes one."""
    if not isinstance(source, Node):
        return source
    if source.op == "get_attr":
        return get_attribute(graph_module, str(source.target))
    assert callable(source.target), f"{source} is not computed from constants"
    return source.target(*(_value(graph_module, argument) for argument in source.args), **source.kwargs)


def _by_name(graph_module: GraphModule) -> dict[str, Node]:
    return {node.name: node for node in graph_module.graph.nodes}


def _names(quantized: GraphModule) -> list[tuple[str, ...]]:
    return [tuple(node.name for node in linears) for linears in quantized_inputs(quantized).values()]


def _as_it_is(x: Tensor, *_: object) -> Tensor:
    return x
