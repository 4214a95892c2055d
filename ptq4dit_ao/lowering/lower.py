"""``lower``: from a converted graph to something that runs, proven."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ptq4dit_ao._paths import as_path, check_file, check_room
from ptq4dit_ao.errors import LoweringError, check_type
from ptq4dit_ao.graph.interface import CapturedModule, InputSpec, check_batch
from ptq4dit_ao.graph.names import placeholders
from ptq4dit_ao.graph.shapes import example_shape, tensor_of
from ptq4dit_ao.graph.ties import merge_equal_computations
from ptq4dit_ao.lowering.backend import BACKENDS, Backend, Request, Runnable, choose_backend
from ptq4dit_ao.lowering.match import quantized_linears, quantized_products, unread_linears
from ptq4dit_ao.lowering.proof import KernelProof, check_proof

logger = logging.getLogger(__name__)


class LoweredModel(nn.Module):
    """A quantized model ready to run; called with the exported graph's inputs."""

    inputs: tuple[InputSpec, ...] = ()
    captured: CapturedModule | None = None
    """These two are known of a :class:`~ptq4dit_ao.QuantizedModel`."""

    def __init__(self, run: Runnable, proof: KernelProof) -> None:
        super().__init__()
        self.run = run
        self.proof = proof

    @torch.no_grad()
    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.run(*inputs)


def lower(
    converted: GraphModule,
    backend: str = "reference",
    *,
    example_inputs: Sequence[Tensor] | None = None,
    float_dtype: torch.dtype | None = None,
    allow_float_fallback: bool = False,
    consume: bool = False,
) -> LoweredModel:
    """Lower what ``convert_pt2e`` returned, and prove which kernels run.

    Args:
        converted: left as it is, unless it is to be consumed.
        backend: a name of :func:`available_backends`; or ``auto`` for the best that this machine can run, with a
            warning that says why not a better one.
        example_inputs: for compiling and for the proof; made up from the graph's input shapes if not given.
        float_dtype: what attention and the other matrix products that are not integer compute in; bfloat16 is quicker
            where the processor has it. None for the model's own dtype.
        allow_float_fallback: accept linears that the backend runs in float.
        consume: use ``converted`` up, so that each weight is freed when it has been packed; it cannot run afterwards.

    Raises:
        LoweringError: the backend is unknown, cannot run here or not in ``float_dtype``; or fewer linears than promised
            run on integer kernels.
    """
    check_type("converted", converted, GraphModule, "a graph that convert_pt2e returned, or QuantizedModel.graph")
    graph = converted if consume else _copy(converted)
    chosen = choose_backend(backend, quantized_linears(graph))
    request, refused, promised = _request(graph, chosen, example_inputs, float_dtype, allow_float_fallback)
    if chosen.integer and not promised and not request.attention:
        raise LoweringError(
            f"the graph has no quantized layer that backend {chosen.name!r} could run on integers; quantize it first "
            "(apply_recipe), or use 'reference'"
        )
    run = chosen.build(request)
    proof = KernelProof(
        backend=chosen.name,
        promised=promised if chosen.integer else 0,
        kernels=chosen.count(run, request.example_inputs) if chosen.integer else {},
        float_layers=tuple(refused),
        attention=request.attention,
        attention_kernels=chosen.count_attention(run, request.example_inputs),
    )
    check_proof(proof, allow_float_fallback=allow_float_fallback)
    logger.info("%s", proof)
    return LoweredModel(run, proof)


def export_to(
    converted: GraphModule,
    backend: str,
    path: str | Path,
    *,
    example_inputs: Sequence[Tensor] | None = None,
    float_dtype: torch.dtype | None = None,
    allow_float_fallback: bool = False,
) -> Path:
    """Write what another program runs: an OpenVINO IR, an AOTInductor package, an ONNX file.

    The file appears under its name when it is complete; what was there before is replaced.

    Args:
        converted: left as it is.
        backend: one that writes a file.
        path: the file; the backend's suffix is added if it has another one.
        example_inputs: as for :func:`lower`.
        float_dtype: as for :func:`lower`.
        allow_float_fallback: as for :func:`lower`.

    Returns:
        The file.

    Raises:
        ArgumentError: the file cannot be written.
        LoweringError: the backend writes no file, or as for :func:`lower`.
    """
    chosen = choose_backend(backend, quantized_linears(converted))
    if chosen.write is None:
        able = ", ".join(repr(name) for name, other in BACKENDS.items() if other.write is not None)
        raise LoweringError(f"backend {chosen.name!r} runs in this process and writes no file; these do: {able}")
    path = as_path(path)
    if path.suffix != chosen.suffix:
        path = path.with_name(path.name + chosen.suffix)
    check_file(path)
    check_room(path, sum(linear.weight.numel() for linear in quantized_linears(converted)) // 2)  # if all are of 4 bits
    request, _, _ = _request(_copy(converted), chosen, example_inputs, float_dtype, allow_float_fallback)
    path.parent.mkdir(parents=True, exist_ok=True)
    chosen.write(request, path)
    return path


def _copy(graph: GraphModule) -> GraphModule:
    """Another graph with the same tensors."""
    return GraphModule(graph, copy.deepcopy(graph.graph))


def _request(
    graph: GraphModule,
    backend: Backend,
    example_inputs: Sequence[Tensor] | None,
    float_dtype: torch.dtype | None,
    allow_float_fallback: bool,
) -> tuple[Request, list[tuple[str, str]], int]:
    """What the backend is to build; the layers it cannot carry, with reasons; how many layers are quantized."""
    _check_float_dtype(backend, float_dtype)
    merge_equal_computations(graph)
    linears = quantized_linears(graph)
    unread = unread_linears(graph)
    reasons = {linear.name: backend.why_not(linear) for linear in linears}
    refused = [(name, why) for name, why in reasons.items() if why is not None]
    if backend.integer:
        refused += [(node.name, "its weight is not constant integers in the graph") for node in unread]
    promised = len(linears) + len(unread)
    if refused and not allow_float_fallback:
        name, why = refused[0]
        raise LoweringError(
            f"backend {backend.name!r} cannot carry {len(refused)} of {promised} quantized linears ({name}: {why}); "
            "pass allow_float_fallback=True to run those in float, or use another backend"
        )
    if example_inputs is None:
        inputs = _example_inputs(graph)
    else:
        inputs = check_batch(graph, example_inputs, "example_inputs", LoweringError)
    carried = [linear for linear in linears if reasons[linear.name] is None]
    request = Request(
        graph=graph,
        linears=carried,
        example_inputs=inputs,
        float_dtype=float_dtype,
        attention=len(quantized_products(graph)),
    )
    return request, refused, promised


def _check_float_dtype(backend: Backend, dtype: torch.dtype | None) -> None:
    offered = () if backend.carries is None else backend.carries.float_dtypes
    if dtype is not None and dtype not in offered:
        raise LoweringError(
            f"backend {backend.name!r} cannot compute its float part in {dtype} "
            f"(only {', '.join(map(str, offered)) or 'as the model does'}); leave float_dtype out"
        )


def _example_inputs(graph_module: GraphModule) -> tuple[Tensor, ...]:
    inputs = []
    for node in placeholders(graph_module):
        value = tensor_of(node)
        if value is None:
            raise LoweringError(f"the graph does not say what input {node.name!r} looks like; pass example_inputs=...")
        inputs.append(torch.zeros(example_shape(node), dtype=value.dtype, device=value.device))
    return tuple(inputs)
