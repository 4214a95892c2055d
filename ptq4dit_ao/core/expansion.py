"""Weights of 4 bits that expand exactly to integers of 8 bits with one float scale per output channel.

The 16 codes of a weight stand for integers of 8 bits. Kernels get those integers, so that they need not know of the
codes. A group of consecutive input channels has codes of its own: an integer step k from 1 to 15, and an integer zero
point z from 0 to 15 (the two levels of QServe, arXiv 2405.04532).

* ``uniform``: code c stands for k (c - z), and z is 8 if groups have no zero points.
* ``normal``: code c stands for k/15 of the c-th level of the best 16-level quantizer of a normal distribution
  (Max 1960, "Quantizing for minimum distortion"), of which the largest is 127, rounded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ptq4dit_ao.choices import LEVELS, Levels
from ptq4dit_ao.core.int4 import pack_int4, packed_length, unpack_int4
from ptq4dit_ao.errors import ArgumentError, ArtifactError, check_choice, check_type

EXPANDED_BITS = 4
"""Width of the codes in bits."""
CODES = 2**EXPANDED_BITS
LARGEST = 127
"""Largest magnitude of an expanded integer."""
STEPS = 15
"""Largest step k of a group."""
MIDDLE = 8
"""Zero point of a symmetric group."""

NORMAL = (0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0691, 2.7326)
"""Positive levels of the best 16-level quantizer of N(0, 1) (Max 1960, table I)."""

_TEXT = re.compile(r"(?:g(\d+))?(?: ?(zero))?(?: ?(normal))?")

COVERED = (1.0, 0.9, 0.8, 0.7, 0.6)
"""Fractions of the largest weight of a row that are tried for its scale, with uniform levels."""

COVERED_NORMAL = (1.2, 1.1, 1.0, 0.9, 0.8, 0.7)
"""The same with normal levels, whose outer ones lie further apart."""


@dataclass(frozen=True, kw_only=True)
class Expansion:
    """Rule by which weights of 4 bits expand to integers of 8 bits.

    Args:
        group: number of consecutive input channels that share a step, 16 or more; None for one step for a row.
        zero: whether each group has a zero point as well, for uniform levels.
        levels: ``uniform``, equally spaced; or ``normal``, denser around 0.

    Raises:
        ArgumentError: a value is out of range, or the values do not fit each other.
    """

    group: int | None = None
    zero: bool = False
    levels: Levels = "uniform"

    def __post_init__(self) -> None:
        check_choice("levels", self.levels, LEVELS)
        check_type("zero", self.zero, bool, "true or false")
        if self.group is not None:
            check_type("group", self.group, int, "a number of channels")
            if self.group < 16:
                raise ArgumentError(f"group is {self.group}; it must be at least 16 channels (32 and 64 are usual)")
        elif self.levels == "uniform":
            raise ArgumentError("group is None and the levels are uniform, which expands nothing; give a group")
        if self.zero and (self.group is None or self.levels == "normal"):
            raise ArgumentError(
                "zero is for groups of uniform levels; give a group and levels='uniform', or leave it out"
            )

    def groups(self, channels: int) -> int:
        """Number of groups of a row with so many input channels; the last one may be smaller."""
        return 1 if self.group is None else -(-channels // self.group)

    def bits_per_weight(self, rows: int, channels: int) -> float:
        """Bits that a weight takes on average, codes, steps, zero points and float scales included."""
        return 8 * (self.packed_length((rows, channels)) + 4 * rows) / (rows * channels)

    def packed_length(self, shape: tuple[int, int]) -> int:
        """Number of bytes of a packed weight (C_out, C_in), without its float scales."""
        return packed_length(shape) + self._step_bytes(shape)

    def _step_bytes(self, shape: tuple[int, int]) -> int:
        count = shape[0] * self.groups(shape[1])
        if self.group is None:
            return 0
        return count if self.zero else (count + 1) // 2

    def to_text(self) -> str:
        """The expansion as text, such as ``g32 zero`` or ``normal``."""
        parts = [
            "" if self.group is None else f"g{self.group}",
            "zero" * self.zero,
            "normal" * (self.levels == "normal"),
        ]
        return " ".join(filter(None, parts))

    @classmethod
    def from_text(cls, text: str) -> Expansion:
        """Read what :meth:`to_text` has written.

        Raises:
            ArtifactError: it has another form.
        """
        found = _TEXT.fullmatch(text)
        if found is None:
            raise ArtifactError(f"{text!r} describes no expansion of 4 bits; save the model again")
        group, zero, normal = found.groups()
        levels: Levels = "normal" if normal else "uniform"
        try:
            return cls(group=int(group) if group else None, zero=bool(zero), levels=levels)
        except ArgumentError as error:
            raise ArtifactError(f"{text!r} describes no expansion of 4 bits ({error}); save the model again") from error

    def pack(self, integers: Tensor) -> Tensor:
        """Codes, steps and zero points of integers (C_out, C_in) int8, as one row of bytes, uint8.

        Any steps and zero points will do that give these integers, so that none need be kept beside them.

        Raises:
            ArtifactError: integers do not follow this rule.
        """
        groups = _grouped(integers.to(torch.int16), self)
        codes, step, zero = (
            torch.zeros_like(groups),
            groups.new_zeros(groups.shape[:2]),
            groups.new_zeros(groups.shape[:2]),
        )
        for k in range(1, STEPS + 1) if self.group is not None else (STEPS,):
            code, origin, fits = self._codes(groups, k)
            codes = code.where(fits.unsqueeze(2), codes)
            step, zero = step.masked_fill(fits, k), origin.where(fits, zero)
        if not step.all():
            raise ArtifactError(
                f"{int((step == 0).sum())} groups of a weight {tuple(integers.shape)} hold integers that do not expand "
                f"from 4 bits ({self.to_text()}); convert the model again"
            )
        parts = [pack_int4(_nibbles(codes.flatten(1)[:, : integers.shape[1]]))]
        if self.zero:
            parts.append((step | zero << 4).to(torch.uint8).flatten())
        elif self.group is not None:
            parts.append(pack_int4(_nibbles(step)))
        return torch.cat(parts)

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
        codes, steps = unpack_int4(packed[:length], shape) + MIDDLE, packed[length:]
        if self.zero:
            step, zero = (part.view(groups) for part in (steps & 0xF, steps >> 4))
        else:
            step = torch.full(groups, STEPS) if self.group is None else unpack_int4(steps, groups) + MIDDLE
            zero = torch.full(groups, MIDDLE)
        step, zero = (_spread(part, self, shape[1]).to(torch.int16) for part in (step, zero))
        if self.levels == "normal":
            return _normal_table(codes.device)[step.int(), codes.int()].to(torch.int8)
        return ((codes - zero) * step).to(torch.int8)

    def _codes(self, groups: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (C_out, G, width) and zero point (C_out, G) of integers at a step, and whether they follow the rule."""
        if self.levels == "normal":
            code, allowed = _normal_codes(step)
            index = (groups + LARGEST + 1).int()
            return code[index], torch.full_like(groups[..., 0], MIDDLE), allowed[index].all(2)
        q = groups.div(step, rounding_mode="floor")
        low, high = q.amin(2).clamp_max(0), q.amax(2).clamp_min(0)
        zero = -low if self.zero else torch.full_like(low, MIDDLE)
        fits = (q * step == groups).all(2) & (low >= -zero) & (high < CODES - zero)
        return q + zero.unsqueeze(2), zero, fits


@dataclass(frozen=True, kw_only=True)
class Interval:
    """All integers from ``low`` to ``high``, as those that each weight of a matrix can take."""

    low: int
    high: int

    def nearest(self, position: Tensor) -> Tensor:
        """The integers next to positions, of any shape."""
        return position.round().clamp(self.low, self.high)

    def unit(self) -> Tensor:
        """Distance of two neighbouring integers: 1."""
        return torch.ones(())

    def ends(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest integer, () each."""
        return torch.tensor(float(self.low)), torch.tensor(float(self.high))

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
    zero: Tensor
    """Zero point z of each group, (C_out, G) float32."""
    channels: int
    """C_in."""

    def nearest(self, position: Tensor) -> Tensor:
        """The integers next to positions on the scale of integers, (C_out, C_in) float32."""
        return self._nearest(position, self._spread(self.step), self._spread(self.zero))

    def column(self, index: int, position: Tensor) -> Tensor:
        """The integers next to positions of one input channel, (C_out,) float32."""
        group = 0 if self.expansion.group is None else index // self.expansion.group
        return self._nearest(position, self.step[:, group], self.zero[:, group])

    def unit(self) -> Tensor:
        """Mean distance of two neighbouring integers of each weight, (C_out, C_in) float32."""
        if self.expansion.levels == "uniform":
            return self._spread(self.step)
        return self._spread(self.step) * (2 * LARGEST / (STEPS * (CODES - 1)))

    def ends(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest integer of each weight, (C_out, C_in) float32."""
        step, zero = self._spread(self.step), self._spread(self.zero)
        if self.expansion.levels == "uniform":
            return -step * zero, step * (CODES - 1 - zero)
        table = _normal_table(step.device)[step.long()]
        return table[..., 0], table[..., -1]

    def neighbours(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """The two integers around each position, or next to it if it lies outside the ends, (C_out, C_in) each."""
        step, zero = self._spread(self.step), self._spread(self.zero)
        if self.expansion.levels == "uniform":
            below = (position / step).floor()
            below = below.clamp(-zero, CODES - 2 - zero)
            return step * below, step * (below + 1)
        table = _normal_table(step.device)[step.long()]
        code = (position.unsqueeze(-1) >= table).sum(-1).sub_(1).clamp_(0, CODES - 2).unsqueeze(-1)
        return table.gather(-1, code).squeeze(-1), table.gather(-1, code + 1).squeeze(-1)

    def where(self, rows: Tensor, other: Codebook) -> Codebook:
        """This codebook for the given rows, (C_out,) bool, and another for the rest."""
        keep = rows.unsqueeze(1)
        return replace(self, step=self.step.where(keep, other.step), zero=self.zero.where(keep, other.zero))

    def rows(self, part: slice) -> Codebook:
        """The codebook of some rows."""
        return replace(self, step=self.step[part].clone(), zero=self.zero[part].clone())

    def _spread(self, groups: Tensor) -> Tensor:
        return _spread(groups, self.expansion, self.channels)

    def _nearest(self, position: Tensor, step: Tensor, zero: Tensor) -> Tensor:
        if self.expansion.levels == "uniform":
            return (position / step).round_().clamp_(-zero, CODES - 1 - zero).mul_(step)
        return _nearest_normal(position, step)


def fit_codebooks(
    weight: Tensor, importance: Tensor, expansion: Expansion, *, several: bool = True
) -> Iterator[tuple[Tensor, Codebook]]:
    """Candidates of a weight's scale, each with steps and zero points that fit it.

    For each scale, every group takes the step and zero point with the least ``sum_j E[x_j^2] (Q(w_j) - w_j)^2``.

    Args:
        weight: (C_out, C_in).
        importance: E[x_j^2], (C_in,).
        expansion: rule of the codes.
        several: whether there are several candidates of the scale, or one.

    Yields:
        Scale, (C_out,) float32, and codebook.
    """
    weight, importance = weight.to(torch.float32), importance.to(torch.float32).clamp_min(0)
    groups = _grouped(weight, expansion)
    padding = groups[0].numel() - len(importance)
    importance = torch.nn.functional.pad(importance, (0, padding)).view(groups.shape[1:])
    low, high = groups.amin(2).clamp_max(0), groups.amax(2).clamp_min(0)
    largest = torch.maximum(-low, high).amax(1)
    normal = expansion.levels == "normal"
    if expansion.zero:  # the widest group must be covered by 15 of its largest steps
        largest = torch.maximum(largest, (high - low).amax(1) * (LARGEST / (STEPS * STEPS)))
    elif not normal:
        largest = largest * (LARGEST / ((CODES - 1) / 2 * STEPS))  # step 15 covers -7.5 .. 7.5 as for plain integers
    ratios = COVERED_NORMAL if normal else COVERED
    for ratio in ratios if several else ratios[normal : normal + 1]:
        scale = (largest * (ratio / LARGEST)).clamp_min(torch.finfo(torch.float32).tiny * 2**23)
        step, zero = _fit(groups, importance, low, high, scale, expansion)
        yield scale, Codebook(expansion=expansion, step=step, zero=zero, channels=weight.shape[1])


def _fit(
    groups: Tensor, importance: Tensor, low: Tensor, high: Tensor, scale: Tensor, expansion: Expansion
) -> tuple[Tensor, Tensor]:
    """Step and zero point of each group, (C_out, G) each, for groups (C_out, G, width) and scales (C_out,)."""
    positions = groups / scale.view(-1, 1, 1)
    lowest, highest = low / scale.unsqueeze(1), high / scale.unsqueeze(1)
    best = torch.full_like(lowest, torch.inf)
    chosen_step, chosen_zero = torch.full_like(lowest, STEPS), torch.full_like(lowest, MIDDLE)
    steps = (STEPS,) if expansion.group is None else range(1, STEPS + 1)
    for k in steps:
        for zero in _zeros(lowest / k, highest / k, k, expansion):
            if expansion.levels == "normal":
                rounded = _nearest_normal(positions, torch.tensor(float(k), device=positions.device))
            else:
                z = zero.unsqueeze(2)
                rounded = (positions / k).round_().clamp_(-z, CODES - 1 - z).mul_(k)
            error = (rounded.sub_(positions).square_() * importance).sum(2)
            better = error < best
            best = error.where(better, best)
            chosen_step, chosen_zero = chosen_step.masked_fill(better, k), zero.where(better, chosen_zero)
    return chosen_step, chosen_zero


def _zeros(low: Tensor, high: Tensor, step: int, expansion: Expansion) -> Iterator[Tensor]:
    """Zero points to try for groups from ``low`` to ``high``, in steps."""
    if not expansion.zero:
        yield torch.full_like(low, MIDDLE)
        return
    most = LARGEST // step  # no integer is larger than 127
    below, above = (-low).round(), CODES - 1 - high.round()
    if most < MIDDLE:
        return
    bounds = max(0, CODES - 1 - most), min(CODES - 1, most)
    yield ((below + above) / 2).round().clamp(*bounds)


def _grouped(weight: Tensor, expansion: Expansion) -> Tensor:
    """(C_out, C_in) -> (C_out, G, width); the last column is repeated to fill the last group."""
    width = weight.shape[1] if expansion.group is None else expansion.group
    padding = -weight.shape[1] % width
    return torch.cat([weight, weight[:, -1:].expand(-1, padding)], 1).unflatten(1, (-1, width))


def _nibbles(values: Tensor) -> Tensor:
    """Values from 0 to 15 as integers of 4 bits."""
    return (values - MIDDLE).to(torch.int8)


def _spread(groups: Tensor, expansion: Expansion, channels: int) -> Tensor:
    """(C_out, G) -> (C_out, C_in)."""
    if expansion.group is None:
        return groups.expand(-1, channels)
    return groups.repeat_interleave(expansion.group, 1)[:, :channels]


def _normal_levels() -> Tensor:
    half = torch.tensor(NORMAL) / NORMAL[-1]
    return torch.cat([-half.flip(0), half])


def _normal_table(device: torch.device) -> Tensor:
    """Integers of every code by step, (16, 16) float32; row 0 is not used."""
    steps = torch.arange(STEPS + 1, dtype=torch.float32)
    return (_normal_levels() * (LARGEST / STEPS) * steps.unsqueeze(1)).round().to(device)


def _normal_codes(step: int) -> tuple[Tensor, Tensor]:
    """Code of every integer from -128 to 127 at a step, (256,) int16, and whether it has one, (256,) bool."""
    table = _normal_table(torch.device("cpu"))[step].int() + LARGEST + 1
    code, allowed = torch.zeros(256, dtype=torch.int16), torch.zeros(256, dtype=torch.bool)
    code[table], allowed[table] = torch.arange(CODES, dtype=torch.int16), True
    return code, allowed


def _nearest_normal(position: Tensor, step: Tensor) -> Tensor:
    levels = _normal_levels().to(position.device)
    bounds = (levels[1:] + levels[:-1]) / 2
    code = torch.bucketize(position * (STEPS / LARGEST) / step, bounds)
    return (levels[code] * step).mul_(LARGEST / STEPS).round_()
