from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.fx import GraphModule

from ptq4dit_ao.artifact import graph_tensors, pack_int4
from ptq4dit_ao.artifact.narrow import four_bit_tensors
from ptq4dit_ao.artifact.weights import StoredTensor, load_tensors, pack_tensors, save_tensors
from ptq4dit_ao.errors import ArtifactError

CPU = torch.device("cpu")
decomposed = torch.ops.quantized_decomposed


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def save(gm: GraphModule, path: Path) -> dict[str, StoredTensor]:
    table, payload = pack_tensors(gm)
    save_tensors(payload, path)
    return table


@pytest.mark.parametrize("variant", ["float", "int8", "int4"])
def test_tensors_come_back_exactly(dits: dict[str, GraphModule], variant: str, tmp_path: Path) -> None:
    tensors = graph_tensors(dits[variant])
    back = load_tensors(tmp_path / "w", save(dits[variant], tmp_path / "w"), CPU)
    assert back.keys() == tensors.keys()
    assert all(same(back[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("variant", ["int8", "int4"])
def test_the_file_has_no_float_copy_of_a_quantized_weight(
    dits: dict[str, GraphModule], variant: str, tmp_path: Path
) -> None:
    gm = dits[variant]
    save(gm, tmp_path / "w")
    quantized = {tuple(t.shape) for t in graph_tensors(gm).values() if t.dtype == torch.int8}
    with safe_open(tmp_path / "w", framework="pt") as file:
        stored = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    floats = {tuple(s.get_shape()) for s in stored.values() if s.get_dtype().startswith(("F", "BF"))}
    assert len(quantized) >= 5
    assert not quantized & floats


def test_int4_weights_take_half_a_byte_and_zero_points_nothing(dits: dict[str, GraphModule], tmp_path: Path) -> None:
    gm = dits["int4"]
    table, payload = pack_tensors(gm)
    weights = {name: t for name, t in graph_tensors(gm).items() if t.dtype == torch.int8}
    assert {table[name].storage for name in weights} == {"int4"}
    assert all(payload[name].nbytes * 2 == weight.numel() for name, weight in weights.items())
    zero_points = {name for name in table if name.startswith("_zero_point")}
    assert len(zero_points) == len(weights)
    assert {table[name].storage for name in zero_points} == {"zeros"}
    assert not zero_points & payload.keys()


def test_int8_weights_are_not_taken_for_int4(dits: dict[str, GraphModule]) -> None:
    assert not four_bit_tensors(dits["int8"])
    assert not four_bit_tensors(dits["float"])


def test_a_weight_that_something_else_reads_too_is_not_packed(small: GraphModule) -> None:
    _dequantize_offset(small, -8, 7)
    assert four_bit_tensors(small) == {"offset"}
    offset = small.graph.find_nodes(op="get_attr", target="offset")[0]
    last = small.graph.find_nodes(op="output")[0]
    with small.graph.inserting_before(last):
        small.graph.call_function(torch.ops.aten.neg.default, (offset,))
    assert not four_bit_tensors(small)


@pytest.mark.parametrize(("low", "high", "narrow"), [(-8, 7, True), (-7, 7, True), (-9, 7, False), (-8, 8, False)])
def test_the_declared_range_decides(small: GraphModule, low: int, high: int, narrow: bool) -> None:
    _dequantize_offset(small, low, high)
    assert four_bit_tensors(small) == ({"offset"} if narrow else set())


def test_a_zero_point_in_4_bits_is_not_a_weight(small: GraphModule) -> None:
    _dequantize_offset(small, -8, 7)
    (user,) = small.graph.find_nodes(op="call_function", target=decomposed.dequantize_per_tensor.tensor)
    offset = small.graph.find_nodes(op="get_attr", target="offset")[0]
    user.args = (user.args[0], user.args[1], offset, *user.args[3:])
    assert not four_bit_tensors(small)


def test_values_outside_the_declared_range_are_refused(small: GraphModule) -> None:
    _dequantize_offset(small, -8, 7)
    small.get_buffer("offset").fill_(9)
    with pytest.raises(ArtifactError, match=r"tensor 'offset': values span \[9, 9\], int4 holds \[-8, 7\]"):
        pack_tensors(small)


def test_negative_zero_and_shared_memory_survive(small: GraphModule, tmp_path: Path) -> None:
    memory = torch.arange(24.0)
    small.register_buffer("offset", torch.full((4,), -0.0))
    small.get_submodule("blocks.a-b").weight = torch.nn.Parameter(memory[:16].view(4, 4).T)
    small.get_submodule("tied").weight = torch.nn.Parameter(memory[8:24].view(4, 4))
    tensors = graph_tensors(small)
    back = load_tensors(tmp_path / "w", save(small, tmp_path / "w"), CPU)
    assert all(same(back[name], tensors[name]) for name in tensors)
    assert back["offset"].signbit().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.bool, torch.int16])
def test_parameters_keep_their_dtype(small: GraphModule, dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.tensor([1, 0, 1, 1]).to(dtype)
    small.register_buffer("offset", values)
    table = save(small, tmp_path / "w")
    back = load_tensors(tmp_path / "w", table, CPU)["offset"]
    assert back.dtype == dtype
    assert torch.equal(back.view(torch.uint8), values.view(torch.uint8))
    assert table["offset"].storage == "raw"


def test_a_dtype_that_safetensors_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"cannot .*complex128.*; cast"):
        save_tensors({"x": torch.ones(2, dtype=torch.complex128)}, tmp_path / "w")


def test_tensors_can_be_loaded_onto_a_device(small: GraphModule, tmp_path: Path) -> None:
    back = load_tensors(tmp_path / "w", save(small, tmp_path / "w"), torch.device("meta"))
    assert {t.device.type for t in back.values()} == {"meta"}


ENTRY = {"storage": "raw", "dtype": "float32", "shape": [2, 3]}


def test_an_entry_comes_back() -> None:
    assert StoredTensor.from_json("x", ENTRY).to_json() == ENTRY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"storage": "pickle"}, r"entry of tensor 'x' is .*'pickle'.* not readable; copy or save"),
        ({"storage": ["raw"]}, r"not readable"),
        ({"dtype": "Tensor"}, r"not readable"),
        ({"dtype": ["int8"]}, r"not readable"),
        ({"shape": [-1]}, r"not readable"),
        ({"shape": [True]}, r"not readable"),
        ({"shape": "23"}, r"not readable"),
        ({"storage": "zeros"}, r"stores float32 as 'zeros', which is for integers; save the model again"),
        ({"storage": "int4", "dtype": "uint8"}, r"stores uint8 as 'int4', which is for integers"),
        ({"scale": 1}, r"entry of tensor 'x' has the unknown 'scale'"),
    ],
)
def test_a_damaged_entry_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        StoredTensor.from_json("x", {**ENTRY, **change})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, r"w lacks x; it does not belong to this manifest, copy or save the model again"),
        ({"x": torch.ones(2, 3), "y": torch.ones(1)}, r"w has the unknown y; it does not belong to this manifest"),
        ({"x": torch.ones(3, 2)}, r"tensor 'x' in .*w is .*\(3, 2\).*, the manifest says .*\(2, 3\).*; they belong to"),
        ({"x": torch.ones(2, 3).double()}, r"tensor 'x' .*float64.* the manifest says .*float32"),
    ],
    ids=["missing", "extra", "shape", "dtype"],
)
def test_a_file_of_another_model_is_refused(tensors: dict[str, torch.Tensor], message: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "w")
    with pytest.raises(ArtifactError, match=message):
        load_tensors(tmp_path / "w", {"x": StoredTensor.from_json("x", ENTRY)}, CPU)


def test_packed_bytes_are_checked_too(tmp_path: Path) -> None:
    save_file({"x": pack_int4(torch.ones(4, dtype=torch.int8))}, tmp_path / "w")
    entry = StoredTensor(storage="int4", dtype=torch.int8, shape=(2, 3))
    with pytest.raises(ArtifactError, match=r"tensor 'x' .*uint8, \(2,\)\), the manifest says .*uint8, \(3,\)\)"):
        load_tensors(tmp_path / "w", {"x": entry}, CPU)


def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(b"x" * 100)
    with pytest.raises(ArtifactError, match=r"w is not readable \(.*\); copy or save the model again"):
        load_tensors(tmp_path / "w", {}, CPU)


def _dequantize_offset(gm: GraphModule, low: int, high: int) -> None:
    """Let one 4-bit dequantize node, of int8 values in its input, take over every use of the buffer ``offset``."""
    gm.register_buffer("offset", torch.tensor([-8, 7, 0, 1], dtype=torch.int8))
    gm.register_buffer("zero", torch.zeros(1, dtype=torch.int8))
    gm.register_buffer("step", torch.ones(1))
    offset = gm.graph.find_nodes(op="get_attr", target="offset")[0]
    with gm.graph.inserting_before(offset.next):
        zero, step = gm.graph.get_attr("zero"), gm.graph.get_attr("step")
        args = (offset, step, zero, low, high, torch.int8)
        node = gm.graph.call_function(decomposed.dequantize_per_tensor.tensor, args)
    offset.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
    gm.graph.lint()
    gm.recompile()
