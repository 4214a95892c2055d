"""Reimplementation of facebookresearch/DiT, a class-conditional DiT, with the parameter names of its checkpoints.

It is written from the architecture (Peebles and Xie, arXiv 2212.09748), so that this form of DiT (fused qkv, one
timestep embedder for all blocks, ``blocks.0.adaLN_modulation.1``) can be tested without its repository or timm. It
differs from the original in two ways. The timestep's sinusoids, float32, are cast to the dtype of the weights, so that
the model runs in any dtype. A new model has torch's default initialisation, except for the zeros of adaLN-Zero.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6
FREQUENCIES = 256
"""Number of the timestep's sinusoids, of which half are cosines and half are sines."""
MAX_PERIOD = 10000


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Modulate tokens ``x`` (N, T, D) with ``shift`` and ``scale`` (N, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def sincos_position_embedding(hidden_size: int, grid: int) -> Tensor:
    """Position embedding, (grid * grid, hidden_size) float64: first the channels of the column, then of the row."""
    quarter = hidden_size // 4
    omega = MAX_PERIOD ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.outer(torch.arange(grid, dtype=torch.float64), omega)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, D / 2)
    return torch.cat([axis.repeat(grid, 1), axis.repeat_interleave(grid, dim=0)], dim=1)


class PatchEmbed(nn.Module):
    """Embedding of patches as tokens, (N, C, H, W) -> (N, T, D)."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) -> tokens (N, T, D)."""
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Embedding of timesteps, (N,), integer or floating -> (N, D)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        """Timesteps (N,) -> embeddings (N, D)."""
        half = FREQUENCIES // 2
        exponents = -math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32, device=t.device) / half
        angles = t[:, None].float() * exponents.exp()[None]
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(sinusoids.to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """Embedding of labels, (N,) -> (N, D).

    Label ``num_classes`` is the null class, which replaces a label with probability ``dropout_prob`` in train mode.
    With ``dropout_prob=0`` there is no null class.
    """

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.num_classes, self.dropout_prob = num_classes, dropout_prob
        self.embedding_table = nn.Embedding(num_classes + int(dropout_prob > 0), hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        """Labels (N,) -> embeddings (N, D)."""
        if self.training and self.dropout_prob > 0:
            dropped = torch.rand(y.shape, device=y.device) < self.dropout_prob
            y = y.masked_fill(dropped, self.num_classes)
        return self.embedding_table(y)


class Attention(nn.Module):
    """Multi-head self-attention, (N, T, D) -> (N, T, D), with one linear for q, k and v."""

    def __init__(self, hidden_size: int, num_heads: int, *, qkv_bias: bool, fused: bool) -> None:
        super().__init__()
        self.num_heads, self.fused = num_heads, fused
        self.scale = (hidden_size // num_heads) ** -0.5
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=qkv_bias)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (N, T, D) -> tokens (N, T, D)."""
        n, tokens, width = x.shape
        qkv = self.qkv(x).reshape(n, tokens, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (N, heads, T, D / heads) each
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).reshape(n, tokens, width))


class Mlp(nn.Module):
    """MLP of two linears with ``hidden`` channels and the tanh form of GELU between them, (N, T, D) -> (N, T, D)."""

    def __init__(self, hidden_size: int, hidden: int, *, bias: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, hidden, bias=bias)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (N, T, D) -> tokens (N, T, D)."""
        return self.fc2(self.act(self.fc1(x)))


class DiTBlock(nn.Module):
    """Transformer block of attention and MLP with adaLN-Zero."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, *, bias: bool, fused: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=NORM_EPS)
        self.attn = Attention(hidden_size, num_heads, qkv_bias=bias, fused=fused)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=NORM_EPS)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), bias=bias)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size, bias=bias))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens (N, T, D) and condition (N, D) -> tokens (N, T, D)."""
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """Projection of tokens (N, T, D) to the pixels of their patches, (N, T, patch_size ** 2 * out_channels)."""

    def __init__(self, hidden_size: int, out_features: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=NORM_EPS)
        self.linear = nn.Linear(hidden_size, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens (N, T, D) and condition (N, D) -> pixels (N, T, patch_size ** 2 * out_channels)."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """The class-conditional DiT; the defaults are DiT-XL/2 for 256x256 images (32x32 latents).

    Args:
        bias: whether qkv, fc1, fc2 and adaLN of the blocks have a bias; those of the checkpoints have one.
        fused_attention: whether attention is one ``scaled_dot_product_attention``, or matmul, softmax, matmul.
        learn_sigma: whether the model also predicts the variance, which doubles the output channels.

    Raises:
        ValueError: sizes are not divisible as needed.
    """

    def __init__(
        self,
        *,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        bias: bool = True,
        fused_attention: bool = True,
    ) -> None:
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"input_size={input_size} is no multiple of patch_size={patch_size}")
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(f"hidden_size={hidden_size} is no multiple of 4 and of num_heads={num_heads}")
        self.patch_size, self.grid = patch_size, input_size // patch_size
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        positions = sincos_position_embedding(hidden_size, self.grid)
        self.pos_embed = nn.Parameter(positions.float().unsqueeze(0), requires_grad=False)  # (1, T, D)
        self.blocks = nn.ModuleList(
            DiTBlock(hidden_size, num_heads, mlp_ratio, bias=bias, fused=fused_attention) for _ in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * self.out_channels)
        for modulated in (*self.blocks, self.final_layer):
            _zero_(modulated.adaLN_modulation[-1])
        _zero_(self.final_layer.linear)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Arrange the pixels of patches as images, (N, T, patch_size ** 2 * C) -> (N, C, H, W)."""
        n, h, p, c = x.shape[0], self.grid, self.patch_size, self.out_channels
        x = torch.einsum("nhwpqc->nchpwq", x.reshape(n, h, h, p, p, c))
        return x.reshape(n, c, h * p, h * p)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Latents (N, C, H, W), timesteps (N,) and labels (N,) -> prediction (N, out_channels, H, W)."""
        x = self.x_embedder(x) + self.pos_embed  # (N, T, D)
        c = self.t_embedder(t) + self.y_embedder(y)  # (N, D)
        for block in self.blocks:
            x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))


def load_facebook_state_dict(model: DiT, path_or_dict: str | PathLike[str] | Mapping[str, Any]) -> DiT:
    """Load a public ``DiT-XL-2-*.pt``, or the ``ema`` weights of a training checkpoint; every name and shape must fit.

    Raises:
        RuntimeError: parameters are missing, unknown, or of another shape; the message lists them.
    """
    if isinstance(path_or_dict, Mapping):
        checkpoint = dict(path_or_dict)
    else:
        with torch.serialization.safe_globals([argparse.Namespace]):  # training checkpoints include such an object
            checkpoint = torch.load(path_or_dict, map_location="cpu", weights_only=True)
    model.load_state_dict(checkpoint.get("ema", checkpoint), strict=True)
    return model


def _zero_(linear: nn.Linear) -> None:
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
