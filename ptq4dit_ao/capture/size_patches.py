"""Patches for diffusers transformers that compute with sizes in ways that fix them in an exported graph.

These models take any size, but their code branches on it, for example to read a stored table of positions at the
configured size and to compute the table at every other. The patches compute the same from symbolic sizes. Where no
size is free, the originals stay.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Attributes = dict[str, Any]
"""Attributes that a patched module instance gets; they take precedence over those of its class."""


def are_numbers(*sizes: object) -> bool:
    """Whether all sizes are numbers, that is, none is a symbol of the export."""
    return all(isinstance(size, int) for size in sizes)


def original(module: nn.Module, name: str) -> Any:
    """A function or class of the file that a module comes from."""
    return getattr(sys.modules[type(module).__module__], name)


def result(model: nn.Module, sample: Tensor, return_dict: bool) -> Any:
    """The output of a diffusers transformer for a sample: a tuple, or a ``Transformer2DModelOutput``."""
    if not return_dict:
        return (sample,)
    return original(model, "Transformer2DModelOutput")(sample=sample)


def is_at(sizes: tuple[Any, ...], numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """A tensor of one bool: whether sizes, symbols among them, are equal to these numbers."""
    same = torch.ones((), dtype=torch.bool, device=device)
    for size, number in zip(sizes, numbers, strict=True):
        same = same & (torch.full((), size, dtype=torch.int64, device=device) == number)
    return same


def _is_recomputed(table: Tensor, computed: Callable[[torch.device], Tensor]) -> bool:
    """Whether a module's table is what it would compute at the table's size, rounded to the table's dtype.

    The values of a table on ``meta`` are not known; such a module gets those that it would compute.
    """
    device = torch.device("cpu")
    again = computed(device)
    return again.shape == table.shape and (
        table.is_meta or torch.equal(again.to(table.dtype), table.to(device))
    )


def patch_embed(module: Any) -> Attributes:
    """Patch of the patch embedding of DiT, PixArt, Latte and others, which has a table of positions for its own size.

    At other sizes the original computes the table. The stored one is the same, but has the dtype of the parameters.
    """
    if module.pos_embed_max_size is not None or module.pos_embed is None:
        return {}
    own, forward_ = (module.height, module.width), module.forward

    def positions(rows: int, columns: int, device: torch.device) -> Tensor:
        base, scale = module.base_size, module.interpolation_scale
        row = torch.arange(rows, device=device, dtype=torch.float32) / (rows / base) / scale
        column = torch.arange(columns, device=device, dtype=torch.float32) / (columns / base) / scale
        places = torch.stack([place.flatten() for place in torch.meshgrid(column, row, indexing="xy")])
        table = original(module, "get_2d_sincos_pos_embed_from_grid")(module.pos_embed.shape[-1], places)
        return table.float().unsqueeze(0)  # type: ignore[no-any-return]

    if not _is_recomputed(module.pos_embed, lambda device: positions(*own, device)):
        return {}

    def forward(latent: Tensor) -> Tensor:
        rows, columns = latent.shape[-2] // module.patch_size, latent.shape[-1] // module.patch_size
        if are_numbers(rows, columns):
            return forward_(latent)  # type: ignore[no-any-return]
        x = module.proj(latent)
        if module.flatten:
            x = x.flatten(2).transpose(1, 2)
        if module.layer_norm:
            x = module.norm(x)
        table = positions(rows, columns, x.device)
        kind = module.pos_embed.dtype
        if kind != table.dtype:
            table = torch.where(is_at((rows, columns), own, x.device), table.to(kind).to(table.dtype), table)
        return (x + table).to(x.dtype)

    return {"forward": forward}


def dit(model: Any) -> Attributes:
    """Patch of DiT, which takes the root of the number of tokens for the height and the width of its output.

    Images are square, so the height is that of the input.
    """
    forward_ = model.forward

    def forward(
        hidden_states: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        height, width = hidden_states.shape[-2:]
        if are_numbers(height, width):
            return forward_(hidden_states, timestep, class_labels, cross_attention_kwargs, return_dict)
        torch._check(height == width)
        p = model.patch_size
        rows = height // p
        x = model.pos_embed(hidden_states)
        for block in model.transformer_blocks:
            x = block(
                x, timestep=timestep, cross_attention_kwargs=cross_attention_kwargs, class_labels=class_labels
            )
        condition = model.transformer_blocks[0].norm1.emb(timestep, class_labels, hidden_dtype=x.dtype)
        shift, scale = model.proj_out_1(F.silu(condition)).chunk(2, dim=1)
        x = model.proj_out_2(model.norm_out(x) * (1 + scale[:, None]) + shift[:, None])
        x = x.reshape(-1, rows, rows, p, p, model.out_channels).permute(0, 5, 1, 3, 2, 4)
        return result(model, x.flatten(4, 5).flatten(2, 3), return_dict)

    return {"forward": forward}


SIZE_PATCHES: dict[str, Callable[[Any], Attributes]] = {
    "DiTTransformer2DModel": dit,
    "PatchEmbed": patch_embed,
}
"""Patches by class name; a patch returns the attributes that an instance of the class gets."""
