"""DiTs of the published widths with random parameters, to measure speed, memory and kernels, but not images."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ptq4dit_ao.errors import check_choice

M = TypeVar("M", bound=nn.Module)

WIDTHS = {"dit-s": (6, 64, 12), "dit-b": (12, 64, 12), "dit-l": (16, 64, 24), "dit-xl": (16, 72, 28)}
"""Name -> (heads, channels per head, blocks)."""

CHANNELS, SIZE, CLASSES, TIMESTEPS = 4, 32, 1000, 1000
"""Sizes of the 256 x 256 ImageNet models, in which patches of 2 make 256 tokens."""


def random_dit(width: str, blocks: int | None = None, size: int = SIZE) -> nn.Module:
    """A diffusers DiT of a published width, with the published number of blocks or ``blocks``.

    Its latents are ``size`` wide and high, which makes ``(size / 2)^2`` tokens.

    Every block of diffusers' DiT has its own timestep and class embedders. In converted checkpoints they have the same
    parameters in all blocks, and so they have here.

    Raises:
        ArgumentError: there is no such width.
    """
    from diffusers import DiTTransformer2DModel

    check_choice("width", width, tuple(WIDTHS))
    heads, head_dim, depth = WIDTHS[width]
    model: Any = DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=head_dim, num_layers=blocks or depth, in_channels=CHANNELS,
        out_channels=2 * CHANNELS, sample_size=size, patch_size=2, num_embeds_ada_norm=CLASSES,
    )  # fmt: skip
    randomize_(model, seed=0, std=0.02)
    first, *others = model.transformer_blocks
    for block in others:
        block.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    return model.eval().requires_grad_(False)


def random_batches(count: int, rows: int, seed: int = 0, size: int = SIZE) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Noise, timesteps and labels for :func:`random_dit`: ``(x (N, 4, S, S), t (N,), y (N,))``."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(rows, CHANNELS, size, size, generator=generator),
            torch.randint(TIMESTEPS, (rows,), generator=generator),
            torch.randint(CLASSES, (rows,), generator=generator),
        )
        for _ in range(count)
    ]


@torch.no_grad()
def randomize_(model: M, seed: int, std: float = 0.2) -> M:
    """Randomize all trainable parameters, so that no gate, shift or scale is 0 and every fold has an effect.

    They are normal with standard deviation ``std``, but at most ``1 / sqrt(fan_in)``: activations keep their size, and
    softmax does not saturate, whatever the width. The values depend on the seed and the order of the parameters, but
    not on dtype or device.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(values * min(std, fan_in**-0.5))
    return model
