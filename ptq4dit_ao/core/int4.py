"""Packing of two 4-bit integers per byte, the first one in the low nibble."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ptq4dit_ao.errors import ArtifactError

INT4_MIN, INT4_MAX = -8, 7


def pack_int4(values: Tensor) -> Tensor:
    """Pack int8 values in [-8, 7] of any shape into (ceil(numel / 2),) uint8; an odd count gets a zero nibble.

    Raises:
        ArtifactError: the dtype is not int8, or a value needs more than 4 bits.
    """
    if values.dtype != torch.int8:
        raise ArtifactError(f"cannot pack a {values.dtype} tensor as int4; convert it to torch.int8 first")
    flat = values.reshape(-1)
    _check_range(flat)
    nibbles = flat.view(torch.uint8) & 0xF
    packed = nibbles[0::2].clone()
    packed[: flat.numel() // 2] |= nibbles[1::2] << 4
    return packed


def unpack_int4(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Unpack (ceil(numel / 2),) uint8 into int8 of ``shape``, the inverse of :func:`pack_int4`.

    Raises:
        ArtifactError: ``packed`` is not a 1-D uint8 tensor of the length that ``shape`` needs.
    """
    count = math.prod(shape)
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (packed_length(shape),):
        raise ArtifactError(
            f"an int4 tensor of shape {tuple(shape)} takes a uint8 row of {packed_length(shape)} bytes, not "
            f"{packed.dtype} {tuple(packed.shape)}; the weights do not belong to this shape, save the model again"
        )
    nibbles = torch.stack((packed & 0xF, packed >> 4), dim=-1).reshape(-1)[:count].view(torch.int8)
    # Two's complement sign extension keeps 0..7 and maps 8..15 to -8..-1.
    return ((nibbles ^ 8) - 8).reshape(tuple(shape))


def packed_length(shape: Sequence[int]) -> int:
    """Number of bytes of a packed int4 tensor of ``shape``."""
    return (math.prod(shape) + 1) // 2


def _check_range(flat: Tensor) -> None:
    if flat.numel() == 0:
        return
    low, high = (int(v) for v in flat.aminmax())
    if low < INT4_MIN or high > INT4_MAX:
        raise ArtifactError(
            f"values span [{low}, {high}], int4 holds [{INT4_MIN}, {INT4_MAX}]; clamp them, or let the dequantize "
            f"node declare the wider quant_min and quant_max so that the tensor is stored as int8"
        )
