"""Meaning of the axes of a denoiser's inputs: batch, height, width, frames, text length or number of tokens.

The meaning follows from a tensor's name, dtype and number of axes, as diffusers' transformers use them. Axes of
channels have no meaning here, so that they stay fixed. Numbers that are sizes have a meaning by the argument's name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from torch import Tensor

from ptq4dit_ao.choices import AxisKind
from ptq4dit_ao.graph.names import TIMESTEP_NAMES

_TEXT = ("encoder", "text", "txt", "prompt", "cap", "llama", "t5")
_NOT_TEXT = ("image", "img")
MOST_COORDINATES = 4
"""Largest length of a last axis of whole numbers that is taken for coordinates: (time, row, column, ...)."""
LAST = -1
"""Number of channels that stands for channels in the last axis."""


NUMBERS: dict[str, tuple[AxisKind, ...]] = {
    "audio_num_frames": ("frames",),
    "frames": ("frames",),
    "height": ("height",),
    "num_frames": ("frames",),
    "width": ("width",),
    "img_shapes": ("frames", "height", "width"),
}
"""Arguments whose numbers are sizes: the meaning of the number, or of each number in the innermost sequences."""


def number_kind(path: str) -> AxisKind | None:
    """The meaning of a number that is a size; None for other numbers, such as scales.

    Args:
        path: the argument's name, then the places in its nested sequences, such as ``img_shapes_0_0_1``.
    """
    argument, *places = re.split(r"_(?=\d+(?:_|$))", path.rstrip("_"))
    kinds = NUMBERS.get(argument, ())
    if not places:
        return kinds[0] if len(kinds) == 1 else None
    return kinds[int(places[-1])] if 1 < len(kinds) > int(places[-1]) else None


def axis_kinds(
    tensors: Mapping[str, Tensor],
    rows: int | None,
    channels: int | None = None,
    *,
    channels_last: bool = False,
    numbers: Collection[str] = (),
) -> dict[str, dict[int, AxisKind]]:
    """The meaning of each axis that has one, by the name of the input and the axis.

    Args:
        tensors: the inputs by name.
        rows: size of the batch, which is the first axis of every tensor that begins with it; None if there is none.
        channels: number of channels of the latents, which tells (N, C, F, H, W) from (N, F, C, H, W).
        channels_last: whether latents are (N, F, H, W, C), as Kandinsky's.
        numbers: names of the tensors that stand for numbers. Their only axis is never the batch.
    """
    channels = LAST if channels_last else channels
    lengths = {x.shape[-1] for name, x in tensors.items() if "mask" in name and not _is_image(name)}
    return {
        name: {0: number_kind(name) or "tokens"} if name in numbers else _kinds(name, x, rows, channels, lengths)
        for name, x in tensors.items()
    }


def _is_text(name: str) -> bool:
    return any(part in name for part in _TEXT) and not _is_image(name)


def _is_image(name: str) -> bool:
    return any(part in name for part in _NOT_TEXT)


def _kinds(name: str, x: Tensor, rows: int | None, channels: int | None, texts: set[int]) -> dict[int, AxisKind]:
    if x.ndim == 0:
        return {}
    batched = rows is not None and x.shape[0] == rows
    found: dict[int, AxisKind] = {0: "batch"} if batched else {}
    length: AxisKind = "text" if _is_text(name) else "tokens"
    if _is_sequence_of_channels(name, x, batched, channels):
        return {**found, 2: length}
    for axis in range(1 if batched else 0, x.ndim):
        if _is_length(name, x, batched, axis):
            kind: AxisKind | None = length
        else:
            kind = _of_latents(x, batched, axis, channels)
            if length == "text":  # features of several layers, of which one axis is as long as the mask
                kind = "text" if x.ndim > 3 and x.shape[axis] in texts and axis < x.ndim - 1 else None
        if kind is not None:
            found[axis] = kind
    return found


def _is_length(name: str, x: Tensor, batched: bool, axis: int) -> bool:
    last = axis == x.ndim - 1
    if "mask" in name:
        return True
    if not x.is_floating_point() and not x.is_complex():
        coordinates = "indices" not in name and x.ndim > (2 if batched else 1) and x.shape[-1] <= MOST_COORDINATES
        return not (last and coordinates)
    if x.ndim == 1:
        return True
    if last:
        return batched and x.ndim == 2 and name.removeprefix("r_") in TIMESTEP_NAMES
    return x.ndim < 4


def _is_sequence_of_channels(name: str, x: Tensor, batched: bool, channels: int | None) -> bool:
    """Whether latents are (N, C, T), as those of audio."""
    return name == "hidden_states" and batched and x.ndim == 3 and x.shape[1] == channels != x.shape[2]


def _of_latents(x: Tensor, batched: bool, axis: int, channels: int | None) -> AxisKind | None:
    """The meaning of an axis of latents, (N, C, [F,] H, W) or (N, F, C, H, W); without a batch, one axis less.

    If there are as many frames as channels, both axes may be the frames: the model fixes that of the channels. With one
    axis more, (N, I, C, F, H, W), the second counts images.
    """
    axes = x.ndim if batched else x.ndim + 1
    if not x.is_floating_point() or x.ndim < 4 or axes not in (4, 5, 6):
        return None
    place = axis if batched else axis + 1
    if axes == 6:
        return {3: "frames", 4: "height", 5: "width"}.get(place)  # type: ignore[return-value]
    if channels == LAST and axes == 5:
        return {1: "frames", 2: "height", 3: "width"}.get(place)  # type: ignore[return-value]
    if place >= axes - 2:
        return "height" if place == axes - 2 else "width"
    if axes != 5:
        return None
    other = x.shape[axis + 1 if place == 1 else axis - 1]
    return "frames" if other == channels or (place == 2 and x.shape[axis] != channels) else None
