"""What stands between a graph and who calls it in place of the module that it was captured from."""

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
    """One input of a graph."""

    name: str
    shape: tuple[int, ...]
    """At the example inputs."""
    dtype: torch.dtype
    batched: bool
    """Is its first axis the batch, which may differ from call to call?"""

    @classmethod
    def of(cls, node: Node) -> InputSpec:
        """Of an exported graph's placeholder."""
        shape, dtype = example_shape(node), node.meta["val"].dtype
        return cls(name=node.name, shape=shape, dtype=dtype, batched=0 in symbolic_axes(node))

    def to_dict(self) -> dict[str, object]:
        return {"name": self.name, "shape": list(self.shape), "dtype": _name(self.dtype), "batched": self.batched}

    @classmethod
    def from_dict(cls, data: object) -> InputSpec:
        """Raises ArtifactError for anything but what :meth:`to_dict` gives."""
        match data:
            case {"name": str(name), "shape": [*shape], "dtype": str(kind), "batched": bool(batched), **rest}:
                dtype = getattr(torch, kind, None)
                if not rest and isinstance(dtype, torch.dtype) and all(type(n) is int and n >= 0 for n in shape):
                    return cls(name=name, shape=tuple(shape), dtype=dtype, batched=batched)
        raise ArtifactError(f"input signature {data!r} is not one this version reads; quantize again")


def input_specs(graph_module: GraphModule) -> tuple[InputSpec, ...] | None:
    """The inputs of an exported graph; None of one that does not say what they look like, such as a loaded one."""
    nodes = placeholders(graph_module)
    return None if any(tensor_of(node) is None for node in nodes) else tuple(map(InputSpec.of, nodes))


def random_inputs(
    specs: Sequence[InputSpec], device: torch.device | None = None, *, rows: int | None = None
) -> tuple[Tensor, ...]:
    """Inputs of the example's shapes: normal values, and ones for labels, masks and integer times; equal in each call.

    Args:
        specs: what they look like.
        device: where they go; the CPU if not given.
        rows: of the inputs with a free batch; the example's if not given.
    """
    generator = torch.Generator().manual_seed(0)

    def random(spec: InputSpec) -> Tensor:
        shape = (rows, *spec.shape[1:]) if rows is not None and spec.batched else spec.shape
        x = torch.randn(shape, generator=generator) if spec.dtype.is_floating_point else torch.ones(shape)
        return x.to(device, spec.dtype)

    return tuple(map(random, specs))


@dataclass(frozen=True, kw_only=True)
class CapturedModule:
    """The diffusers model that a graph was captured from, and how it was called."""

    config: Mapping[str, Any]
    """As in its ``config.json``; ``_class_name`` names the class."""
    call: CallSignature

    def to_dict(self) -> dict[str, object]:
        """Raises ArtifactError if the call has no stored form."""
        try:
            return {"config": dict(self.config), "call": self.call.to_json()}
        except ValueError as error:
            raise ArtifactError(f"the transformer's call cannot be saved: {error}") from error

    @classmethod
    def from_dict(cls, data: object) -> CapturedModule:
        """Raises ArtifactError for anything but what :meth:`to_dict` gives."""
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
    """A batch as a tuple, if it has a tensor of the right shape for each input of an exported graph.

    Raises:
        error: it has not. ``what`` is what the message calls it.
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
    """What to raise when a graph fails on a batch that has the right shapes."""
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    lines = str(error).strip().splitlines()
    return CalibrationError(
        f"the model cannot run on {what}: {type(error).__name__}: {lines[0] if lines else ''}; check the types and "
        "values of its inputs"
    )


def fit_inputs(specs: Sequence[InputSpec], tensors: Sequence[Tensor], *, binned: bool = False) -> list[Tensor]:
    """Tensors as the graph takes them: in its dtypes, and a row for each sample where there is one for all of them.

    Args:
        specs: what the graph takes.
        tensors: what it is given.
        binned: may the pipeline have taken another height and width than it was asked for (resolution binning)?

    Raises:
        ArgumentError: a tensor has another shape, holds what the graph's dtype cannot, or is bool where that is not.
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
    """What helps where a shape is wrong. How many pixels make a latent is the pipeline's knowledge."""
    if x.shape[1:] == spec.shape[1:] and x.ndim == len(spec.shape):
        if spec.batched:
            return "give all inputs the same number of rows"
        return "call it with that, or, if that is the batch, export with dynamic_batch=True"
    sizes = "give the pipeline the height and width (in pixels), frames and text length of the samples"
    if binned:
        sizes += ", and use_resolution_binning=False, without which it takes other sizes than it is given"
    return f"{sizes}; or quantize with samples of this size"


def _cast(spec: InputSpec, x: Tensor) -> Tensor:
    """Between floating dtypes, as pipelines in 16 bits need it; between others only if no value changes.

    Never from or to bool: a bool mask says what is seen, a floating one is added to scores.
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
