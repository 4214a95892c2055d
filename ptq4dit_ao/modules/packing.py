"""Parts of a ``StaticInt8Weight`` in a file: the integers packed, and scales and ranges beside them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptq4dit_ao.core.int4 import pack_int4, packed_length, unpack_int4
from ptq4dit_ao.errors import ArtifactError
from ptq4dit_ao.modules.weight import StaticInt8Weight

_ENTRY = re.compile(r"w([2-8])a([2-8]|16)( dynamic)?(?: (\d+)d)?( balanced)?( bias)?")

PACKED_BITS = 4
"""Most bits at which two integers share a byte."""


@dataclass(frozen=True)
class Stored:
    """A quantized linear, but for its tensors."""

    bits: int
    x_bits: int
    dynamic: bool
    """Whether each token of its input has a range of its own."""
    x_ndim: int | None
    balanced: bool
    """Whether its input is multiplied by a vector."""
    bias: bool

    @classmethod
    def of(cls, name: str, entry: Any) -> Stored:
        """Read an entry that :meth:`to_text` has written.

        Raises:
            ArtifactError: it has another form.
        """
        if isinstance(entry, cls):
            return entry
        found = _ENTRY.fullmatch(entry) if isinstance(entry, str) else None
        if found is None:
            raise ArtifactError(
                f"quantization_config has {entry!r} for {name!r}, which describes no quantized linear; save it again"
            )
        bits, x_bits, dynamic, ndim, balanced, bias = found.groups()
        return cls(int(bits), int(x_bits), bool(dynamic), int(ndim) if ndim else None, bool(balanced), bool(bias))

    def to_text(self) -> str:
        """The entry as text, such as ``w4a8 3d balanced bias``."""
        ndim = "" if self.x_ndim is None else f" {self.x_ndim}d"
        widths = f"w{self.bits}a{self.x_bits}{' dynamic' * self.dynamic}"
        return f"{widths}{ndim}{' balanced' * self.balanced}{' bias' * self.bias}"

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of its tensors."""
        return ("integers", "scale", "input") + (("pre_scale",) if self.balanced else ())


def pack(weight: StaticInt8Weight) -> dict[str, Tensor]:
    """The tensors of a weight by part."""
    parts = {
        "integers": pack_int4(weight.qdata) if weight.bits <= PACKED_BITS else weight.qdata,
        "scale": weight.scale,
        "input": torch.stack([weight.x_scale, weight.x_zero_point.to(torch.float32)]),
    }
    return parts if weight.pre_scale is None else {**parts, "pre_scale": weight.pre_scale}


def unpack(name: str, stored: Stored, parts: Mapping[str, Tensor], shape: Sequence[int]) -> StaticInt8Weight:
    """The weight (C_out, C_in) of which :func:`pack` has made parts.

    Raises:
        ArtifactError: they do not fit each other.
    """
    integers, scale, about = parts["integers"], parts["scale"], parts["input"]
    pre_scale = parts.get("pre_scale")
    packed = stored.bits <= PACKED_BITS
    floats = all(part.dtype == torch.float32 for part in (scale, about, *([] if pre_scale is None else [pre_scale])))
    found = [tuple(part.shape) for part in (integers, scale, about)] + ([] if pre_scale is None else [pre_scale.shape])
    wanted = [(packed_length(shape),) if packed else tuple(shape), (shape[0],), (2,), (shape[1],)]
    if found != wanted[: len(found)] or integers.dtype != (torch.uint8 if packed else torch.int8) or not floats:
        raise ArtifactError(
            f"the stored parts of {name!r} have shapes {found} and dtype {integers.dtype}, which do not fit a weight "
            f"{tuple(shape)} of {stored.bits} bits; copy or save the module again"
        )
    if packed:
        integers = unpack_int4(integers, shape)
    return StaticInt8Weight.of(
        integers,
        scale,
        float(about[0]),
        int(about[1]),
        bits=stored.bits,
        x_bits=stored.x_bits,
        dynamic=stored.dynamic,
        x_ndim=stored.x_ndim,
        dtype=torch.float32,
        pre_scale=pre_scale,
    )
