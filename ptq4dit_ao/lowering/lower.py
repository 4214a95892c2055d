"""The backend registry and ``lower``."""

from __future__ import annotations

import copy
import difflib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ptq4dit_ao.errors import LoweringError
from ptq4dit_ao.graph.names import placeholders
from ptq4dit_ao.graph.shapes import example_shape, tensor_of
from ptq4dit_ao.lowering.match import QuantizedLinear, quantized_linears, unread_linears
from ptq4dit_ao.lowering.proof import KernelProof, check_proof, count_integer_gemms

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Backend:
    """How one backend runs a converted graph.

    ``refuse`` says why it cannot carry a linear (None if it can); ``build`` gets a private copy of the graph and the
    linears it can carry, and returns something callable with the graph's inputs.
    """

    name: str
    summary: str
    integer: bool
    """Does it run integer kernels, or simulate them in float?"""
    refuse: Callable[[QuantizedLinear], str | None]
    build: Callable[[GraphModule, Sequence[QuantizedLinear]], Callable[..., Tensor]]


BACKENDS: dict[str, Backend] = {}


def register(backend: Backend) -> None:
    """Add a backend under its name."""
    BACKENDS[backend.name] = backend


def available_backends() -> dict[str, str]:
    """Backend name -> what it is."""
    return {name: backend.summary for name, backend in BACKENDS.items()}


class LoweredModel(nn.Module):
    """A quantized model ready to run; called with the exported graph's inputs."""

    def __init__(self, run: Callable[..., Tensor], proof: KernelProof) -> None:
        super().__init__()
        self.run = run
        self.proof = proof

    @torch.no_grad()
    def forward(self, *inputs: Tensor) -> Tensor:
        return self.run(*inputs)


def lower(
    converted: GraphModule,
    backend: str = "reference",
    *,
    example_inputs: Sequence[Tensor] | None = None,
    allow_float_fallback: bool = False,
) -> LoweredModel:
    """Lower what ``convert_pt2e`` returned, and prove which kernels run.

    Args:
        converted: left as it is.
        backend: one of :func:`available_backends`.
        example_inputs: for compiling and for the proof; made up from the graph's input shapes if not given.
        allow_float_fallback: accept linears that the backend runs in float.

    Raises:
        LoweringError: the backend is unknown, or fewer linears than promised run on integer kernels.
    """
    chosen = BACKENDS.get(backend)
    if chosen is None:
        near = difflib.get_close_matches(backend, BACKENDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise LoweringError(f"backend {backend!r} is unknown; there are {', '.join(map(repr, BACKENDS))}{hint}")
    graph = copy.deepcopy(converted)
    linears = quantized_linears(graph)
    unread = unread_linears(graph)
    reasons = {linear.name: chosen.refuse(linear) for linear in linears}
    refused = [(name, why) for name, why in reasons.items() if why is not None]
    if chosen.integer:
        refused += [(node.name, "its weight is not constant integers in the graph") for node in unread]
    promised = len(linears) + len(unread)
    if refused and not allow_float_fallback:
        name, why = refused[0]
        raise LoweringError(
            f"backend {backend!r} cannot carry {len(refused)} of {promised} quantized linears ({name}: {why}); "
            "pass allow_float_fallback=True to run those in float, or use another backend"
        )
    inputs = _example_inputs(converted) if example_inputs is None else tuple(example_inputs)
    run = chosen.build(graph, [linear for linear in linears if reasons[linear.name] is None])
    proof = KernelProof(
        backend=backend,
        promised=promised if chosen.integer else 0,
        kernels=count_integer_gemms(run, inputs) if chosen.integer else {},
        float_layers=tuple(refused),
    )
    check_proof(proof, allow_float_fallback=allow_float_fallback)
    logger.info("%s", proof)
    return LoweredModel(run, proof)


def _example_inputs(graph_module: GraphModule) -> tuple[Tensor, ...]:
    inputs = []
    for node in placeholders(graph_module):
        value = tensor_of(node)
        if value is None:
            raise LoweringError(f"the graph does not say what input {node.name!r} looks like; pass example_inputs=...")
        inputs.append(torch.zeros(example_shape(node), dtype=value.dtype))
    return tuple(inputs)
