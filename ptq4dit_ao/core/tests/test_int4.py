from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ptq4dit_ao.core.int4 import pack_int4, unpack_int4
from ptq4dit_ao.errors import ArtifactError

INT4 = hnp.arrays(
    np.int8, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=7), elements=st.integers(-8, 7)
)


def reference(values: np.ndarray) -> list[int]:
    """Byte i holds value 2i in its low, and value 2i + 1 in its high half, as two's complements."""
    nibbles = [int(v) % 16 for v in values.ravel()]
    nibbles += [0] * (len(nibbles) % 2)
    return [low + 16 * high for low, high in zip(nibbles[::2], nibbles[1::2], strict=True)]


@given(INT4)
def test_pack_agrees_with_the_reference(values: np.ndarray) -> None:
    packed = pack_int4(torch.from_numpy(values))
    assert packed.dtype == torch.uint8
    assert packed.tolist() == reference(values)


@given(INT4)
def test_unpack_is_the_inverse(values: np.ndarray) -> None:
    tensor = torch.from_numpy(values)
    back = unpack_int4(pack_int4(tensor), tensor.shape)
    assert back.dtype == torch.int8
    assert back.shape == tensor.shape
    assert torch.equal(back, tensor)


def test_layout_is_low_nibble_first() -> None:
    assert pack_int4(torch.tensor([1, -1, -8], dtype=torch.int8)).tolist() == [0xF1, 0x08]


def test_a_transposed_tensor_is_packed_in_its_logical_order_and_left_alone() -> None:
    tensor = torch.arange(-6, 6).to(torch.int8).clamp(-8, 7).reshape(3, 4).T
    before = tensor.clone()
    assert torch.equal(unpack_int4(pack_int4(tensor), (4, 3)), before)
    assert torch.equal(tensor, before)


@pytest.mark.parametrize("value", [-9, 8, 127, -128])
def test_a_value_of_more_bits_is_refused(value: int) -> None:
    with pytest.raises(ArtifactError, match=r"values span .*int4 holds \[-8, 7\]; clamp them, or let the dequantize"):
        pack_int4(torch.tensor([0, value], dtype=torch.int8))


def test_another_dtype_is_refused() -> None:
    with pytest.raises(ArtifactError, match=r"cannot pack a torch.int32 tensor as int4; convert it to torch.int8"):
        pack_int4(torch.zeros(2, dtype=torch.int32))


@pytest.mark.parametrize(
    "packed", [torch.zeros(3, dtype=torch.uint8), torch.zeros(2, dtype=torch.int8), torch.zeros(1, 2).to(torch.uint8)]
)
def test_bytes_that_do_not_fit_the_shape_are_refused(packed: torch.Tensor) -> None:
    with pytest.raises(ArtifactError, match=r"shape \(3, 1\) takes a uint8 row of 2 bytes, not .*save the model again"):
        unpack_int4(packed, (3, 1))
