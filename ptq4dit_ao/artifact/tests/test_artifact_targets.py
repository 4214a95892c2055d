from __future__ import annotations

import math
import operator
import os

import pytest
import torch

from ptq4dit_ao.artifact.targets import PYTHON_FUNCTIONS, target_from_str, target_to_str
from ptq4dit_ao.errors import ArtifactError

aten, decomposed = torch.ops.aten, torch.ops.quantized_decomposed


@pytest.mark.parametrize(
    "target",
    [
        aten.linear.default,
        aten.sym_size.int,
        aten.arange.start,
        aten.full.default,
        aten.add_.Tensor,
        aten.__and__.Tensor,
        aten._to_copy.default,
        aten.einsum.default,
        aten.index.Tensor,
        aten.bernoulli.p,
        aten._assert_scalar.default,
        decomposed.quantize_per_tensor.default,
        decomposed.dequantize_per_channel.default,
        decomposed.dequantize_per_channel_group.default,
        decomposed.convert_element_type.no_fuse,
        operator.getitem,
        operator.floordiv,
        math.trunc,
        torch.sym_max,
    ],
)
def test_what_exported_graphs_call_comes_back(target: object) -> None:
    assert target_from_str(target_to_str(target)) is target


@pytest.mark.parametrize(
    "target",
    [
        os.system,
        eval,
        operator.attrgetter,
        torch.load,
        aten.linear,
        aten.from_file.default,
        aten.set_.source_Storage,
        aten.record_stream.default,
        aten._cslt_compress.default,
        torch.ops.prim.device.default,
        torch.ops.higher_order.cond,
        print,
        [],
    ],
)
def test_anything_else_is_not_stored(target: object) -> None:
    with pytest.raises(ArtifactError, match=r"may not call .*, only tensor operators .* rewrite the model"):
        target_to_str(target)


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "builtins.eval",
        "operator.attrgetter",
        "operator.methodcaller",
        "torch.load",
        "torch.ops.aten.linear.default",
        "aten.linear",
        "aten::linear",
        "aten.linear.default.__call__",
        "aten.from_file.default",
        "aten.from_file.out",
        "aten.save.default",
        "aten.save",
        "aten.set_.source_Storage",
        "aten.set_data.default",
        "aten.resize_.default",
        "aten.manual_seed.default",
        "aten._print.default",
        "aten._cudnn_init_dropout_state.default",
        "prim.device.default",
        "torchvision.nms.default",
        "higher_order.cond.default",
        "",
    ],
)
def test_anything_else_is_not_loaded(name: str) -> None:
    with pytest.raises(ArtifactError, match=rf"a stored graph may not call '{name}', only tensor operators of aten"):
        target_from_str(name)


@pytest.mark.parametrize("name", ["aten.no_such.default", "aten.linear.no_such", "aten.__class__.mro"])
def test_a_missing_operator_is_said_to_be_missing(name: str) -> None:
    with pytest.raises(
        ArtifactError, match=rf"torch {torch.__version__.split('+')[0]}.* has no operator '{name}'; read"
    ):
        target_from_str(name)


def test_every_allowed_function_has_one_name() -> None:
    assert [target_to_str(function) for function in PYTHON_FUNCTIONS.values()] == list(PYTHON_FUNCTIONS)


def test_no_allowed_operator_takes_a_file_name() -> None:
    """Whatever torch adds: of all registered operators, none with a path, storage or stream gets through."""
    allowed = []
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, rest = name.partition("::")
        if namespace == "aten":
            packet, _, overload = rest.partition(".")
            try:
                allowed.append(target_from_str(f"aten.{packet}.{overload or 'default'}"))
            except ArtifactError:
                continue
    assert len(allowed) > 1000
    arguments = {(a.name, str(a.type)) for target in allowed for a in target._schema.arguments}  # type: ignore[attr-defined]
    assert not [a for a in arguments if "file" in a[0] or any(word in a[1] for word in ("Storage", "Stream", "torch"))]
