"""Capture a transformer as the graph that this package works on."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from ptq4dit_ao._modes import own_modes
from ptq4dit_ao.capture.float_model import check_float_module
from ptq4dit_ao.capture.interface import CapturedModule
from ptq4dit_ao.capture.patches import exportable
from ptq4dit_ao.capture.regions import write_out_regions
from ptq4dit_ao.capture.signature import CallSignature, TensorName, flatten_call
from ptq4dit_ao.errors import ExportError
from ptq4dit_ao.graph.constants import fold_constant_weights

MAX_BATCH = 4096
"""Upper bound of the exported batch, which the graph checks at every call; it is generous for that reason."""

_SIGNATURE, _MODULE = "ptq4dit_signature", "ptq4dit_module"

AGREEMENT = 0.5
"""Exponent on the dtype's eps that gives the tolerated relative error of the graph's output against the model's."""


@own_modes()
def export_transformer(
    model: nn.Module,
    example_inputs: Sequence[Tensor] | Mapping[str, Any],
    *,
    dynamic_batch: bool = True,
    check: bool = True,
) -> GraphModule:
    """Export a denoiser with ``torch.export`` to a graph of aten ops that takes the same tensors by position.

    A model that takes ``return_dict`` (diffusers) is captured with ``return_dict=False``. The graph returns the
    model's output, or a tuple if it has several tensors. The model is not changed, and the graph shares its
    parameters. During the export, functions of diffusers that cannot be captured are replaced by equivalent ones.

    Args:
        model: an eval-mode module.
        example_inputs: tensors in the order of ``forward``, or its keyword arguments. All tensors among the arguments,
            also those in lists, become the graph's inputs in the order of ``forward``. Other values are fixed.
        dynamic_batch: whether the batch, the first axis of the first tensor, may differ from call to call. Among
            keyword arguments, every tensor whose first axis has that size is assumed to carry the batch.
        check: whether to run the model and the graph on the example and compare. Without the check, layers that build
            tables in their first call must have been called before.

    Raises:
        ExportError: the inputs do not share a batch axis, the model is no float model or cannot be captured, or the
            graph's output differs from the model's.
    """
    model = uncompiled(model)
    check_float_module(model)
    _check_evaluates(model)
    call, tensors = _how_to_call(model, example_inputs, dynamic_batch)
    inputs = tuple(tensors.values())
    if not inputs:
        raise ExportError("the example inputs hold no tensor; give at least one, whose first axis is the batch")
    # The call precedes the export: a table that the first call builds would otherwise stay a fake tensor.
    expected = None
    if check and not _on_meta(model):
        try:
            expected = call(inputs)
        except Exception as error:  # a model may raise any type
            raise ExportError(
                f"{type(model).__name__} cannot run on the example inputs: {_first_line(error)}; check their order, "
                "shapes and types"
            ) from error
    try:
        with exportable(model):
            program = torch.export.export(
                _view(model, call, list(tensors)), inputs, dynamic_shapes=_shapes(inputs, dynamic_batch), strict=False
            )
    except Exception as error:  # torch.export raises many types
        raise ExportError(_explain(model, error)) from error
    graph_module = program.module(check_guards=False)
    write_out_regions(graph_module)
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


@dataclass(frozen=True)
class Call:
    """A module as a function of tensors by position."""

    model: nn.Module
    signature: CallSignature | None
    """Keyword arguments of the call; None passes the tensors by position."""

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
        """Call the module; return its only output tensor, or a tuple of several."""
        forward = self.model.forward
        options = {"return_dict": False} if "return_dict" in inspect.signature(forward).parameters else {}
        if self.signature is None:
            output = forward(*tensors, **options)
        else:
            output = forward(**{**self.signature.bind(tensors), **options})
        found = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        return found[0] if len(found) == 1 else tuple(found)


def _how_to_call(
    model: nn.Module, example_inputs: Sequence[Tensor] | Mapping[str, Any], dynamic_batch: bool
) -> tuple[Call, dict[str, Tensor]]:
    if isinstance(example_inputs, Mapping):
        signature, tensors = flatten_call(model, example_inputs)
        return Call(model, signature), tensors
    if not isinstance(example_inputs, Sequence) or not all(isinstance(x, Tensor) for x in example_inputs):
        raise ExportError(
            f"the example inputs are a {type(example_inputs).__name__}; give a tuple of tensors in the order of "
            "forward, or its keyword arguments"
        )
    _check_batch(example_inputs, dynamic_batch)
    parameters = inspect.signature(model.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        names += [f"input_{i}" for i in range(len(names), len(example_inputs))]
    if len(example_inputs) > len(names):
        raise ExportError(
            f"{type(model).__name__} takes {len(names)} inputs ({', '.join(names)}), got {len(example_inputs)}"
        )
    return Call(model, None), dict(zip(names, example_inputs, strict=False))


def _check_batch(inputs: Sequence[Tensor], dynamic_batch: bool) -> None:
    sizes = {tuple(x.shape[:1]) for x in inputs}
    if dynamic_batch and (len(sizes) != 1 or sizes == {()} or inputs[0].shape[0] < 2):
        raise ExportError(
            f"example inputs have batch sizes {sorted(tuple(x.shape) for x in inputs)}; a dynamic batch needs "
            "the same first axis, of at least 2, in every input (or pass dynamic_batch=False)"
        )


def _shapes(inputs: Sequence[Tensor], dynamic_batch: bool) -> tuple[dict[int, object], ...] | None:
    if not dynamic_batch:
        return None
    size = inputs[0].shape[:1]
    if not size or size[0] < 2:
        raise ExportError(
            f"the first example input has shape {tuple(inputs[0].shape)}; a dynamic batch needs at least 2 rows "
            "(or pass dynamic_batch=False)"
        )
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    return tuple({0: batch} if x.shape[:1] == size else {} for x in inputs)


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


def _view(model: nn.Module, call: Call, names: list[str]) -> nn.Module:
    """A shallow copy whose ``forward`` takes tensors by position and returns tensors; parameter names stay the same."""
    view = copy.copy(model)

    def forward(*tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        return call(tensors)

    forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # gives the graph's inputs their names
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    )
    view.forward = forward  # type: ignore[method-assign]
    return view


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()  # empty for a bare assert
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _on_meta(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def _explain(model: nn.Module, error: Exception) -> str:
    text = f"{type(error).__name__} {error}"
    advice = "dynamic_batch=False may help if the model computes with its batch size"
    if "data-dependent" in text or "DataDependent" in text:
        advice = (
            "it computes with values of its inputs: pad them to one length and leave out masks that mask nothing; "
        ) + advice
    return f"{type(model).__name__} cannot be exported: {_first_line(error)}; {advice}"


def _compare(model: nn.Module, expected: Any, got: Any) -> None:
    """Raise ExportError if the graph's outputs differ from the model's."""
    trains = next((name for name, module in model.named_modules() if module.training), None)
    random = "its output is random" if trains is None else f"it is random, as {trains!r} is in training mode"
    for i, (one, other) in enumerate(zip(tree_leaves(expected), tree_leaves(got), strict=True)):
        if not one.is_floating_point():
            continue
        tolerance = torch.finfo(one.dtype).eps ** AGREEMENT
        if not one.isfinite().all():
            raise ExportError(
                f"output {i} of {type(model).__name__} has NaN or infinite values on the example inputs; look at its "
                "parameters and the example, or pass check=False"
            )
        one, other = one.double(), other.double()
        error = float((one - other).norm() / one.norm().clamp_min(1e-300))
        if not error <= tolerance:
            raise ExportError(
                f"the graph of {type(model).__name__} does not compute what the model does: output {i} differs by "
                f"{error:.2g} of its size; a size or a value of the example inputs is not the one the model was "
                f"configured for, or {random}"
            )
