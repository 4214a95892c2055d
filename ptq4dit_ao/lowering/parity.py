"""Parity check: a built model computes what the quantize/dequantize graph computes.

The kernel proof counts products. It does not detect a converter that drops an addition, or a kernel that reads memory
in another order. The parity check runs both on equal inputs, at two sizes.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.graph import CodeGen
from torch.utils._pytree import tree_leaves

from ptq4dit_ao.errors import LoweringError
from ptq4dit_ao.graph.names import LINEAR
from ptq4dit_ao.lowering.match import is_quantizer
from ptq4dit_ao.passes.verify import relative_error

logger = logging.getLogger(__name__)

Batch = tuple[Tensor, ...]
Run = Callable[..., object]
Rebuild = Callable[[GraphModule, Batch], Run]
"""Builds a part of the graph for such inputs."""

TOLERANCE = {torch.float32: 1e-2, torch.float16: 1e-1, torch.bfloat16: 1e-1}
"""Relative difference ``|y - y0| / |y0|`` that is always allowed, by the dtype of the float part.

A value half-way between two steps of a quantizer may be rounded either way, and in deep models such differences grow.
Beyond this tolerance, the graph's own response to rounding errors decides.
"""

RESPONSE = 4
"""Allowed difference as a multiple of the graph's response to rounding errors."""

ROUNDING = 2
"""Size of the changes that measure the response, in units in the last place. Kernels sum in different orders."""

TRIALS = 4
"""Number of random changes, of which the largest response counts. It is 1 for a consumed graph, measured in advance."""

LAST = 24
"""Number of linears at the end of a graph among which idle ones are looked for."""

MAX_BYTES = 2**30
"""Largest size of a graph's tensors at which parts of it are built to find the first differing node, in bytes."""


class Parity:
    """Comparison with the outputs of a converted graph, recorded before a backend may consume it.

    Args:
        graph: a graph of ``convert_pt2e``.
        batches: inputs to compare on. The first must run. Of the others, those that the graph does not take, because
            its batch size is fixed, are left out.
        dtype: dtype in which the backend's float part computes.
        consumed: whether the graph will be consumed. Everything that needs it is then computed now.
    """

    def __init__(self, graph: GraphModule, batches: Sequence[Batch], dtype: torch.dtype, *, consumed: bool) -> None:
        self._graph, self._dtype, self._consumed = graph, dtype, consumed
        first, *others = batches
        self._expected = [(first, _outputs(graph(*first)))]
        for batch in others:
            try:
                self._expected.append((batch, _outputs(graph(*batch))))
            except Exception as error:  # any error of an operator at another batch size than the captured one
                logger.debug("the graph does not run at batch %d: %s", _rows(batch), error)
        self._response = self._respond(trials=1) if consumed else None

    def check(self, run: Run, backend: str, build: Rebuild | None) -> float | None:
        """Largest difference of a built model from the graph, relative to the output; None if it cannot be determined.

        Args:
            run: the built model.
            backend: name of the backend.
            build: builds a part of the graph, to find the first node that differs; None if that would take too long.

        Raises:
            LoweringError: they differ by more than rounding explains, or the built model fails where the graph does
                not.
        """
        if not all(y.isfinite().all() for _, expected in self._expected for y in expected):
            logger.warning(
                "the quantized graph's output on the example inputs is not finite, so that what backend %r computes "
                "was not compared with it; pass example_inputs like those that the model receives",
                backend,
            )
            return None
        worst = 0.0
        for batch, expected in self._expected:
            try:
                found = _outputs(run(*batch))
            except Exception as error:  # any error of a runtime
                raise LoweringError(
                    f"backend {backend!r} fails at batch {_rows(batch)}, at which the graph runs: {error}; use another "
                    "backend, and please report this model"
                ) from error
            difference = relative_error(expected, found)
            if not difference <= self._allowed(difference):
                raise LoweringError(
                    f"what backend {backend!r} has built differs from the quantized graph by {difference:.3g} of the "
                    f"output's size at batch {_rows(batch)}, where rounding explains {self._allowed(difference):.3g}"
                    f"{self._place(build, batch)}; use another backend, and please report this model "
                    "(verify=False takes it as it is)"
                )
            worst = max(worst, difference)
        return worst

    def _allowed(self, difference: float) -> float:
        """Allowed difference. The response to rounding is measured only if ``difference`` exceeds the tolerance."""
        tolerance = TOLERANCE[self._dtype]
        if difference <= tolerance:
            return tolerance
        if self._response is None:
            self._response = self._respond(TRIALS)
        return max(tolerance, RESPONSE * self._response)

    def _respond(self, trials: int) -> float:
        """Largest change of the graph's output when each operator's output is changed by rounding errors."""
        batch, expected = self._expected[0]
        runs = (_Rounded(self._graph, self._dtype, seed).run(*batch) for seed in range(trials))
        return max(relative_error(expected, _outputs(run)) for run in runs)

    def _place(self, build: Rebuild | None, batch: Batch) -> str:
        """Text for a message that names the first node that differs, or nothing if it cannot be found."""
        size = sum(tensor.nbytes for tensor in self._graph.state_dict().values())
        if build is None or self._consumed or size > MAX_BYTES:
            return ""
        name = first_difference(self._graph, build, batch, TOLERANCE[self._dtype])
        return "" if name is None else f", first at {name}"


def first_difference(graph: GraphModule, build: Rebuild, batch: Batch, tolerance: float) -> str | None:
    """The first node that a backend computes differently, found by bisection over truncated graphs.

    A truncated graph returns all values that later nodes read, so that no difference is missed.

    Returns:
        The node's name and operator; None if a truncated graph cannot be built, or none of them differs.
    """
    recorder = _Recorder(graph)
    recorder.run(*batch)
    nodes = recorder.found
    right, wrong = 0, len(nodes)  # number of nodes that are run
    try:
        while wrong - right > 1:
            middle = (right + wrong) // 2
            part = _returning(graph, _read_later(nodes, middle))
            if relative_error(_outputs(part(*batch)), _outputs(build(part, batch)(*batch))) <= tolerance:
                right = middle
            else:
                wrong = middle
    except Exception as error:  # a converter may refuse a part of a graph that it accepts as a whole
        logger.debug("the node that differs was not found: %s", error)
        return None
    return f"{nodes[wrong - 1].name} ({nodes[wrong - 1].target})"


def idle_linears(graph: GraphModule, batch: Batch) -> tuple[str, ...]:
    """Linears that no output depends on, such as those of the last block's text stream, which is cut off.

    In one run for each of the last linears, its output is NaN. If no output becomes NaN, none depends on it. Earlier
    linears reach the output through attention.
    """
    linears = [node for node in graph.graph.nodes if node.target is LINEAR]
    return tuple(
        node.name
        for node in linears[-LAST:]
        if all(y.isfinite().all() for y in _outputs(_Poisoned(graph, node).run(*batch)) if y.is_floating_point())
    )


def _read_later(nodes: Sequence[Node], count: int) -> list[Node]:
    """The nodes among the first ``count`` that later nodes read, directly or through nodes that are not listed."""
    first, listed = set(nodes[:count]), set(nodes)

    def is_read(node: Node) -> bool:
        return any(
            user not in first and (user in listed or user.op == "output" or is_read(user)) for user in node.users
        )

    return [node for node in nodes[:count] if is_read(node)]


def _returning(graph: GraphModule, nodes: Sequence[Node]) -> GraphModule:
    """A copy of the graph that returns the values of these nodes. Tensors are shared."""
    part, names = GraphModule(graph, copy.deepcopy(graph.graph)), {node.name for node in nodes}
    (end,) = part.graph.find_nodes(op="output")
    end.args = (tuple(node for node in part.graph.nodes if node.name in names),)
    part.graph.set_codegen(CodeGen())
    part.graph.eliminate_dead_code()
    part.recompile()
    return part


class _Rounded(Interpreter):
    """An interpreter that perturbs each operator's output by a random rounding error."""

    def __init__(self, graph: GraphModule, dtype: torch.dtype, seed: int) -> None:
        super().__init__(graph)
        self._error = ROUNDING * torch.finfo(dtype).eps
        self._generator = torch.Generator().manual_seed(seed)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = super().call_function(target, args, kwargs)
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            return value
        noise = torch.randn(value.shape, generator=self._generator).to(value)
        return value * (1 + self._error * noise)


class _Poisoned(Interpreter):
    """An interpreter in which one node returns NaN, which quantizers pass on."""

    def __init__(self, graph: GraphModule, node: Node) -> None:
        super().__init__(graph)
        self._node = node

    def run_node(self, n: Node) -> Any:
        if is_quantizer(n):
            x = self.env[n.all_input_nodes[0]]
            if x.is_floating_point() and x.isnan().any():
                return x
        value = super().run_node(n)
        return torch.full_like(value, torch.nan) if n is self._node else value


class _Recorder(Interpreter):
    """An interpreter that finds the nodes whose value is a floating-point tensor that depends on the inputs."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.found: list[Node] = []
        self._dependent: set[Node] = set()

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.op == "placeholder" or not self._dependent.isdisjoint(n.all_input_nodes):
            self._dependent.add(n)
            computed = n.op == "call_function" and not is_quantizer(n)
            if computed and isinstance(value, Tensor) and value.is_floating_point():
                self.found.append(n)
        return value


def _outputs(value: object) -> list[Tensor]:
    return [leaf.detach().cpu() for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _rows(batch: Batch) -> int:
    return len(batch[0]) if batch[0].ndim else 1
