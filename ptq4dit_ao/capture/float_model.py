"""Checks that a model is a float model with its weights in memory; others would fail late or be captured wrongly."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ptq4dit_ao.errors import ExportError

QUANTIZERS = (
    "auto_gptq", "awq", "bitsandbytes", "compressed_tensors", "gptqmodel", "hqq", "modelopt", "nunchaku",
    "optimum.quanto", "ptq4dit_ao.modules", "quanto", "torchao",
)  # fmt: skip
"""Packages whose layers and tensors are quantized."""

QUANTIZED_OPS = ("quantized_decomposed", "torchao", "pt2e_quant")
"""Namespaces of the operators that ``convert_pt2e`` and NNCF put into a graph."""

START = "start from the float model"


def check_float_module(model: object) -> None:
    """Raise ExportError if a model is quantized or cast, or if hooks move its weights or change its output."""
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        inside = " (its transformer is one)" if hasattr(model, "transformer") else ""
        raise ExportError(f"{kind} is not a torch module{inside}; pass the float transformer")
    if type(model).__module__ in ("peft.peft_model", "peft.mixed_model"):
        raise ExportError(f"{kind} renames all layers; pass its get_base_model(), which runs the adapters as well")
    for name, module in model.named_modules():
        why = _ours(module) or _hooked(name, module) or _foreign(name, module)
        if why is not None:
            raise ExportError(f"{kind} {why}")


def check_float_graph(graph: object) -> None:
    """Raise ExportError if a graph is quantized or prepared already, or if its weights are not in memory."""
    if not isinstance(graph, GraphModule):
        raise ExportError(f"{type(graph).__name__} is not a graph; capture the model with export_transformer")
    if (why := _quantized(graph)) is not None:
        raise ExportError(f"the graph {why}")
    check_in_memory(graph)


def check_in_memory(model: nn.Module) -> None:
    """Raise ExportError if a parameter is on the meta device."""
    name = next((name for name, tensor in model.named_parameters() if tensor.is_meta), None)
    if name is not None:
        raise ExportError(
            f"parameter {name!r} of {type(model).__name__} is on the meta device, without values; load the model's "
            "weights, and without offloading"
        )


def _ours(module: nn.Module) -> str | None:
    if type(module).__module__.startswith(("ptq4dit_ao.lowering.", "ptq4dit_ao.workflow.")):
        return f"is already quantized, and lowered, by ptq4dit_ao; {START}"
    return _quantized(module) if isinstance(module, GraphModule) else None


def _quantized(graph: GraphModule) -> str | None:
    for node in graph.graph.nodes:
        if node.op == "call_module" and hasattr(graph.get_submodule(str(node.target)), "calculate_qparams"):
            return f"has observers already ({node.target!r}): prepare_pt2e was called on it; {START}"
        if _namespace(node) in QUANTIZED_OPS:
            return f"is already quantized, by PT2E or NNCF (node {node.name!r}); {START}"
    return None


def _namespace(node: Node) -> str | None:
    return node.target.namespace if isinstance(node.target, torch._ops.OpOverload) else None


def _hooked(name: str, module: nn.Module) -> str | None:
    where = f"on {name!r}" if name else "on itself"
    offloading = getattr(module, "_hf_hook", None)
    if offloading is not None:
        return (
            f"has accelerate's hook {type(offloading).__name__} {where}, which moves inputs or weights; load it "
            "without offloading, or call remove_all_hooks() of its pipeline"
        )
    for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", ()):
        if hook == "layerwise_casting":
            return f"is already cast, by diffusers' layerwise casting ({name!r}); {START}"
        return (
            f"has diffusers' hook {hook!r} {where}, which a graph cannot keep; take it away (disable_cache() for "
            f"caches), or {START}"
        )
    return None


def _foreign(name: str, module: nn.Module) -> str | None:
    for path, part in ((name, module), *_own_tensors(name, module)):
        package = next((p for p in QUANTIZERS if f"{type(part).__module__}.".startswith(f"{p}.")), None)
        if package is not None:
            return f"is already quantized, by {package} ({path!r} is a {type(part).__name__}); {START}"
    for path, tensor in _own_tensors(name, module):
        if is_traceable_wrapper_subclass(tensor):
            return f"has {path!r} as a {type(tensor).__name__}, and only plain tensors can be captured; {START}"
        if isinstance(tensor, nn.Parameter) and tensor.dtype.itemsize == 1:
            return f"is already quantized or cast ({path!r} is {str(tensor.dtype).removeprefix('torch.')}); {START}"
    return None


def _own_tensors(name: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for own, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield f"{name}.{own}" if name else own, tensor


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's parameters; the CPU if it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
