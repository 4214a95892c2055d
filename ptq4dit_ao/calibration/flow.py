"""Inputs of a small Flux transformer that draws classes: patches as tokens with positions, and classes as text.

It receives what diffusers' pipeline of Flux would give it, but patches of pixels instead of latents, and a fixed code
for each class instead of the outputs of text encoders. The codes are rows of the cosine transform, orthogonal and of
equal length. Thus the transformer's own ``context_embedder`` is the table of the classes' tokens, and nothing else has
to be stored.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TEXT_TOKENS = 4
"""Number of text tokens of a class."""
TEXT_WIDTH = 64
"""Width of the text tokens, and of the pooled text."""
TEXT_CLASSES = 11
"""Number of classes that have codes: ten, and the null class."""
TIMESTEP = 3
"""Position of the timestep among the tensors of :func:`flow_inputs`."""


def class_text(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of classes: labels (N,) -> tokens (N, TEXT_TOKENS, TEXT_WIDTH), and the pooled text (N, TEXT_WIDTH)."""
    tokens = labels[:, None] * TEXT_TOKENS + torch.arange(TEXT_TOKENS, device=labels.device)
    return _cosines(1 + tokens), _cosines(1 + TEXT_CLASSES * TEXT_TOKENS + labels)


def _cosines(rows: Tensor) -> Tensor:
    """Rows of the cosine transform with a mean square of 1: (...), from 1 to TEXT_WIDTH - 1 -> (..., TEXT_WIDTH)."""
    places = torch.arange(TEXT_WIDTH, dtype=torch.float64, device=rows.device) + 0.5
    return (math.sqrt(2) * torch.cos(math.pi / TEXT_WIDTH * rows[..., None] * places)).float()


def to_tokens(images: Tensor, patch: int) -> Tensor:
    """Patches of images as tokens: (N, C, H, W) -> (N, H / patch * W / patch, C * patch^2)."""
    n, c, h, w = images.shape
    split = images.view(n, c, h // patch, patch, w // patch, patch)
    return split.permute(0, 2, 4, 1, 3, 5).reshape(n, -1, c * patch * patch)


def to_images(tokens: Tensor, patch: int, shape: torch.Size) -> Tensor:
    """The images (N, C, H, W) that :func:`to_tokens` took apart."""
    n, c, h, w = shape
    return tokens.view(n, h // patch, w // patch, c, patch, patch).permute(0, 3, 1, 4, 2, 5).reshape(shape)


def flow_inputs(x: Tensor, t: Tensor, labels: Tensor, patch: int) -> tuple[Tensor, ...]:
    """Tensors of a ``FluxTransformer2DModel``, in its order: x (N, C, H, W), t (N,) in [0, 1000], labels (N,)."""
    h, w = x.shape[2:]
    rows, columns = torch.meshgrid(torch.arange(h // patch), torch.arange(w // patch), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).view(-1, 3).to(x)
    text, pooled = (codes.to(x.dtype) for codes in class_text(labels))
    no_places = torch.zeros(TEXT_TOKENS, 3, dtype=x.dtype, device=x.device)
    return to_tokens(x, patch), text, pooled, t / 1000, places, no_places
