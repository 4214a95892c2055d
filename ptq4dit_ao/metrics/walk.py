"""Stepwise runs of a graph, which can be inspected, stopped and resumed in more than one way."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

Instead = Mapping[Node, Callable[..., Tensor]]
"""Nodes -> functions that compute their value from their arguments, in place of the node."""


class Walk(Interpreter):
    """One run of a graph. It keeps the values that a later node reads.

    Args:
        graph_module: the graph.
        inputs: inputs of the run.
    """

    def __init__(self, graph_module: GraphModule, inputs: Sequence[Tensor]) -> None:
        super().__init__(graph_module)
        self._inputs = self.graph.process_inputs(*inputs)
        self._nodes = list(self.graph.nodes)
        self._done = 0
        self._instead: Instead = {}

    def steps(self, stop: Node | None = None) -> Iterator[tuple[Node, Any]]:
        """Resume the run up to a node or to the end, and yield each node with its value."""
        taken = sum(node.op == "placeholder" for node in self._nodes[: self._done])
        self.args_iter = (x.clone() for x in self._inputs[taken:])  # the graph may write into its inputs
        while self._done < len(self._nodes) and (node := self._nodes[self._done]) is not stop:
            value = self.env[node] = self.run_node(node)
            for unread in self.user_to_last_uses.get(node, ()):
                del self.env[unread]
            self._done += 1
            yield node, value

    def advance(self, stop: Node) -> None:
        """Resume the run up to a node."""
        for _ in self.steps(stop):
            pass

    def finish(self) -> Any:
        """Resume the run to the end, and return the graph's output."""
        *_, (_, value) = self.steps()
        return self.graph.process_outputs(value)

    def fork(self, instead: Instead) -> Self:
        """A copy of the run from here on, with other values for some nodes. Tensors are shared."""
        other = copy.copy(self)
        other.env, other._instead = dict(self.env), instead
        return other

    def run_node(self, n: Node) -> Any:
        """Compute the value of a node, or its replacement."""
        function = self._instead.get(n)
        if function is None:
            return super().run_node(n)
        args, _ = self.fetch_args_kwargs_from_env(n)
        return function(*args)
