"""``lower`` and ``export_to``: build a converted graph for a backend, and verify the result."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule

from ptq4dit_ao._files import replacing_files
from ptq4dit_ao._modes import own_modes
from ptq4dit_ao._paths import as_path, check_file, check_room
from ptq4dit_ao.capture.interface import (
    BATCH,
    bind_sizes,
    check_batch,
    free_sizes,
    input_specs,
    random_inputs,
    resized,
)
from ptq4dit_ao.errors import LoweringError, PTQ4DiTError, check_type
from ptq4dit_ao.graph.expansions import expansions
from ptq4dit_ao.graph.names import get_attribute, placeholders, set_tensor
from ptq4dit_ao.graph.shapes import tensor_of
from ptq4dit_ao.graph.ties import merge_equal_computations
from ptq4dit_ao.lowering.backend import BACKENDS, Backend, Request, Runnable, choose_backend
from ptq4dit_ao.lowering.lowered_model import LoweredModel
from ptq4dit_ao.lowering.match import (
    integer_linears,
    quantized_linears,
    quantized_products,
    unread_linears,
    weight_only_linears,
)
from ptq4dit_ao.lowering.parity import Parity, Rebuild, idle_linears
from ptq4dit_ao.lowering.proof import KernelProof, check_proof

logger = logging.getLogger(__name__)

OTHER_ROWS = 3
"""Rows of the second batch on which a built model is compared with its graph."""


@own_modes()
def lower(
    converted: GraphModule,
    backend: str = "reference",
    *,
    example_inputs: Sequence[Tensor] | None = None,
    float_dtype: torch.dtype | None = None,
    allow_float_fallback: bool = False,
    verify: bool = True,
    consume: bool = False,
) -> LoweredModel:
    """Lower a graph of ``convert_pt2e``, and prove that integer kernels run and compute what the graph says.

    Args:
        converted: the converted graph. It is not changed, unless ``consume`` is set.
        backend: a name of :func:`available_backends`, or ``auto`` for the best backend that this machine can run.
            ``auto`` logs a warning with the reason why a better one was passed over.
        example_inputs: inputs for compiling and for the proofs, best as the model receives them. The default is random
            inputs.
        float_dtype: dtype in which attention and the other float matrix products compute. bfloat16 is faster on
            processors that have it. None is the model's own dtype.
        allow_float_fallback: accept linears that the backend runs in float.
        verify: compare the built model with the graph on the example and on inputs of other sizes. It takes a few runs
            of the graph in float.
        consume: free each weight of ``converted`` when it has been packed. The graph cannot run afterwards.

    Raises:
        LoweringError: the backend is unknown, cannot run here or not in ``float_dtype``, or cannot build this graph;
            fewer linears than promised run on integer kernels; or the built model computes something else.
    """
    check_type("converted", converted, GraphModule, "a graph that convert_pt2e returned, or QuantizedModel.graph")
    chosen = choose_backend(backend, quantized_linears(converted))
    job = _Job(
        converted,
        chosen,
        example_inputs=example_inputs,
        float_dtype=float_dtype,
        allow_float_fallback=allow_float_fallback,
        verify=verify,
        consume=consume,
    )
    run, proof = job.proven(chosen.build)
    logger.info("%s; %s", proof, proof.parity)
    lowered = LoweredModel(run, proof)
    lowered.inputs, lowered.sizes = input_specs(converted) or (), free_sizes(converted)
    return lowered


@own_modes()
def export_to(
    converted: GraphModule,
    backend: str,
    path: str | Path,
    *,
    example_inputs: Sequence[Tensor] | None = None,
    float_dtype: torch.dtype | None = None,
    allow_float_fallback: bool = False,
    verify: bool = True,
) -> Path:
    """Write a file that another program runs: an OpenVINO IR, an AOTInductor package or an ONNX file.

    The file is run and verified before it appears under its name. An earlier file of that name is replaced then.

    Args:
        converted: the converted graph. It is not changed.
        backend: name of a backend that writes a file.
        path: the file. The backend's suffix is added if it has another one.
        example_inputs: as for :func:`lower`.
        float_dtype: as for :func:`lower`.
        allow_float_fallback: as for :func:`lower`.
        verify: as for :func:`lower`.

    Returns:
        The path of the file, with its suffix.

    Raises:
        ArgumentError: the file cannot be written.
        LoweringError: the backend writes no file, or as for :func:`lower`.
    """
    chosen = choose_backend(backend, quantized_linears(converted))
    write = chosen.write
    if write is None:
        able = ", ".join(repr(name) for name, other in BACKENDS.items() if other.write is not None)
        raise LoweringError(f"backend {chosen.name!r} runs in this process and writes no file; these do: {able}")
    path = as_path(path)
    if path.suffix != chosen.suffix:
        path = path.with_name(path.name + chosen.suffix)
    check_file(path)
    check_room(path, sum(linear.weight.numel() for linear in integer_linears(converted)) // 2)  # if all have 4 bits
    job = _Job(
        converted,
        chosen,
        example_inputs=example_inputs,
        float_dtype=float_dtype,
        allow_float_fallback=allow_float_fallback,
        verify=verify,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_files(path) as unfinished:
        job.proven(lambda request: write(request, unfinished))
    return path


class _Job:
    """One graph to be built for one backend: the request to the backend, and the proofs of the result.

    Raises LoweringError, as :func:`lower` says.
    """

    def __init__(
        self,
        converted: GraphModule,
        backend: Backend,
        *,
        example_inputs: Sequence[Tensor] | None,
        float_dtype: torch.dtype | None,
        allow_float_fallback: bool,
        verify: bool,
        consume: bool = False,
    ) -> None:
        self.backend, self.float_dtype, self.allow_float_fallback = backend, float_dtype, allow_float_fallback
        batches = example_batches(converted, example_inputs)
        graph = converted if consume else _copy(converted)
        self.request, self.refused, self.promised = _request(
            graph, backend, batches[0], float_dtype, allow_float_fallback
        )
        _check_quantized(backend, self.request, self.promised)
        self.converted = None if consume else converted
        """The original graph, unless it is consumed. It is used to find linears that the backend may have left out."""
        self.parity = None
        if verify and backend.integer:
            self.parity = Parity(converted, batches, _computes_in(converted, float_dtype), consumed=consume)

    def proven(self, make: Callable[[Request], Runnable]) -> tuple[Runnable, KernelProof]:
        """The model that ``make`` builds, with the proof of its kernels and, if ``verify`` is set, of its results."""
        run = _built(self.backend, lambda: make(self.request))
        proof = self._kernels(run)
        if self.parity is not None:
            rebuild = _rebuild(self.backend, self.float_dtype)
            proof = replace(proof, difference=self.parity.check(run, self.backend.name, rebuild))
        return run, proof

    def _kernels(self, run: Runnable) -> KernelProof:
        backend, inputs = self.backend, self.request.example_inputs
        proof = KernelProof(
            backend=backend.name,
            promised=self.promised if backend.integer else 0,
            kernels=backend.integer_gemms(run, inputs) if backend.integer else {},
            float_layers=tuple(self.refused),
            attention=self.request.attention,
            weight_only=len(self.request.weight_only),
            attention_kernels=backend.count_attention(run, inputs),
        )
        if backend.prunes and self.converted is not None and proof.integer_gemms < proof.promised:
            idle = idle_linears(self.converted, inputs)
            proof = replace(proof, idle=idle, promised=self.promised - len(idle))
        check_proof(proof, allow_float_fallback=self.allow_float_fallback)
        return proof


def _copy(graph: GraphModule) -> GraphModule:
    """A copy of the graph that shares its tensors."""
    copied = GraphModule(graph, copy.deepcopy(graph.graph))
    expansions(copied).update(expansions(graph))
    return copied


def example_batches(graph: GraphModule, example_inputs: Sequence[Tensor] | None) -> list[tuple[Tensor, ...]]:
    """Inputs to build and compare with and, if sizes are free, others of other sizes."""
    specs = input_specs(graph)
    if example_inputs is None:
        if specs is None:
            name = next(node.name for node in placeholders(graph) if tensor_of(node) is None)
            raise LoweringError(f"the graph does not say what input {name!r} looks like; pass example_inputs=...")
        device = next((tensor.device for tensor in graph.buffers()), torch.device("cpu"))
        example_inputs = random_inputs(specs, device)
    first = check_batch(graph, example_inputs, "example_inputs", LoweringError)
    if specs is None:
        return [first, _of_rows(first)] if first[0].ndim else [first]
    given = bind_sizes(specs, [x.shape for x in first])
    values = free_sizes(graph).other(given)[0]
    if given.get(BATCH, OTHER_ROWS) != OTHER_ROWS and BATCH in values:
        values[BATCH] = OTHER_ROWS
    if values == given:
        return [first]
    return [first, tuple(resized(x, spec, values) for x, spec in zip(first, specs, strict=True))]


def _of_rows(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A batch of another size, by the rule of as_program for graphs that do not say which inputs carry it."""
    rows = batch[0].shape[:1]
    index = torch.arange(OTHER_ROWS) % rows[0]
    return tuple(x[index.to(x.device)] if x.shape[:1] == rows else x for x in batch)


def _computes_in(graph: GraphModule, float_dtype: torch.dtype | None) -> torch.dtype:
    """The coarsest dtype that the float part computes in."""
    own = (linear.dtype for linear in integer_linears(graph))
    return max((torch.float32, *own, *([float_dtype] if float_dtype else [])), key=lambda dtype: torch.finfo(dtype).eps)


def _built(backend: Backend, make: Callable[[], Runnable]) -> Runnable:
    """The model that a backend builds. Whatever its converter raises becomes a LoweringError."""
    try:
        return make()
    except (PTQ4DiTError, OSError):
        raise
    except Exception as error:  # compilers and converters raise many types; all mean "cannot be built"
        raise LoweringError(
            f"backend {backend.name!r} cannot build this model: {_explain(error)}; use another backend, and please "
            "report this model"
        ) from error


def _rebuild(backend: Backend, float_dtype: torch.dtype | None) -> Rebuild | None:
    """A function that builds a part of the graph; None for a backend that compiles."""
    if backend.compiles:
        return None

    def build(part: GraphModule, batch: tuple[Tensor, ...]) -> Runnable:
        request, _, _ = _request(_copy(part), backend, batch, float_dtype, allow_float_fallback=True)
        return backend.build(request)

    return build


def _request(
    graph: GraphModule,
    backend: Backend,
    example_inputs: tuple[Tensor, ...],
    float_dtype: torch.dtype | None,
    allow_float_fallback: bool,
) -> tuple[Request, list[tuple[str, str]], int]:
    """The request to the backend, the layers that it cannot carry with reasons, and the number of quantized layers."""
    _check_float_dtype(backend, float_dtype)
    merge_equal_computations(graph)
    make_contiguous(graph)
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
    carried = [linear for linear in linears if reasons[linear.name] is None]
    request = Request(
        graph=graph,
        linears=carried,
        example_inputs=example_inputs,
        float_dtype=float_dtype,
        attention=len(quantized_products(graph)),
        weight_only=weight_only_linears(graph),
    )
    return request, refused, promised


def _check_quantized(backend: Backend, request: Request, promised: int) -> None:
    if backend.integer and not (promised or request.attention or request.weight_only):
        raise LoweringError(
            f"the graph has no quantized layer that backend {backend.name!r} could run on integers; quantize it first "
            "(apply_recipe), or use 'reference'"
        )


def _explain(error: Exception) -> str:
    """The original cause of an exception in one line, with the operator that its text names."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    lines = str(error).strip().splitlines()
    said = next((line for line in lines if not line.startswith("Exception from ")), "")  # places in OpenVINO's sources
    found = re.search(r"aten[.:]+\w+(\.\w+)?|(?<=operation of type: )\w+", str(error))
    return f"{type(error).__name__}: {said}" + (f" ({found[0]})" if found is not None and found[0] not in said else "")


def make_contiguous(graph: GraphModule) -> None:
    """Make every tensor of a graph contiguous, in place: kernels and compilers assume it.

    Converted checkpoints hold transposed weights, and parameters may be views of others.
    """
    for path in {str(node.target) for node in graph.graph.find_nodes(op="get_attr")}:
        tensor = get_attribute(graph, path)
        if isinstance(tensor, Tensor) and not tensor.is_contiguous():
            set_tensor(graph, path, tensor.detach().contiguous())


def _check_float_dtype(backend: Backend, dtype: torch.dtype | None) -> None:
    offered = () if backend.carries is None else backend.carries.float_dtypes
    if dtype is not None and dtype not in offered:
        raise LoweringError(
            f"backend {backend.name!r} cannot compute its float part in {dtype} "
            f"(only {', '.join(map(str, offered)) or 'as the model does'}); leave float_dtype out"
        )
