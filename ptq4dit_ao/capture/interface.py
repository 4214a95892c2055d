"""Interface of a captured graph: shapes and dtypes of its inputs, and checks and casts of the tensors of a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ptq4dit_ao.capture.signature import CallSignature
from ptq4dit_ao.errors import ArgumentError, ArtifactError, CalibrationError, PTQ4DiTError
from ptq4dit_ao.graph.names import placeholders
from ptq4dit_ao.graph.shapes import example_shape, symbolic_axes, tensor_of


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """Name, shape and dtype of one input of a graph."""

    name: str
    shape: tuple[int, ...]
    """Shape of the example input."""
    dtype: torch.dtype
    batched: bool
    """Whether the first axis is the batch, which may differ from call to call."""

    @classmethod
    def of(cls, node: Node) -> InputSpec:
        """The spec of a placeholder of an exported graph."""
        shape, dtype = example_shape(node), node.meta["val"].dtype
        return cls(name=node.name, shape=shape, dtype=dtype, batched=0 in symbolic_axes(node))

    def to_dict(self) -> dict[str, object]:
        """The spec as JSON values."""
        return {"name": self.name, "shape": list(self.shape), "dtype": _name(self.dtype), "batched": self.batched}

    @classmethod
    def from_dict(cls, data: object) -> InputSpec:
        """Read what :meth:`to_dict` has written.

        Raises:
            ArtifactError: ``data`` has another form.
        """
        match data:
            case {"name": str(name), "shape": [*shape], "dtype": str(kind), "batched": bool(batched), **rest}:
                dtype = getattr(torch, kind, None)
                if not rest and isinstance(dtype, torch.dtype) and all(type(n) is int and n >= 0 for n in shape):
                    return cls(name=name, shape=tuple(shape), dtype=dtype, batched=batched)
        raise ArtifactError(f"input signature {data!r} is not one this version reads; quantize again")


def input_specs(graph_module: GraphModule) -> tuple[InputSpec, ...] | None:
    """The inputs of an exported graph; None if it does not have their shapes, such as a graph that was loaded."""
    nodes = placeholders(graph_module)
    return None if any(tensor_of(node) is None for node in nodes) else tuple(map(InputSpec.of, nodes))


def random_inputs(
    specs: Sequence[InputSpec], device: torch.device | None = None, *, rows: int | None = None
) -> tuple[Tensor, ...]:
    """Random inputs of the example's shapes, equal in each call: normal floats, and ones for every other dtype.

    Args:
        specs: names, shapes and dtypes of the inputs.
        device: device of the inputs; the CPU by default.
        rows: size of the batch of inputs that carry it; the example's by default.
    """
    generator = torch.Generator().manual_seed(0)

    def random(spec: InputSpec) -> Tensor:
        shape = (rows, *spec.shape[1:]) if rows is not None and spec.batched else spec.shape
        x = torch.randn(shape, generator=generator) if spec.dtype.is_floating_point else torch.ones(shape)
        return x.to(device, spec.dtype)

    return tuple(map(random, specs))


@dataclass(frozen=True, kw_only=True)
class CapturedModule:
    """The diffusers model that a graph was captured from, and the signature of its call."""

    config: Mapping[str, Any]
    """The model's configuration as in its ``config.json``; ``_class_name`` is the name of its class."""
    call: CallSignature

    def to_dict(self) -> dict[str, object]:
        """The model's configuration and call as JSON values.

        Raises:
            ArtifactError: the call cannot be stored as JSON.
        """
        try:
            return {"config": dict(self.config), "call": self.call.to_json()}
        except ValueError as error:
            raise ArtifactError(f"the transformer's call cannot be saved: {error}") from error

    @classmethod
    def from_dict(cls, data: object) -> CapturedModule:
        """Read what :meth:`to_dict` has written.

        Raises:
            ArtifactError: ``data`` has another form.
        """
        match data:
            case {"config": {"_class_name": str()} as config, "call": call, **rest} if not rest:
                try:
                    return cls(config=config, call=CallSignature.from_json(call))
                except (ValueError, RecursionError) as error:
                    raise ArtifactError(f"the transformer's call is damaged ({error}); quantize again") from error
        raise ArtifactError(f"the transformer is {data!r}, not a configuration and a call; quantize again")


def check_batch(
    graph_module: GraphModule, batch: object, what: str, error: type[PTQ4DiTError] = CalibrationError
) -> tuple[Tensor, ...]:
    """A batch as a tuple, after a check that it has a tensor of the right shape for each input of an exported graph.

    Args:
        graph_module: the exported graph.
        batch: the batch to check.
        what: name of the batch in error messages.
        error: type of the exception that is raised.

    Raises:
        error: the batch does not fit the graph.
    """
    nodes = placeholders(graph_module)
    names = ", ".join(node.name for node in nodes)
    if not isinstance(batch, Sequence) or not all(isinstance(x, Tensor) for x in batch):
        raise error(f"{what} is a {type(batch).__name__}; give a tuple of tensors, one for each input ({names})")
    if len(batch) != len(nodes):
        raise error(f"{what} has {len(batch)} tensors, and the graph takes {len(nodes)} ({names}); give one for each")
    for node, x in zip(nodes, batch, strict=True):
        _check_shape(node, x, what, error)
    return tuple(batch)


def _check_shape(node: Node, x: Tensor, what: str, error: type[PTQ4DiTError]) -> None:
    if x.numel() == 0:
        raise error(f"{node.name} of {what} has shape {tuple(x.shape)}, which is empty; leave that batch out")
    if tensor_of(node) is None:  # a graph that was saved and loaded
        return
    shape, free = example_shape(node), symbolic_axes(node)
    if x.ndim != len(shape) or any(x.shape[i] != size for i, size in enumerate(shape) if i not in free):
        wanted = tuple("N" if i in free else size for i, size in enumerate(shape))
        raise error(
            f"{node.name} of {what} has shape {tuple(x.shape)}, and the graph was captured for "
            f"({', '.join(map(str, wanted))}); give batches of that shape, or export again"
        )


def cannot_run(what: str, error: Exception) -> CalibrationError:
    """The exception for a graph that fails on a batch of the right shapes; an out-of-memory error is raised itself."""
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    lines = str(error).strip().splitlines()
    return CalibrationError(
        f"the model cannot run on {what}: {type(error).__name__}: {lines[0] if lines else ''}; check the types and "
        "values of its inputs"
    )


def fit_inputs(specs: Sequence[InputSpec], tensors: Sequence[Tensor], *, binned: bool = False) -> list[Tensor]:
    """Tensors cast to the graph's dtypes, with single rows expanded to the batch.

    Args:
        specs: the graph's inputs.
        tensors: the tensors of a call.
        binned: whether the pipeline may have replaced the requested height and width (resolution binning); error
            messages mention it.

    Raises:
        ArgumentError: a tensor has another shape, has values that the graph's dtype cannot represent, or only one of
            the two dtypes is bool.
    """
    pairs = list(zip(specs, tensors, strict=True))
    batch = next((len(x) for spec, x in pairs if spec.batched and x.ndim and len(x) != 1), 1)
    return [_cast(spec, _fit(spec, x, batch, binned)) for spec, x in pairs]


def _fit(spec: InputSpec, x: Tensor, batch: int, binned: bool) -> Tensor:
    wanted = (batch, *spec.shape[1:]) if spec.batched else spec.shape
    if spec.batched and (x.shape == (1, *wanted[1:]) or (x.ndim == 0 and len(wanted) == 1)):
        return x.expand(wanted)
    if x.shape != wanted:
        raise ArgumentError(
            f"{spec.name} has shape {tuple(x.shape)}, the graph was captured for {wanted}; "
            + _way_out(spec, x, binned=binned)
        )
    return x


def _way_out(spec: InputSpec, x: Tensor, *, binned: bool) -> str:
    """The advice for a wrong shape; it cannot give sizes in pixels, because only the pipeline knows them."""
    if x.shape[1:] == spec.shape[1:] and x.ndim == len(spec.shape):
        if spec.batched:
            return "give all inputs the same number of rows"
        return "call it with that, or, if that is the batch, export with dynamic_batch=True"
    sizes = "give the pipeline the height and width (in pixels), frames and text length of the samples"
    if binned:
        sizes += ", and use_resolution_binning=False, without which it takes other sizes than it is given"
    return f"{sizes}; or quantize with samples of this size"


def _cast(spec: InputSpec, x: Tensor) -> Tensor:
    """Cast a tensor to the graph's dtype: floating dtypes freely, as 16-bit pipelines need it, others without loss.

    A cast from or to bool is an error, because a bool mask selects keys while a floating mask is added to scores.
    """
    if (x.dtype is torch.bool) != (spec.dtype is torch.bool):
        raise ArgumentError(
            f"{spec.name} is {_name(x.dtype)}, but the graph was captured for {_name(spec.dtype)}, and bool means "
            f"something else than numbers in a mask; give it as {_name(spec.dtype)}, or quantize with samples of this "
            "call"
        )
    cast = x.to(spec.dtype)
    if cast.is_floating_point() and x.is_floating_point():
        return cast
    lost = x[cast.to(x.dtype) != x]
    if lost.numel():
        raise ArgumentError(
            f"{spec.name} is {_name(x.dtype)} and holds {lost[0].item()}, which the graph cannot take: it was captured "
            f"for {_name(spec.dtype)}; quantize with samples of the scheduler that it is to run with"
        )
    return cast


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
