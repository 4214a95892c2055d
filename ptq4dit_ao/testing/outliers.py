"""Outlier channels that do not change a float model's output, as a stress test for balancing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ptq4dit_ao.errors import ArgumentError


@torch.no_grad()
def inject_outliers(
    model: nn.Module, *, channels: int = 4, low: float = 10.0, high: float = 30.0, seed: int = 0
) -> Any:
    """A copy of a diffusers transformer (DiT, PixArt, SD3, Flux) with salient channels and the same output.

    In every block, ``channels`` random channels of each modulated input are multiplied by factors k in [low, high], by
    multiplying shift and ``1 + scale`` in the adaLN rows. The columns of the linears that read the input (q, k, v and
    FC1, in both streams if there are two) are divided by k. PixArt's blocks share their modulation, and so also k.

    Raises:
        ArgumentError: the model is of another class.
    """
    name = type(model).__name__
    if name not in _MODULATED:
        raise ArgumentError(f"inject_outliers knows {', '.join(_MODULATED)}, not {name}")
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for modulated in _MODULATED[name](model):
        k = torch.ones(modulated.width)
        chosen = torch.randperm(modulated.width, generator=generator)[:channels]
        k[chosen] = low + (high - low) * torch.rand(channels, generator=generator)
        _scale_modulation(modulated, k.to(modulated.adaln.weight))
        for linear in modulated.readers:
            linear.weight.div_(k.to(linear.weight))
    return model


@dataclass(frozen=True)
class _Modulated:
    """One modulated input: the chunks (C,) of adaLN's output with its shift and scale, and the linears that read it."""

    adaln: Any
    shift: int
    scale: int
    readers: Sequence[Any]
    tables: Sequence[Tensor] = ()
    """Tables that the blocks add to adaLN's output, (chunks, C) each."""

    @property
    def width(self) -> int:
        return int(self.readers[0].in_features)


def _scale_modulation(modulated: _Modulated, k: Tensor) -> None:
    """Replace shift by ``shift * k``, and scale by ``(1 + scale) * k - 1`` with its constant in tables or the bias."""
    width, bias = len(k), modulated.adaln.bias.view(-1, len(k))
    for chunk in (modulated.shift, modulated.scale):
        modulated.adaln.weight[chunk * width : (chunk + 1) * width] *= k[:, None]
        for vectors in (bias, *modulated.tables):
            vectors[chunk] *= k
    for vectors in modulated.tables or [bias]:
        vectors[modulated.scale] += k - 1


def _dit(model: Any) -> Iterator[_Modulated]:
    for block in model.transformer_blocks:
        yield _Modulated(block.norm1.linear, 0, 1, _qkv(block.attn1))
        yield _Modulated(block.norm1.linear, 3, 4, [_fc1(block.ff)])


def _pixart(model: Any) -> Iterator[_Modulated]:
    """Modulated inputs of PixArt, where one layer makes the modulation of all blocks, and each block adds a table."""
    blocks, adaln = model.transformer_blocks, model.adaln_single.linear
    tables = [block.scale_shift_table for block in blocks]
    yield _Modulated(adaln, 0, 1, [linear for block in blocks for linear in _qkv(block.attn1)], tables)
    yield _Modulated(adaln, 3, 4, [_fc1(block.ff) for block in blocks], tables)


def _joint(model: Any) -> Iterator[_Modulated]:
    """Modulated inputs of blocks with two streams; SD3.5 attends twice, and SD3's last block drops the text."""
    for block in model.transformer_blocks:
        image, text, attn = block.norm1.linear, block.norm1_context.linear, block.attn
        yield _Modulated(image, 0, 1, _qkv(attn))
        yield _Modulated(image, 3, 4, [_fc1(block.ff)])
        if getattr(block, "attn2", None) is not None:
            yield _Modulated(image, 6, 7, _qkv(block.attn2))
        added = [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj]
        if block.ff_context is None:
            yield _Modulated(text, 1, 0, added)  # AdaLayerNormContinuous has the scale first
        else:
            yield _Modulated(text, 0, 1, added)
            yield _Modulated(text, 3, 4, [_fc1(block.ff_context)])


def _flux(model: Any) -> Iterator[_Modulated]:
    yield from _joint(model)
    for block in model.single_transformer_blocks:
        yield _Modulated(block.norm.linear, 0, 1, [*_qkv(block.attn), block.proj_mlp])


def _qkv(attention: Any) -> list[Any]:
    return [attention.to_q, attention.to_k, attention.to_v]


def _fc1(feed_forward: Any) -> Any:
    return feed_forward.net[0].proj


_MODULATED: dict[str, Callable[[Any], Iterator[_Modulated]]] = {
    "DiTTransformer2DModel": _dit,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _joint,
    "FluxTransformer2DModel": _flux,
}
