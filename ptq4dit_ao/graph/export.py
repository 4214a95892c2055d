"""Capture a transformer as the graph that everything here reads."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ptq4dit_ao.errors import ExportError

MAX_BATCH = 4096
"""Upper bound of the exported batch; export checks it at every call, so it is generous."""


def export_transformer(
    model: nn.Module, example_inputs: Sequence[Tensor], *, dynamic_batch: bool = True
) -> GraphModule:
    """``torch.export`` a denoiser to a graph of aten ops that is called with the same positional tensors.

    A model that takes ``return_dict`` (diffusers) is captured with ``return_dict=False`` and returns its first
    output. The model is not changed; the graph shares its parameters.

    Args:
        model: an eval-mode module.
        example_inputs: tensors in the order of ``forward``; their first axis is the batch, of at least 2.
        dynamic_batch: let the batch differ from call to call.

    Raises:
        ExportError: the inputs do not share a batch axis, or the model cannot be captured.
    """
    inputs = tuple(example_inputs)
    shapes = None
    if dynamic_batch:
        sizes = {tuple(x.shape[:1]) for x in inputs}
        if len(sizes) != 1 or sizes == {()} or inputs[0].shape[0] < 2:
            raise ExportError(
                f"example inputs have batch sizes {sorted(tuple(x.shape) for x in inputs)}; a dynamic batch needs "
                "the same first axis, of at least 2, in every input (or pass dynamic_batch=False)"
            )
        batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
        shapes = tuple({0: batch} for _ in inputs)
    if model.training:
        raise ExportError(f"{type(model).__name__} is in training mode; call .eval() before exporting it")
    try:
        with torch.no_grad():
            program = torch.export.export(_tensor_view(model, len(inputs)), inputs, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch.export raises many types; all mean "cannot be captured"
        reason = next(iter(str(error).splitlines()), "")  # a bare assert says nothing
        raise ExportError(
            f"{type(model).__name__} cannot be exported: {type(error).__name__}: {reason}; "
            "dynamic_batch=False may help if the model computes with its batch size"
        ) from error
    return program.module(check_guards=False)


def _tensor_view(model: nn.Module, num_inputs: int) -> nn.Module:
    """A shallow copy whose ``forward`` takes positional tensors and returns one; parameter names stay."""
    names = list(inspect.signature(model.forward).parameters)
    view = copy.copy(model)

    def forward(*tensors: Tensor) -> Tensor:
        arguments = dict(zip(names, tensors, strict=False))
        if "return_dict" in names:
            return model.forward(**arguments, return_dict=False)[0]
        return model.forward(**arguments)

    forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # gives the graph's inputs their names
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names[:num_inputs]]
    )
    view.forward = forward  # type: ignore[method-assign]
    return view
