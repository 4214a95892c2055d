"""Interface of a captured graph: shapes and dtypes of its inputs, and checks and casts of the tensors of a call."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ptq4dit_ao.capture.signature import CallSignature
from ptq4dit_ao.capture.sizes import Expression, FreeSize, FreeSizes, check_expression, evaluate, names_in
from ptq4dit_ao.errors import ArgumentError, ArtifactError, CalibrationError, PTQ4DiTError, check_type, first_line
from ptq4dit_ao.graph.names import placeholders
from ptq4dit_ao.graph.shapes import INPUT, example_shape, symbolic_axes, tensor_of

_SIZES = "ptq4dit_sizes"
"""Key in the first placeholder's meta: the graph's free sizes."""


BATCH = "batch"
"""Name of the free size of the batch."""
IMAGE_MASK = "img_mask"
"""Name of the input that says where images are in a sequence of text and images."""


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """Name, shape and dtype of one input of a graph."""

    name: str
    shape: tuple[int, ...]
    """Shape of the example input."""
    dtype: torch.dtype
    sizes: tuple[Expression, ...]
    """Size of each axis: a number, the name of a free size, or an expression of such names."""

    @property
    def batched(self) -> bool:
        """Whether the first axis is the batch, which may differ from call to call."""
        return self.sizes[:1] == (BATCH,)

    @classmethod
    def of(cls, node: Node) -> InputSpec:
        """The spec of a placeholder of an exported graph."""
        if (known := node.meta.get(INPUT)) is not None:
            return known  # type: ignore[no-any-return]
        shape, dtype, free = example_shape(node), node.meta["val"].dtype, symbolic_axes(node)
        names = {axis: BATCH if axis == 0 else str(node.meta["val"].shape[axis]) for axis in free}
        sizes = tuple(names.get(axis, size) for axis, size in enumerate(shape))
        return cls(name=node.name, shape=shape, dtype=dtype, sizes=sizes)

    def to_dict(self) -> dict[str, object]:
        """The spec as JSON values."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "dtype": _name(self.dtype),
            "sizes": list(self.sizes),
        }

    @classmethod
    def from_dict(cls, data: object) -> InputSpec:
        """Read what :meth:`to_dict` has written, now or before sizes other than the batch could be free.

        Raises:
            ArtifactError: ``data`` has another form.
        """
        match data:
            case {"name": str(name), "shape": [*shape], "dtype": str(kind), "batched": bool(batched), **rest}:
                sizes = [BATCH, *shape[1:]] if batched and shape else shape
            case {"name": str(name), "shape": [*shape], "dtype": str(kind), "sizes": [*sizes], **rest}:
                pass
            case _:
                raise _unread(data)
        dtype = getattr(torch, kind, None)
        if rest or not isinstance(dtype, torch.dtype) or not all(type(n) is int and n >= 0 for n in shape):
            raise _unread(data)
        if len(sizes) != len(shape) or not all(type(size) in (int, str) for size in sizes):
            raise _unread(data)
        return cls(name=name, shape=tuple(shape), dtype=dtype, sizes=tuple(sizes))


def _unread(data: object) -> ArtifactError:
    return ArtifactError(f"input signature {data!r} is not one this version reads; quantize again")


def set_interface(graph_module: GraphModule, specs: Sequence[InputSpec], sizes: FreeSizes | None = None) -> None:
    """Record the inputs of a graph, and its free sizes, at its placeholders, where copies and conversions keep them.

    Raises:
        ArtifactError: there are more or fewer inputs, or they have other sizes than those that are free.
    """
    nodes = placeholders(graph_module)
    if len(nodes) != len(specs):
        raise ArtifactError(f"the graph has {len(nodes)} inputs, and its signature {len(specs)}; quantize again")
    for node, spec in zip(nodes, specs, strict=True):
        node.meta[INPUT] = spec
    known = free_sizes(graph_module) if sizes is None else sizes
    for size in itertools.chain.from_iterable(spec.sizes for spec in specs):
        check_expression(size, known.names)
    if nodes and sizes is not None:
        nodes[0].meta[_SIZES] = sizes


def input_specs(graph_module: GraphModule) -> tuple[InputSpec, ...] | None:
    """The inputs of a graph; None if it does not have their shapes."""
    nodes = placeholders(graph_module)
    known = all(INPUT in node.meta or tensor_of(node) is not None for node in nodes)
    return tuple(map(InputSpec.of, nodes)) if known else None


def free_sizes(graph_module: GraphModule) -> FreeSizes:
    """The sizes of a captured graph that may differ from call to call, and the conditions on them.

    For a graph that :func:`~ptq4dit_ao.export_transformer` did not make, only their names and examples are known.
    """
    check_type("graph_module", graph_module, GraphModule, "a graph of export_transformer, or one that was made of it")
    nodes = placeholders(graph_module)
    known = nodes[0].meta.get(_SIZES) if nodes else None
    if known is not None:
        return known  # type: ignore[no-any-return]
    found: dict[str, FreeSize] = {}
    for spec in input_specs(graph_module) or ():
        for size, example in zip(spec.sizes, spec.shape, strict=True):
            if isinstance(size, str) and size.isidentifier():
                found.setdefault(size, FreeSize(name=size, example=example))
    return FreeSizes(sizes=tuple(found.values()))


def bind_sizes(specs: Sequence[InputSpec], shapes: Sequence[Sequence[int]]) -> dict[str, int]:
    """The values that the free sizes have for inputs of these shapes; the first axis that has a name counts."""
    values: dict[str, int] = {}
    for spec, shape in zip(specs, shapes, strict=True):
        for expression, size in zip(spec.sizes, shape, strict=False):
            if isinstance(expression, str) and expression.isidentifier():
                values.setdefault(expression, int(size))
    return values


def batches_by_size(graph_module: GraphModule, batches: Sequence[Sequence[Tensor]]) -> list[list[int]]:
    """Indices of the batches of each size, up to the number of rows, in the order in which the sizes come."""
    specs = input_specs(graph_module) or ()
    found: dict[object, list[int]] = {}
    for index, batch in enumerate(batches):
        values = bind_sizes(specs, [x.shape for x in batch]) if specs else {}
        found.setdefault(tuple(item for item in values.items() if item[0] != BATCH), []).append(index)
    return list(found.values())


def shape_at(spec: InputSpec, values: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of an input at these sizes; the example's where a size has no value."""
    return tuple(
        example if not names_in(size) <= values.keys() else int(evaluate(size, values))
        for size, example in zip(spec.sizes, spec.shape, strict=True)
    )


def random_inputs(
    specs: Sequence[InputSpec], device: torch.device | None = None, *, values: Mapping[str, int] | None = None
) -> tuple[Tensor, ...]:
    """Random inputs of the example's shapes, equal in each call: normal floats, and ones for every other dtype.

    Args:
        specs: names, shapes and dtypes of the inputs.
        device: device of the inputs; the CPU by default.
        values: free sizes; the example's by default.
    """
    generator = torch.Generator().manual_seed(0)

    def random(spec: InputSpec) -> Tensor:
        shape = spec.shape if values is None else shape_at(spec, values)
        x = torch.randn(shape, generator=generator) if spec.dtype.is_floating_point else torch.ones(shape)
        return x.to(device, spec.dtype)

    return tuple(map(random, specs))


def distinct(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The tensors, with a copy of each that is an earlier one, because export takes both for one input."""
    seen: set[int] = set()
    found = []
    for x in tensors:
        found.append(x.clone() if id(x) in seen else x)
        seen.add(id(x))
    return tuple(found)


def resized(x: Tensor, spec: InputSpec, values: Mapping[str, int]) -> Tensor:
    """An input cut to other sizes, or repeated where they are larger.

    A mask of where an image is in a sequence is cut at its start, because the image that is made comes last.
    """
    for axis, size in enumerate(shape_at(spec, values)):
        if size != x.shape[axis]:
            first = -size if spec.name == IMAGE_MASK else 0
            x = x.index_select(axis, torch.arange(first, first + size, device=x.device) % x.shape[axis])
    return x


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
    empty = next((i for i, x in enumerate(batch) if x.numel() == 0), None)
    if empty is not None:
        shape = tuple(batch[empty].shape)
        raise error(f"{nodes[empty].name} of {what} has shape {shape}, which is empty; leave that batch out")
    specs = input_specs(graph_module)
    if specs is not None:
        _check_shapes(specs, free_sizes(graph_module), batch, what, error)
    return tuple(batch)


def _check_shapes(
    specs: Sequence[InputSpec], sizes: FreeSizes, batch: Sequence[Tensor], what: str, error: type[PTQ4DiTError]
) -> None:
    values = bind_sizes(specs, [x.shape for x in batch])
    for spec, x in zip(specs, batch, strict=True):
        if x.ndim != len(spec.sizes) or tuple(x.shape) != shape_at(spec, values):
            wanted = ", ".join("N" if size == BATCH else str(size) for size in spec.sizes)
            where = f", with {_said(values)}" if len(values) > 1 else ""
            raise error(
                f"{spec.name} of {what} has shape {tuple(x.shape)}, and the graph was captured for ({wanted}){where}; "
                "give batches of that shape, or export again"
            )
    if (problem := sizes.problem(values)) is not None:
        raise error(f"the graph cannot take {what}: {problem}; give batches of other sizes, or export again")


def _said(values: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def cannot_run(what: str, error: Exception) -> CalibrationError:
    """The exception for a graph that fails on a batch of the right shapes; an out-of-memory error is raised itself."""
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    return CalibrationError(
        f"the model cannot run on {what}: {first_line(error)}; check the types and values of its inputs"
    )


def fit_inputs(
    specs: Sequence[InputSpec], tensors: Sequence[Tensor], sizes: FreeSizes | None = None, *, binned: bool = False
) -> list[Tensor]:
    """Tensors cast to the graph's dtypes, with single rows expanded to the batch.

    Args:
        specs: the graph's inputs.
        tensors: the tensors of a call.
        sizes: the graph's free sizes, whose conditions the tensors are checked for.
        binned: whether the pipeline may have replaced the requested height and width (resolution binning); error
            messages mention it.

    Raises:
        ArgumentError: a tensor has another shape, has values that the graph's dtype cannot represent, or only one of
            the two dtypes is bool.
    """
    pairs = list(zip(specs, tensors, strict=True))
    values = bind_sizes(specs, [x.shape for x in tensors])
    values[BATCH] = next((len(x) for spec, x in pairs if spec.batched and x.ndim and len(x) != 1), 1)
    fitted = [_fit(spec, x, values, binned) for spec, x in pairs]
    if sizes is not None and (problem := sizes.problem(values)) is not None:
        raise ArgumentError(f"the graph cannot be called so: {problem}; {_other_sizes(binned=binned)}")
    return [_cast(spec, x) for (spec, _), x in zip(pairs, fitted, strict=True)]


def _fit(spec: InputSpec, x: Tensor, values: Mapping[str, int], binned: bool) -> Tensor:
    wanted = shape_at(spec, values)
    if spec.batched and (x.shape == (1, *wanted[1:]) or (x.ndim == 0 and len(wanted) == 1)):
        return x.expand(wanted)
    if x.shape != wanted:
        shape = ", ".join(map(str, spec.sizes))
        free = f" = ({shape})" if any(isinstance(size, str) for size in spec.sizes[1:]) else ""
        raise ArgumentError(
            f"{spec.name} has shape {tuple(x.shape)}, the graph was captured for {wanted}{free}; "
            + _way_out(spec, x, wanted, binned=binned)
        )
    return x


def _way_out(spec: InputSpec, x: Tensor, wanted: tuple[int, ...], *, binned: bool) -> str:
    """The advice for a wrong shape. It cannot give sizes in pixels, because only the pipeline knows their factor."""
    if x.shape[1:] == wanted[1:] and x.ndim == len(spec.shape):
        if spec.batched:
            return "give all inputs the same number of rows"
        return "call it with that, or, if that is the batch, export with a batch of two rows or more"
    return _other_sizes(binned=binned)


def _other_sizes(*, binned: bool) -> str:
    sizes = (
        "give the pipeline a height and width (in pixels: those of the latents times its vae_scale_factor), frames and "
        "a text length that fit"
    )
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
