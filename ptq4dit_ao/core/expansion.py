"""Weights of 4 bits that expand exactly to integers of 8 bits with one float scale per output channel.

The 16 codes of a weight stand for integers of 8 bits. Kernels get those integers, so that they need not know of the
codes. The integers are spaced like the levels of the best 16-level quantizer of a normal distribution (Max 1960,
"Quantizing for minimum distortion"), of which the largest is 127: code c stands for the c-th level times k / 15,
rounded. A group of consecutive input channels shares the step k, an integer from 1 to 15 (the two levels of scales of
QServe, arXiv 2405.04532).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ptq4dit_ao.core.int4 import pack_int4, packed_length, unpack_int4
from ptq4dit_ao.errors import ArgumentError, ArtifactError, check_type

EXPANDED_BITS = 4
"""Width of the codes in bits."""
CODES = 2**EXPANDED_BITS
LARGEST = 127
"""Largest magnitude of an expanded integer."""
STEPS = 15
"""Largest step k of a group."""
SMALLEST_GROUP = 16

NORMAL = (0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0691, 2.7326)
"""Positive levels of the best 16-level quantizer of N(0, 1) (Max 1960, table I)."""

COVERED = (1.1, 1.2, 1.0, 0.9, 0.8, 0.7)
"""Largest level as a multiple of a row's largest weight, as tried for its scale; the first one is taken without trials.

Outer levels lie so far apart that a level above the largest weight can leave less error.
"""

LEAST = 1e-3
"""Least importance of an input channel as a part of the mean, where steps are chosen."""

_MIDDLE = 8
# NumPy arrays, because a tensor would take on the modes and the default device of its first use.
_HALF = np.array(NORMAL, dtype=np.float32) / np.float32(NORMAL[-1])
_LEVELS = np.concatenate([-_HALF[::-1], _HALF])  # the 16 levels from -1 to 1
_BORDERS = (_LEVELS[1:] + _LEVELS[:-1]) / 2
_TEXT = re.compile(r"normal(?: g(\d+))?")


@dataclass(frozen=True, kw_only=True)
class Expansion:
    """Rule by which weights of 4 bits expand to integers of 8 bits, with levels as for a normal distribution.

    Args:
        group: number of consecutive input channels that share a step, 16 or more; None for one step for a row.

    Raises:
        ArgumentError: the group is too small.
    """

    group: int | None = None

    def __post_init__(self) -> None:
        if self.group is not None:
            check_type("group", self.group, int, "a number of channels")
            if self.group < SMALLEST_GROUP:
                raise ArgumentError(f"group is {self.group}; it must be at least {SMALLEST_GROUP} channels, or None")

    def groups(self, channels: int) -> int:
        """Number of groups of a row with so many input channels; the last one may be smaller."""
        return 1 if self.group is None else -(-channels // self.group)

    def bits_per_weight(self, rows: int, channels: int) -> float:
        """Bits that a weight takes on average, codes, steps and float scales included."""
        return 8 * (self.packed_length((rows, channels)) + 4 * rows) / (rows * channels)

    def packed_length(self, shape: tuple[int, int]) -> int:
        """Number of bytes of a packed weight (C_out, C_in), without its float scales."""
        steps = 0 if self.group is None else packed_length((shape[0], self.groups(shape[1])))
        return packed_length(shape) + steps

    def to_text(self) -> str:
        """The expansion as text, such as ``normal g16``."""
        return "normal" if self.group is None else f"normal g{self.group}"

    @classmethod
    def from_text(cls, text: str) -> Expansion:
        """Read what :meth:`to_text` has written.

        Raises:
            ArtifactError: it has another form.
        """
        found = _TEXT.fullmatch(text)
        if found is None or (found[1] is not None and int(found[1]) < SMALLEST_GROUP):
            raise ArtifactError(f"{text!r} describes no expansion of 4 bits; save the model again")
        return cls(group=None if found[1] is None else int(found[1]))

    def codes(self, integers: Tensor) -> tuple[Tensor, Tensor]:
        """Codes, (C_out, C_in) int16, and steps, (C_out, G) int16, of integers (C_out, C_in) int8.

        Any steps will do that give these integers, so that none need be kept beside them.

        Raises:
            ArtifactError: integers do not follow this rule.
        """
        index = _grouped(integers.to(torch.int32) + LARGEST + 1, self)
        codes, step = torch.zeros_like(index, dtype=torch.int16), torch.zeros_like(index[..., 0], dtype=torch.int16)
        for k in (STEPS,) if self.group is None else range(1, STEPS + 1):
            code, allowed = (table.to(integers.device) for table in _codes_at(k))
            fits = allowed[index].all(2)
            codes, step = code[index].where(fits.unsqueeze(2), codes), step.masked_fill(fits, k)
        if not step.all():
            raise ArtifactError(
                f"{int((step == 0).sum())} groups of a weight {tuple(integers.shape)} hold integers that do not expand "
                f"from 4 bits ({self.to_text()}); convert the model again"
            )
        return codes.flatten(1)[:, : integers.shape[1]], step

    def pack(self, integers: Tensor) -> Tensor:
        """Codes and steps of integers (C_out, C_in) int8, two to a byte, as one row of uint8.

        Raises:
            ArtifactError: integers do not follow this rule.
        """
        parts = [pack_int4((part - _MIDDLE).to(torch.int8)) for part in self.codes(integers)]
        return parts[0] if self.group is None else torch.cat(parts)

    def unpack(self, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        """The integers of which :meth:`pack` has made a row of bytes, (C_out, C_in) int8.

        Raises:
            ArtifactError: the row has another dtype or length.
        """
        if packed.dtype != torch.uint8 or tuple(packed.shape) != (self.packed_length(shape),):
            raise ArtifactError(
                f"a weight {shape} that expands from 4 bits ({self.to_text()}) takes a uint8 row of "
                f"{self.packed_length(shape)} bytes, not {packed.dtype} {tuple(packed.shape)}; save the model again"
            )
        length, groups = packed_length(shape), (shape[0], self.groups(shape[1]))
        step = torch.full(groups, STEPS) if self.group is None else unpack_int4(packed[length:], groups).int() + _MIDDLE
        codes = unpack_int4(packed[:length], shape).int() + _MIDDLE
        return expanded_integers(packed.device)[_spread(step, self, shape[1]).int(), codes]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """All integers from ``low`` to ``high``, as those that each weight of a matrix can take."""

    low: int
    high: int

    def nearest(self, position: Tensor) -> Tensor:
        """The integers next to positions, of any shape."""
        return position.round().clamp(self.low, self.high)

    def unit(self) -> float:
        """Distance of two neighbouring integers: 1."""
        return 1.0

    def ends(self) -> tuple[float, float]:
        """Smallest and largest integer."""
        return float(self.low), float(self.high)

    def neighbours(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """The integers below and above positions, also outside the interval."""
        below = position.floor()
        return below, below + 1


@dataclass(frozen=True, kw_only=True)
class Codebook:
    """Integers that each weight of a matrix (C_out, C_in) can take, if it expands from 4 bits."""

    expansion: Expansion
    step: Tensor
    """Step k of each group, (C_out, G) float32."""
    channels: int
    """C_in."""

    def nearest(self, position: Tensor) -> Tensor:
        """The integers next to positions on the scale of integers, (C_out, C_in) float32."""
        return _nearest(position, self._spread())

    def column(self, index: int, position: Tensor) -> Tensor:
        """The integers next to positions of one input channel, (C_out,) float32."""
        return _nearest(position, self.step[:, 0 if self.expansion.group is None else index // self.expansion.group])

    def unit(self) -> Tensor:
        """Mean distance of two neighbouring integers of each weight, (C_out, C_in) float32."""
        return self._spread() * (2 * LARGEST / (STEPS * (CODES - 1)))

    def ends(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest integer of each weight, (C_out, C_in) float32."""
        largest = (self._spread() * (LARGEST / STEPS)).round()
        return -largest, largest

    def neighbours(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """The two integers around each position, or next to it if it lies outside the ends, (C_out, C_in) each."""
        table, step = expanded_integers(position.device).to(torch.float32), self._spread()
        index = step.int()
        code = _nearest_code(position, step)
        code = (code - (table[index, code] > position).int()).clamp_(0, CODES - 2)
        # Levels are rounded to integers, so that the next one can lie below the position, too.
        code = (code + (table[index, code + 1] <= position).int()).clamp_(0, CODES - 2)
        return table[index, code], table[index, code + 1]

    def where(self, rows: Tensor, other: Codebook) -> Codebook:
        """This codebook for the given rows, (C_out,) bool, and another for the rest."""
        return replace(self, step=self.step.where(rows.unsqueeze(1), other.step))

    def rows(self, part: slice) -> Codebook:
        """The codebook of some rows."""
        return replace(self, step=self.step[part].clone())

    def _spread(self) -> Tensor:
        return _spread(self.step, self.expansion, self.channels)


def fit_codebooks(
    weight: Tensor, importance: Tensor, expansion: Expansion, *, several: bool = True
) -> Iterator[tuple[Tensor, Codebook]]:
    """Candidates of a weight's scale, each with steps that fit it.

    For each scale, every group takes the step with the least ``sum_j E[x_j^2] (Q(w_j) - w_j)^2``.

    Args:
        weight: (C_out, C_in).
        importance: E[x_j^2], (C_in,), from :func:`floored`.
        expansion: rule of the codes.
        several: whether there are several candidates of the scale, or one.

    Yields:
        Scale, (C_out,) float32, and codebook.
    """
    groups = _grouped(weight.to(torch.float32), expansion)
    padding = groups[0].numel() - len(importance)
    importance = torch.nn.functional.pad(importance.to(groups), (0, padding)).view(groups.shape[1:])
    largest = weight.to(torch.float32).abs().amax(1)
    for ratio in COVERED if several else COVERED[:1]:
        scale = (largest * (ratio / LARGEST)).clamp_min(torch.finfo(torch.float32).eps ** 4)
        positions = groups / scale.view(-1, 1, 1)
        least, step = torch.full_like(groups[..., 0], torch.inf), torch.full_like(groups[..., 0], STEPS)
        for k in (STEPS,) if expansion.group is None else range(1, STEPS + 1):
            error = (_nearest(positions, float(k)).sub_(positions).square_() * importance).sum(2)
            better = error < least
            least, step = error.where(better, least), step.masked_fill(better, k)
        yield scale, Codebook(expansion=expansion, step=step, channels=weight.shape[1])


def floored(importance: Tensor) -> Tensor:
    """Importance of input channels, (C_in,), of which none counts less than :data:`LEAST` of the mean.

    A channel that calibration has not seen would otherwise lose its weights to those that it shares a group with.
    """
    mean = importance.clamp_min(0).mean()
    return importance.clamp_min(float(mean) * LEAST) if mean > 0 else torch.ones_like(importance)


def expanded_integers(device: torch.device) -> Tensor:
    """The integer of every step and code, (16, 16) int8; row 0 is not used."""
    steps = torch.arange(STEPS + 1, dtype=torch.float32).unsqueeze(1)
    return (torch.from_numpy(_LEVELS) * steps * (LARGEST / STEPS)).round().to(device, torch.int8)


def _nearest(position: Tensor, step: Tensor | float) -> Tensor:
    levels = torch.from_numpy(_LEVELS).to(position.device)
    return (levels[_nearest_code(position, step)] * step).mul_(LARGEST / STEPS).round_()


def _nearest_code(position: Tensor, step: Tensor | float) -> Tensor:
    borders = torch.from_numpy(_BORDERS).to(position.device)
    return torch.bucketize(position * (STEPS / LARGEST) / step, borders, out_int32=True)


def _codes_at(step: int) -> tuple[Tensor, Tensor]:
    """Code of every integer from -128 to 127 at a step, (256,) int16, and whether it has one, (256,) bool."""
    index = expanded_integers(torch.device("cpu"))[step].int() + LARGEST + 1
    code, allowed = torch.zeros(256, dtype=torch.int16), torch.zeros(256, dtype=torch.bool)
    code[index], allowed[index] = torch.arange(CODES, dtype=torch.int16), True
    return code, allowed


def _grouped(weight: Tensor, expansion: Expansion) -> Tensor:
    """(C_out, C_in) -> (C_out, G, width); the last column is repeated to fill the last group."""
    width = weight.shape[1] if expansion.group is None else expansion.group
    padding = -weight.shape[1] % width
    return torch.cat([weight, weight[:, -1:].expand(-1, padding)], 1).unflatten(1, (-1, width))


def _spread(groups: Tensor, expansion: Expansion, channels: int) -> Tensor:
    """(C_out, G) -> (C_out, C_in)."""
    if expansion.group is None:
        return groups.expand(-1, channels)
    return groups.repeat_interleave(expansion.group, 1)[:, :channels]
