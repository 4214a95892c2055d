"""Parts of a ``StaticInt8Weight`` in a file: the integers packed, and scales and ranges beside them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptq4dit_ao.core.expansion import Expansion
from ptq4dit_ao.core.int4 import pack_int4, packed_length, unpack_int4
from ptq4dit_ao.errors import ArtifactError
from ptq4dit_ao.modules.weight import StaticInt8Weight

_ENTRY = re.compile(r"w([2-8])a([2-8]|16)( dynamic)?(?: \[([a-z0-9 ]+)\])?(?: (\d+)d)?( balanced)?( centred)?( bias)?")

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
    expansion: str | None
    """Rule by which the integers expand from 4 bits, as text."""
    balanced: bool
    """Whether its input is multiplied by a vector."""
    centred: bool
    """Whether a vector is subtracted from its input."""
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
        bits, x_bits, dynamic, expansion, ndim, balanced, centred, bias = found.groups()
        if expansion is not None:
            Expansion.from_text(expansion)
        return cls(
            bits=int(bits),
            x_bits=int(x_bits),
            dynamic=bool(dynamic),
            x_ndim=int(ndim) if ndim else None,
            expansion=expansion,
            balanced=bool(balanced),
            centred=bool(centred),
            bias=bool(bias),
        )

    def to_text(self) -> str:
        """The entry as text, such as ``w4a8 3d balanced bias`` or ``w8a8 [normal g16] 3d``."""
        ndim = "" if self.x_ndim is None else f" {self.x_ndim}d"
        expansion = "" if self.expansion is None else f" [{self.expansion}]"
        flags = " balanced" * self.balanced + " centred" * self.centred + " bias" * self.bias
        return f"w{self.bits}a{self.x_bits}{' dynamic' * self.dynamic}{expansion}{ndim}{flags}"

    @property
    def rule(self) -> Expansion | None:
        """Rule by which the integers expand from 4 bits."""
        return None if self.expansion is None else Expansion.from_text(self.expansion)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of its tensors."""
        vectors = {"pre_scale": self.balanced, "pre_offset": self.centred}
        return ("integers", "scale", "input", *(name for name, present in vectors.items() if present))


def pack(weight: StaticInt8Weight) -> dict[str, Tensor]:
    """The tensors of a weight by part."""
    parts = {
        "integers": _packed(weight),
        "scale": weight.scale,
        "input": torch.stack([weight.x_scale, weight.x_zero_point.to(torch.float32)]),
    }
    vectors = {"pre_scale": weight.pre_scale, "pre_offset": weight.pre_offset}
    return parts | {name: vector for name, vector in vectors.items() if vector is not None}


def _packed(weight: StaticInt8Weight) -> Tensor:
    if weight.expansion is not None:
        return Expansion.from_text(weight.expansion).pack(weight.qdata)
    return pack_int4(weight.qdata) if weight.bits <= PACKED_BITS else weight.qdata


def unpack(name: str, stored: Stored, parts: Mapping[str, Tensor], shape: Sequence[int]) -> StaticInt8Weight:
    """The weight (C_out, C_in) of which :func:`pack` has made parts.

    Raises:
        ArtifactError: they do not fit each other.
    """
    integers, scale, about = parts["integers"], parts["scale"], parts["input"]
    vectors = {name: parts[name] for name in ("pre_scale", "pre_offset") if name in parts}
    rows, columns = shape
    packed, rule = stored.bits <= PACKED_BITS or stored.expansion is not None, stored.rule
    length = packed_length(shape) if rule is None else rule.packed_length((rows, columns))
    floats = all(part.dtype == torch.float32 for part in (scale, about, *vectors.values()))
    found = [tuple(part.shape) for part in (integers, scale, about)] + [
        tuple(vector.shape) for vector in vectors.values()
    ]
    wanted = [(length,) if packed else tuple(shape), (shape[0],), (2,), *[(shape[1],)] * len(vectors)]
    if found != wanted or integers.dtype != (torch.uint8 if packed else torch.int8) or not floats:
        raise ArtifactError(
            f"the stored parts of {name!r} have shapes {found} and dtype {integers.dtype}, which do not fit a weight "
            f"{tuple(shape)} of {stored.bits} bits; copy or save the module again"
        )
    if rule is not None:
        integers = rule.unpack(integers, (rows, columns))
    elif packed:
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
        expansion=stored.expansion,
        **vectors,
    )
