"""Capture a transformer as the graph that this package works on."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from ptq4dit_ao._modes import own_modes
from ptq4dit_ao.capture.axes import axis_kinds
from ptq4dit_ao.capture.call import Call, named_call
from ptq4dit_ao.capture.float_model import check_float_module
from ptq4dit_ao.capture.in_place import write_out_in_place
from ptq4dit_ao.capture.interface import CapturedModule, free_sizes
from ptq4dit_ao.capture.regions import write_out_regions
from ptq4dit_ao.capture.signature import CallSignature, TensorName
from ptq4dit_ao.capture.tracing import Tracing, difference
from ptq4dit_ao.choices import AXIS_KINDS, AxisKind
from ptq4dit_ao.errors import ArgumentError, ExportError, first_line
from ptq4dit_ao.graph.constants import fold_constant_weights

_SIGNATURE, _MODULE = "ptq4dit_signature", "ptq4dit_module"


@own_modes()
def export_transformer(
    model: nn.Module,
    example_inputs: Sequence[Tensor] | Mapping[str, Any],
    *,
    dynamic: Collection[AxisKind] | None = None,
    check: bool = True,
) -> GraphModule:
    """Export a denoiser with ``torch.export`` to a graph of aten ops that takes the same tensors by position.

    A model that takes ``return_dict`` (diffusers) is captured with ``return_dict=False``. The graph returns the
    model's output, or a tuple if it has several tensors. The model is not changed, and the graph shares its
    parameters. During the export, functions of diffusers that cannot be captured are replaced by equivalent ones.

    Sizes of the inputs may differ from call to call if the model allows it. :func:`~ptq4dit_ao.free_sizes` says which
    do, what their bounds are, and why the others are fixed.

    Args:
        model: an eval-mode module.
        example_inputs: tensors in the order of ``forward``, or its keyword arguments. All tensors among the arguments,
            also those in lists, become the graph's inputs in the order of ``forward``. After them come inputs for
            numbers that are sizes (``num_frames``, ``height``, ``width``, ``img_shapes``): each is a bool tensor of
            that length, of which only the length is read. Other values are fixed.
        dynamic: meanings of the axes that may differ from call to call: ``batch``, ``height``, ``width``, ``frames``,
            ``text`` and ``tokens`` (any other length). None frees each axis with such a meaning that the model leaves
            free. The batch is the first axis of the first tensor, and of every tensor whose first axis has that size.
        check: whether to run the model and the graph on the example, and on other sizes, and compare. Without the
            check, layers that build tables in their first call must have been called before.

    Raises:
        ArgumentError: ``dynamic`` has another name.
        ExportError: the inputs do not share a batch axis, the model is no float model or cannot be captured, an axis
            that ``dynamic`` names cannot be free, or the graph's output differs from the model's.
    """
    model = uncompiled(model)
    check_float_module(model)
    _check_evaluates(model)
    kinds = _axis_kinds(dynamic)
    call, tensors = named_call(model, example_inputs)
    inputs = tuple(tensors.values())
    if not inputs:
        raise ExportError("the example inputs hold no tensor; give at least one, whose first axis is the batch")
    # The call precedes the export: a table that the first call builds would otherwise stay a fake tensor.
    rows = _batch_rows(call, tensors, "batch" in kinds)
    verify = check and not _on_meta(model)
    expected = _run(model, call, inputs) if verify else None
    meanings = axis_kinds(
        tensors, rows, _channels(model), channels_last=_has_channels_last(model), numbers=call.numbers
    )
    free = {name: {i: kind for i, kind in axes.items() if kind in kinds} for name, axes in meanings.items()}
    try:
        graph_module = Tracing(model, call, tensors, free).export(verify=verify)
    except Exception as error:  # torch.export raises many types
        raise ExportError(_explain(model, error)) from error
    _check_free(graph_module, dynamic or ())
    write_out_regions(graph_module)
    write_out_in_place(graph_module)
    fold_constant_weights(graph_module)
    if expected is not None:
        _compare(model, expected, graph_module(*inputs))
    graph_module.meta[_SIGNATURE] = call.signature
    if (config := _config(model)) is not None:
        by_name = CallSignature({name: TensorName(name) for name in tensors})
        graph_module.meta[_MODULE] = CapturedModule(config=config, call=call.signature or by_name)
    return graph_module


def uncompiled(model: nn.Module) -> nn.Module:
    """The module inside a ``torch.compile`` wrapper, whose parameter names have no prefix; else the module itself."""
    return getattr(model, "_orig_mod", model)


def captured_module(graph_module: GraphModule) -> CapturedModule | None:
    """The diffusers model that :func:`export_transformer` captured; None if it was something else."""
    return graph_module.meta.get(_MODULE)


def _config(model: nn.Module) -> dict[str, Any] | None:
    """The configuration of a diffusers model as in its ``config.json``; None for other models."""
    diffusers = sys.modules.get("diffusers")  # a diffusers model has imported it already
    if diffusers is None or not isinstance(model, diffusers.ModelMixin):
        return None
    public = {name: value for name, value in model.config.items() if not name.startswith("_")}
    return {"_class_name": type(model).__name__, **public}


def call_like(graph_module: GraphModule, model: nn.Module, inputs: Sequence[Tensor]) -> Any:
    """Call the module that a graph was captured from, or a copy of it, with the graph's inputs.

    Raises:
        ExportError: the graph does not come from :func:`export_transformer`.
    """
    if _SIGNATURE not in graph_module.meta:
        raise ExportError("this graph has no signature of its module's call; capture it with export_transformer")
    return Call(uncompiled(model), graph_module.meta[_SIGNATURE])(inputs)


def _axis_kinds(dynamic: Collection[AxisKind] | None) -> set[AxisKind]:
    if dynamic is None:
        return set(AXIS_KINDS)
    names: list[Any] = [dynamic] if isinstance(dynamic, str) else list(dynamic)
    unknown = [name for name in names if name not in AXIS_KINDS]
    if unknown:
        raise ArgumentError(
            f"dynamic has {unknown[0]!r}; the axes that can be free are {', '.join(map(repr, AXIS_KINDS))}"
        )
    return set(names)


def _batch_rows(call: Call, tensors: Mapping[str, Tensor], wanted: bool) -> int | None:
    """Size of the batch; None if the samples come in a list, so that no axis is the batch.

    Raises:
        ExportError: the batch is wanted, and the example has only one row, or tensors by position with other batches.
    """
    first = next(iter(tensors))
    if not call.has_batch(first):
        return None
    rows = tensors[first].shape[0] if tensors[first].ndim else 0
    if wanted and call.signature is None and any(x.shape[:1] != (rows,) for x in tensors.values()):
        raise ExportError(
            f"example inputs have batch sizes {sorted(tuple(x.shape) for x in tensors.values())}; a dynamic batch "
            "needs the same first axis, of at least 2, in every input (or leave 'batch' out of dynamic)"
        )
    if wanted and rows < 2:
        raise ExportError(
            f"the first example input has shape {tuple(tensors[first].shape)}; a dynamic batch needs at least 2 rows "
            "(or leave 'batch' out of dynamic)"
        )
    return rows


def _check_free(graph_module: GraphModule, dynamic: Collection[AxisKind]) -> None:
    """Raise ExportError if an axis of a kind that was asked for is not free."""
    sizes = free_sizes(graph_module)
    for axis, reason in sizes.fixed.items():
        if axis.split(" of ")[0] in dynamic:
            raise ExportError(f"the {axis} cannot be free: {reason}; leave it out of dynamic")


def _channels(model: nn.Module) -> int | None:
    """Number of channels of a diffusers model's latents; None if it does not say."""
    channels = getattr(getattr(model, "config", None), "in_channels", None)
    return channels if isinstance(channels, int) else None


def _has_channels_last(model: nn.Module) -> bool:
    """Whether the channels of a diffusers model's latents are the last axis; Kandinsky's configuration tells."""
    return hasattr(getattr(model, "config", None), "in_visual_dim")


def _run(model: nn.Module, call: Call, inputs: Sequence[Tensor]) -> Any:
    try:
        return call(inputs)
    except Exception as error:  # a model may raise any type
        raise ExportError(
            f"{type(model).__name__} cannot run on the example inputs: {first_line(error)}; check their order, shapes "
            "and types"
        ) from error


def _check_evaluates(model: nn.Module) -> None:
    """Raise ExportError if the model, or a layer whose output depends on it, is in training mode."""
    if model.training:
        raise ExportError(f"{type(model).__name__} is in training mode; call .eval() before exporting it")
    for name, module in model.named_modules():
        drops = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        if module.training and (drops or isinstance(module, nn.modules.batchnorm._NormBase)):
            raise ExportError(
                f"{name!r} of {type(model).__name__} ({type(module).__name__}) is in training mode; call .eval() "
                "on the whole model before exporting it"
            )


def _on_meta(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def _explain(model: nn.Module, error: Exception) -> str:
    text = f"{type(error).__name__} {error}"
    advice = "leave 'batch' out of dynamic if the model computes with its batch size"
    if "data-dependent" in text or "DataDependent" in text:
        advice = (
            "it computes with values of its inputs: pad them to one length and leave out masks that mask nothing; "
        ) + advice
    return f"{type(model).__name__} cannot be exported: {first_line(error)}; {advice}"


def _compare(model: nn.Module, expected: Any, got: Any) -> None:
    """Raise ExportError if the graph's outputs differ from the model's."""
    for i, one in enumerate(tree_leaves(expected)):
        if one.is_floating_point() and not one.isfinite().all():
            raise ExportError(
                f"output {i} of {type(model).__name__} has NaN or infinite values on the example inputs; look at its "
                "parameters and the example, or pass check=False"
            )
    if (problem := difference(expected, got)) is not None:
        trains = next((name for name, module in model.named_modules() if module.training), None)
        random = "its output is random" if trains is None else f"it is random, as {trains!r} is in training mode"
        raise ExportError(
            f"the graph of {type(model).__name__} does not compute what the model does: {problem}; a size or a value "
            f"of the example inputs is not the one the model was configured for, or {random}"
        )
