"""Call targets that a stored graph may have.

A graph file may come from an unknown source, so its names are resolved only through this allow list: ATen and
``quantized_decomposed`` operators that compute on tensors, and the Python functions that exported graphs apply to
sizes. Operators that touch files, other storages, streams or global state are not on it.
"""

from __future__ import annotations

import importlib
import math
import operator
import re
from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket

from ptq4dit_ao.errors import ArtifactError

# Importing the module registers the namespace. Without it, torch.ops.quantized_decomposed is empty.
importlib.import_module("torch.ao.quantization.fx._decomposed")

NAMESPACES = ("aten", "quantized_decomposed")
"""Namespaces of the allowed operators."""

_OPERATORS = (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "pos", "abs"),
    *("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "xor", "not_", "lshift", "rshift", "getitem"),
)
_MATH = ("ceil", "floor", "trunc", "sqrt")
_SYM = ("sym_float", "sym_int", "sym_ite", "sym_max", "sym_min", "sym_not", "sym_sqrt", "sym_sum")

PYTHON_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"operator.{name}": getattr(operator, name) for name in _OPERATORS},
    **{f"math.{name}": getattr(math, name) for name in _MATH},
    **{f"torch.{name}": getattr(torch, name) for name in _SYM if hasattr(torch, name)},
}
_PYTHON_NAMES = {function: name for name, function in PYTHON_FUNCTIONS.items()}

# These operators have no tensor argument: they create tensors, or check sizes. from_file would create one, too.
_WITHOUT_TENSOR = (
    *("arange", "empty", "empty_permuted", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm"),
    *("scalar_tensor", "tril_indices", "triu_indices", "zeros"),
    *("_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size"),
)
# These operators replace the memory under a tensor.
_REFUSED = ("from_file", "resize", "resize_", "resize_as", "resize_as_", "set", "set_", "set_data", "record_stream")
# A leading underscore marks operators that trust their caller. Exports and decompositions emit the ones listed here.
_PRIVATE = (
    *("__and__", "__or__", "__xor__", "__lshift__", "__rshift__", "_assert_async", "_assert_scalar"),
    *("_adaptive_avg_pool2d", "_convolution", "_fused_rms_norm", "_int_mm", "_is_all_true", "_is_any_true"),
    *("_local_scalar_dense", "_log_softmax", "_prelu_kernel", "_reshape_copy", "_safe_softmax", "_scaled_mm"),
    *("_native_batch_norm_legit", "_native_batch_norm_legit_functional", "_native_batch_norm_legit_no_training"),
    *("_scaled_dot_product_attention_math", "_scaled_dot_product_efficient_attention"),
    *("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu"),
    *("_scaled_dot_product_cudnn_attention", "_softmax", "_to_copy", "_unsafe_view", "_weight_norm"),
    *("_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d"),
    *("_weight_norm_interface", "_choose_qparams_per_token_asymmetric_impl"),
)
_VALUE_TYPES = {"Tensor", "int", "float", "bool", "number", "complex", "Device", "str", "Generator", "SymInt"}
_OPERATOR_NAME = re.compile(r"([a-z]\w*)\.([A-Za-z_]\w*)\.([A-Za-z_]\w*)", re.ASCII)


def target_to_str(target: object) -> str:
    """The stored name of a call target: ``aten.linear.default``, ``operator.mul``.

    Raises:
        ArtifactError: a stored graph may not call it.
    """
    if isinstance(target, OpOverload):
        _check_operator(target)
        return str(target)
    try:
        return _PYTHON_NAMES[target]  # type: ignore[index]
    except (KeyError, TypeError):
        raise _refusal(getattr(target, "__name__", None) or repr(target)) from None


def target_from_str(name: str) -> Callable[..., Any]:
    """The call target of a stored name, the inverse of ``target_to_str``.

    Raises:
        ArtifactError: a stored graph may not call it, or this torch does not have it.
    """
    if name in PYTHON_FUNCTIONS:
        return PYTHON_FUNCTIONS[name]
    match = _OPERATOR_NAME.fullmatch(name)
    if match is None or match[1] not in NAMESPACES:
        raise _refusal(name)
    target = _find_operator(*match.groups())
    if target is None:
        raise ArtifactError(
            f"torch {torch.__version__} has no operator {name!r}; read the model with the torch that its manifest names"
        )
    _check_operator(target)
    return target


def _find_operator(namespace: str, name: str, overload: str) -> OpOverload | None:
    packet = getattr(getattr(torch.ops, namespace), name, None)
    target = getattr(packet, overload, None) if isinstance(packet, OpOverloadPacket) else None
    return target if isinstance(target, OpOverload) else None


def _check_operator(target: OpOverload) -> None:
    name = target._schema.name.split("::")[-1]
    types = [_base_type(argument.type) for argument in target._schema.arguments]
    allowed = (
        target.namespace in NAMESPACES
        and name not in _REFUSED
        and (name in _PRIVATE or not name.startswith("_"))
        and ("Tensor" in types or name in _WITHOUT_TENSOR)
        and _VALUE_TYPES.issuperset(types)
    )
    if not allowed:
        raise _refusal(str(target))


def _base_type(schema_type: object) -> str:
    """The innermost type of a schema type: ``int`` for ``Optional[List[int]]``."""
    return re.sub(r"^(?:(?:Optional|List)\[)*(.*?)\]*$", r"\1", str(schema_type))


def _refusal(name: str) -> ArtifactError:
    return ArtifactError(
        f"a stored graph may not call {name!r}, only tensor operators of {' and '.join(NAMESPACES)} and arithmetic on "
        f"sizes; rewrite the model without this call (no_grad blocks and control flow included)"
    )
