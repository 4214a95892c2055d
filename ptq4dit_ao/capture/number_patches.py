"""Patches for diffusers transformers that take sizes as numbers, for sizes that are symbols of an export.

The originals keep tables by size, take symbols for keys, or branch on the larger of two sizes. The patches read the
same rows of the same tables. Where all sizes are numbers, the originals stay.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def qwen_rope(module: Any) -> dict[str, Any]:
    """Patch of the rotary positions of Qwen-Image and NucleusMoE, which a list of (frames, height, width) gives.

    Rows and columns are counted from the centre (``scale_rope``), or from 0. Frames are counted from the place of the
    image in the list, and the frame of the condition image, which is the last of a layered image, is -1. The text
    follows the largest height or width. The rows of both tables together, (2 * length, channels), are those of the
    positions from -length to length - 1.
    """
    original, layered = module.forward, hasattr(module, "_compute_condition_freqs")

    def of_images(shapes: list[Any], device: torch.device | None) -> Tensor:
        length = module.pos_freqs.shape[0]
        table = torch.cat([module.neg_freqs, module.pos_freqs]).to(device)
        parts = table.split([width // 2 for width in module.axes_dim], dim=1)

        def along(size: Any) -> Tensor:
            first = size - size // 2 if module.scale_rope else 0
            torch._check(size <= 2 * length if module.scale_rope else size <= length)
            return torch.arange(size, device=device) + (length - first)

        def of_image(place: int, shape: Any) -> Tensor:
            frames, height, width = shape
            torch._check(frames + place <= length)
            frame = torch.arange(frames, device=device) + (length + place)
            if layered and place == len(shapes) - 1:
                frame = torch.full_like(frame, length - 1)
            rows = [
                parts[0][frame][:, None, None],
                parts[1][along(height)][None, :, None],
                parts[2][along(width)][None, None, :],
            ]
            return torch.cat([x.expand(frames, height, width, -1) for x in rows], dim=-1).flatten(0, 2)

        return torch.cat([of_image(place, shape) for place, shape in enumerate(shapes)])

    def of_text(shapes: list[Any], tokens: Any, device: torch.device | None) -> Tensor:
        halved = 2 if module.scale_rope else 1
        sizes = [size // halved for _, *sides in shapes for size in sides] + [len(shapes) - 1] * layered
        for size in sizes:
            torch._check(size + tokens <= module.pos_freqs.shape[0])
        first = torch.stack([torch.full((), size, dtype=torch.int64, device=device) for size in sizes]).amax()
        return module.pos_freqs.to(device)[torch.arange(tokens, device=device) + first]  # type: ignore[no-any-return]

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        given = inspect.signature(original).bind(*args, **kwargs).arguments
        shapes, tokens, device = given["video_fhw"], given["max_txt_seq_len"], given.get("device")
        shapes = shapes[0] if isinstance(shapes, list) else shapes  # of the first sample
        shapes = shapes if isinstance(shapes, list) else [shapes]
        if all(isinstance(size, int) for size in (tokens, *(size for shape in shapes for size in shape))):
            return original(*args, **kwargs)  # type: ignore[no-any-return]
        tokens = int(tokens) if isinstance(tokens, Tensor) else tokens
        return of_images(shapes, device), of_text(shapes, tokens, device)

    return {"forward": forward}


NUMBER_PATCHES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "NucleusMoEEmbedRope": qwen_rope,
    "QwenEmbedLayer3DRope": qwen_rope,
    "QwenEmbedRope": qwen_rope,
}
"""Patches by class name; a patch returns the attributes that an instance of the class gets."""
