"""Every rule on a small graph: how many scales are free, and that folding random ones changes nothing."""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from ptq4dit_ao.capture import export_transformer, free_sizes
from ptq4dit_ao.capture.interface import input_specs, resized
from ptq4dit_ao.choices import AxisKind
from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.graph import Site, SitePolicy, find_sites
from ptq4dit_ao.graph.rules import IGNORED, RULES, rule
from ptq4dit_ao.passes import fold_balance, insert_balance

aten = torch.ops.aten

C, T, HEADS = 8, 4, 2
D = C // HEADS

ANY = SitePolicy(min_variables=1)
COUPLED = SitePolicy(min_variables=1, couple_blocks=True)

Body = Callable[..., Tensor]
"""(net, x) or (net, x, c) -> output."""


class Net(nn.Module):
    """Tokens x (N, T, C), and a condition c (N, C) where the body takes one."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body = body
        self.make, self.make2, self.out, self.out2 = (nn.Linear(C, C) for _ in range(4))
        self.no_bias = nn.Linear(C, C, bias=False)
        self.wide2, self.wide3, self.wide6 = nn.Linear(C, 2 * C), nn.Linear(C, 3 * C), nn.Linear(C, 6 * C)
        self.narrow2, self.narrow_half, self.by_token = nn.Linear(2 * C, C), nn.Linear(C // 2, C), nn.Linear(T, C)
        self.norm, self.plain, self.rms = nn.LayerNorm(C), nn.LayerNorm(C, elementwise_affine=False), nn.RMSNorm(C)
        self.group, self.table = nn.GroupNorm(HEADS, C), nn.Embedding(C, C)
        self.conv1, self.depthwise = nn.Conv1d(C, C, 1), nn.Conv1d(C, C, 1, groups=C)
        self.conv2, self.conv3 = nn.Conv2d(C, C, 3, padding=1), nn.Conv3d(C, C, 1)
        self.vector, self.square, self.tokens = (nn.Parameter(torch.empty(s)) for s in ((C,), (C, C), (T, C)))
        self.register_buffer("order", torch.tensor([3, 1, 0, 2]))
        self.register_buffer("mask", torch.tensor([True, False, True, True]))

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        return self.body(self, x) if c is None else self.body(self, x, c)


def through(f: Callable[[Tensor], Tensor]) -> Body:
    """``f`` between the producing and the consuming linear."""
    return lambda m, x: m.out(f(m.make(x)))


def heads(h: Tensor) -> Tensor:
    return h.view(h.shape[0], T, HEADS, D).transpose(1, 2)


def merged(h: Tensor) -> Tensor:
    return h.transpose(1, 2).reshape(h.shape[0], T, C)


def mixing(x: Tensor) -> Tensor:
    """Attention weights (N, T, T) of the inputs alone."""
    return (x @ x.transpose(-2, -1)).softmax(-1)


def modulated(m: Net, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return m.plain(x) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def fused_attention(m: Net, x: Tensor) -> Tensor:
    q, k, v = m.wide3(x).reshape(-1, T, 3, HEADS, D).permute(2, 0, 3, 1, 4).unbind(0)
    return m.out(merged(F.scaled_dot_product_attention(q, k, v)))


def softmax_attention(m: Net, x: Tensor) -> Tensor:
    q, k, v = (heads(part) for part in m.wide3(x).chunk(3, dim=-1))
    return m.out(merged((q @ k.transpose(-2, -1)).softmax(-1) @ v))


def attention_in_batch(m: Net, x: Tensor) -> Tensor:
    v = heads(m.make(x)).reshape(-1, T, D)
    mixed = torch.bmm(mixing(heads(x).reshape(-1, T, D)), v)
    return m.out(merged(mixed.reshape(-1, HEADS, T, D)))


def grouped_queries(m: Net, x: Tensor) -> Tensor:
    v = m.make(x)[..., :D].unsqueeze(1).expand(-1, HEADS, -1, -1)
    return m.out(merged(F.scaled_dot_product_attention(heads(x), heads(x), v)))


def split_heads(h: Tensor) -> Tensor:
    return h.view(-1, T, HEADS, D)


def labels(x: Tensor) -> Tensor:
    """(N, T) integers."""
    return (x[..., 0] > 0).long()


def few_values(m: Net, x: Tensor, kv_heads: int) -> list[Tensor]:
    """q of 4 heads of 2 channels; k and v of fewer heads, v from ``make``."""
    q, k, v = x, x[..., : 2 * kv_heads], m.make(x)[..., : 2 * kv_heads]
    return [h.view(-1, T, h.shape[-1] // 2, 2).transpose(1, 2) for h in (q, k, v)]


def repeated_values(m: Net, x: Tensor) -> list[Tensor]:
    q, *kv = few_values(m, x, 2)
    return [q, *(h.repeat_interleave(2, dim=1) for h in kv)]


def adaln(m: Net, x: Tensor, c: Tensor) -> Tensor:
    shift, scale, gate, _, _, _ = m.wide6(F.silu(c)).chunk(6, dim=1)
    return x + gate.unsqueeze(1) * m.out(modulated(m, x, shift, scale))


# For every op: bodies that use it, and the free variables of the site of ``out``.
CASES: dict[object, list[tuple[Body, int]]] = {
    aten.to.dtype: [(through(lambda h: aten.to.dtype(h, torch.float64)), C)],
    aten.to.dtype_layout: [(through(lambda h: aten.to.dtype_layout(h, dtype=torch.float64, device=h.device)), C)],
    aten.to.device: [(through(lambda h: aten.to.device(h, h.device, torch.float64)), C)],
    aten._to_copy.default: [(through(lambda h: aten._to_copy(h, dtype=torch.float64)), C)],
    aten.type_as.default: [
        (lambda m, x: m.out(m.make(x).type_as(x)), C),
        (through(lambda h: h.detach().type_as(h)), C),
    ],
    aten.contiguous.default: [(through(lambda h: h.transpose(1, 2).contiguous().transpose(1, 2)), C)],
    aten.clone.default: [(through(lambda h: h.clone()), C)],
    aten.alias.default: [(through(aten.alias), C)],
    aten.detach.default: [(through(aten.detach), C)],
    aten.view.default: [
        (through(lambda h: h.view(-1, T, HEADS, D).view(-1, T, C)), C),
        (through(lambda h: h.view(-1, T * C).view(-1, T, C)), C),
        (through(lambda h: h.view(-1, C).view(-1, T, C)), C),
    ],
    aten.reshape.default: [
        (attention_in_batch, D),  # heads beside the batch share a scale
        (through(lambda h: h.transpose(1, 2).reshape(-1, T, C)), 2),  # tokens and channels change places
    ],
    aten._unsafe_view.default: [(through(lambda h: aten._unsafe_view(h, [h.shape[0], T, C])), C)],
    aten.flatten.using_ints: [(through(lambda h: h.unflatten(2, (HEADS, D)).flatten(2)), C)],
    aten.unflatten.int: [(through(lambda h: h.unflatten(-1, (HEADS, D)).transpose(2, 3).flatten(2)), C)],
    aten.squeeze.default: [(through(lambda h: h.unsqueeze(1).squeeze()), C)],
    aten.squeeze.dim: [(through(lambda h: h[:, :1].squeeze(1)), C)],
    aten.squeeze.dims: [(through(lambda h: h[:, None, :, None].squeeze((1, 3))), C)],
    aten.unsqueeze.default: [(through(lambda h: h.unsqueeze(-1).squeeze(-1)), C)],
    aten.permute.default: [(through(lambda h: h.permute(2, 0, 1).permute(1, 2, 0)), C)],
    aten.transpose.int: [(through(lambda h: h.transpose(-1, 0).transpose(-2, -1).transpose(0, 1).transpose(1, 2)), C)],
    aten.mT.default: [(through(lambda h: h.mT.mT), C)],
    aten.t.default: [(lambda m, x: m.out(m.make(x[:, 0]).t().contiguous().t()), C)],
    aten.expand.default: [
        (lambda m, x: m.out(m.make(x[:, :1]).expand(-1, T, -1)), C),
        (lambda m, x: m.out(m.make(x)[..., :1].expand(-1, -1, C)), 1),
        (lambda m, x: m.out(m.vector.expand(x.shape[0], T, C) + m.make(x)), C),
        (grouped_queries, D),
    ],
    aten.slice.Tensor: [
        (lambda m, x: m.narrow_half(m.make(x)[..., 2 : 2 + D]), D),
        (through(lambda h: h[:, 1:-1]), C),
        (lambda m, x: m.out(m.wide2(x)[..., C // 2 : C // 2 + C]), C),
        (lambda m, x: m.out(m.wide2(x)[..., :C] + m.wide2(x)[..., 2 : 2 + C]), 2),
        (lambda m, x: m.narrow_half(m.make(x)[..., ::2]), C // 2),
        (lambda m, x: m.out(m.make(x)[:, 1::2]), C),
        (lambda m, x: m.narrow_half(m.make(x)[..., ::2] + m.make(x)[..., :D]), 3),  # {0}, {1, 2, 4}, {3, 6}
    ],
    aten.select.int: [
        (through(lambda h: h[:, -1]), C),
        (lambda m, x: m.out(m.wide2(x).view(-1, T, 2, C)[:, :, 1]), C),
    ],
    aten.chunk.default: [
        (adaln, C),
        (lambda m, x, c: m.out(modulated(m, x, *[m.wide6(c).chunk(6, dim=1)[2]] * 2)), C),  # one part used twice
        (lambda m, x: m.out(torch.cat(m.make(x).chunk(3, dim=-1), -1)), C),  # parts of 3, 3, 2
    ],
    aten.split.Tensor: [(lambda m, x: m.out(torch.cat(m.make(x).split(3, -1)[::-1], -1)), C)],
    aten.split_with_sizes.default: [(lambda m, x: m.out(m.wide2(x).split([5, C, C - 5], -1)[1]), C)],
    aten.unbind.int: [(fused_attention, C), (through(lambda h: torch.cat(h.unbind(1)[::-1], -1)[..., 1 : C + 1]), C)],
    operator.getitem: [(lambda m, x: m.out(operator.mul(*_silu_first(m.wide2(x).chunk(2, -1)))), C)],
    aten.cat.default: [
        (lambda m, x: m.narrow2(torch.cat([m.make(x), m.make2(x)], -1)), 2 * C),
        (lambda m, x: m.narrow2(torch.cat([m.make(x), F.gelu(m.make2(x))], -1)), C),
        (lambda m, x: m.narrow2(torch.cat([m.make(x)] * 2, -1)), C),
        (lambda m, x: m.out(torch.cat([m.make(x), m.make2(x)], 1)[:, 1 : T + 2]), C),
        (lambda m, x: m.out(torch.cat([m.make(x), m.make2(x)], 0)[: x.shape[0]]), C),
        (lambda m, x: m.out(torch.cat([x.new_zeros(0), m.make(x)], -1)), C),  # an empty one is left out
    ],
    aten.concat.default: [(lambda m, x: m.narrow2(torch.concat([m.make(x), m.make2(x)], -1)), 2 * C)],
    aten.neg.default: [(through(lambda h: -h), C)],
    aten.relu.default: [(through(F.relu), C)],
    aten.leaky_relu.default: [(through(F.leaky_relu), C), (through(lambda h: F.leaky_relu(h, -0.5)), C)],
    aten.dropout.default: [(through(lambda h: F.dropout(h, 0.5, training=False)), C)],
    aten.add.Tensor: [
        (lambda m, x: m.out(m.make(x) + m.make2(x)), C),
        (through(lambda h: 1.5 + h), C),
        (through(lambda h: torch.add(h, 3, alpha=2)), C),
        (lambda m, x: m.out(torch.add(m.make(x), m.make2(x), alpha=-2)), C),
        (lambda m, x, c: m.out(m.make(x) + m.make2(c).unsqueeze(1)), C),
        (lambda m, x: m.out(m.make(x) + m.make2(x)[..., :1]), 1),
        (lambda m, x: m.out(m.make(x) + m.tokens + m.vector), C),
    ],
    aten.sub.Tensor: [
        (lambda m, x: m.out(m.make(x) - m.make2(x)), C),
        (through(lambda h: h - 1.5), C),
    ],
    aten.add.Scalar: [(through(lambda h: aten.add.Scalar(h, 1.5)), C)],
    aten.sub.Scalar: [(through(lambda h: aten.sub.Scalar(h, 1.5)), C)],
    aten.mul.Tensor: [
        (lambda m, x: m.out(F.silu(m.make(x)) * m.make2(x)), C),
        (lambda m, x: m.out(F.gelu(m.make(x)) * m.vector), C),
        (lambda m, x, c: m.out(m.plain(x) * m.make(c).unsqueeze(1)), C),
        (lambda m, x: m.out(x * m.tokens), C),
        (lambda m, x: m.out(m.make(x) * m.make2(x)), C),
        (lambda m, x: m.out(m.make(x) * (m.make2(x) + m.vector) * m.tokens), C),
        (through(lambda h: h * -3.0), C),
        (lambda m, x: m.out(m.make(x) * x.sum(-1, keepdim=True)), C),
        (lambda m, x: m.out(x * m.make(x).view(-1, T * C)[:, :1, None]), 1),
    ],
    aten.mul.Scalar: [(through(lambda h: aten.mul.Scalar(h, 0.5)), C)],
    aten.div.Tensor: [
        (through(lambda h: h / 4.0), C),
        (lambda m, x, c: m.out(m.make(x) / (1 + c.square()).unsqueeze(1)), C),
    ],
    aten.div.Scalar: [(through(lambda h: aten.div.Scalar(h, 4.0)), C)],
    aten.matmul.default: [
        (softmax_attention, C),
        (lambda m, x: m.out(mixing(x) @ m.make(x)), C),
        (lambda m, x: m.out(x @ m.square), C),
        (lambda m, x: m.out((m.make(x).transpose(1, 2) @ mixing(x)).transpose(1, 2)), C),
        (lambda m, x: m.out(m.make(x) @ m.square), C),  # by its columns, or by one number
    ],
    aten.bmm.default: [
        (attention_in_batch, D),
        (lambda m, x: m.out(torch.bmm(mixing(x), m.make(x))), C),
    ],
    aten.scaled_dot_product_attention.default: [
        (fused_attention, C),
        (lambda m, x: m.out(F.scaled_dot_product_attention(m.make(x), m.make2(x), m.no_bias(x))), C),
        (lambda m, x: m.out(merged(F.scaled_dot_product_attention(heads(x), heads(x), heads(m.make(x))))), C),
        (lambda m, x: m.out(merged(F.scaled_dot_product_attention(*few_values(m, x, 2), enable_gqa=True))), 4),
        (lambda m, x: m.out(merged(F.scaled_dot_product_attention(*few_values(m, x, 1), enable_gqa=True))), 2),
    ],
    aten.linear.default: [
        (through(lambda h: h), C),
        (lambda m, x: m.out(m.no_bias(x)), C),
        (lambda m, x, c: m.out(m.make(c)), C),
        (lambda m, x: m.out(F.linear(x, m.square, m.make(x)[0, 0])), C),  # a computed bias
        (lambda m, x: m.out(m.make(x) * F.linear(x, m.vector).unsqueeze(-1)), C),  # a weight that is a vector
    ],
    aten.layer_norm.default: [
        (lambda m, x: m.out(m.norm(x)), C),
        (lambda m, x: m.out(F.layer_norm(x, (C,), m.vector)), C),
        (lambda m, x: m.out(m.plain(x)), C),
        (lambda m, x: m.out(F.layer_norm(x, (C,), bias=m.vector)), C),
        (lambda m, x: m.out(F.layer_norm(x, (T, C))), C),
        (lambda m, x: m.out(F.layer_norm(x, (T, C), m.tokens)), C),
        (lambda m, x: m.by_token(m.plain(x).mT), 1),
        (lambda m, x: m.out(h := m.plain(x)) + m.out2(h + m.make(x)), C),
        (lambda m, x, c: m.out(modulated(m, m.norm(x), *m.wide2(c).chunk(2, -1))), C),
    ],
    aten.rms_norm.default: [
        (lambda m, x: m.out(m.rms(x)), C),
        (lambda m, x: m.out(F.rms_norm(x, (C,))), C),
        (lambda m, x: m.out(F.rms_norm(x, (C,), 1 + m.vector, 1e-3)), C),
        (lambda m, x: m.narrow2(F.rms_norm(m.wide2(x), (2 * C,))), 2 * C),
    ],
    aten.group_norm.default: [
        (lambda m, x: m.out(m.group(x.mT).mT), C),
        (lambda m, x: m.by_token(m.group(x.mT)), 1),  # what absorbs is the same for every token
        (lambda m, x: m.out(F.group_norm(x.mT, HEADS, m.vector).mT), C),
    ],
    aten.conv1d.default: [
        (lambda m, x: m.out(m.conv1(x.mT).mT), C),
        (lambda m, x: m.out(m.depthwise(x.mT).mT), C),
        (lambda m, x: m.out(F.conv1d(x.mT, m.conv1.weight).mT + m.conv1.bias), C),
        (lambda m, x: m.by_token(m.conv1(x.mT)), 1),
        (lambda m, x: m.out(m.conv1(x.mT).mT) + m.conv1.weight.sum(), 0),
    ],
    aten.conv2d.default: [
        (lambda m, x: m.out(m.conv2(x.mT.reshape(-1, C, 2, 2)).flatten(2).mT), C),
        (lambda m, x: m.out(m.conv2(m.make(x).mT.reshape(-1, C, 2, 2)).flatten(2).mT), C),
    ],
    aten.conv3d.default: [(lambda m, x: m.out(m.conv3(x.mT.reshape(-1, C, 1, 2, 2)).flatten(2).mT), C)],
    aten.embedding.default: [
        (lambda m, x: m.out(m.table(labels(x))), C),
        (lambda m, x: m.out(m.make(x) + F.embedding(m.order, m.tokens)), C),
        (lambda m, x: m.by_token(m.table(labels(x)).mT), 1),
        (lambda m, x: m.out(F.embedding(m.order, m.make(x).mean(0))), C),  # a computed table
    ],
    aten.expand_as.default: [
        (lambda m, x: m.out(m.make(x[:, :1]).expand_as(x)), C),
        (lambda m, x: m.out(m.make(x)[..., :1].expand_as(x)), 1),
    ],
    aten.broadcast_to.default: [
        (lambda m, x: m.out(m.make(x[:, :1]).broadcast_to(x.shape)), C),
        (lambda m, x: m.out(m.make(x)[..., :1].broadcast_to(x.shape)), 1),
        (lambda m, x: m.out(m.vector.broadcast_to(x.shape) + m.make(x)), C),
    ],
    aten.pad.default: [
        (lambda m, x: m.out(F.pad(m.make(x)[..., 1:6], (2, 1))), C),  # a zero may be scaled by anything
        (lambda m, x: m.out(F.pad(m.make(x)[..., 1:6], (2, 1), value=1.0)), 5),
        (lambda m, x: m.out(F.pad(m.make(x), (0, 0, 1, 2))), C),
        (lambda m, x: m.out(F.pad(m.make(x), (0, 0, 1, 0), value=1.0)), 0),  # one token's channels are all 1
        (lambda m, x: m.out(m.make(x)) + F.pad(m.make(x), (0, 1), value=1.0)[..., :C], 0),  # a model output
    ],
    aten.constant_pad_nd.default: [
        (lambda m, x: m.out(aten.constant_pad_nd(m.make(x)[..., 1:6], [2, 1])), C),
        (lambda m, x: m.out(aten.constant_pad_nd(m.make(x)[..., 1:6], [2, 1], 1.0)), 5),
    ],
    aten.flip.default: [
        (through(lambda h: h.flip(-1)), C),
        (through(lambda h: h.flip(1)), C),
        (lambda m, x: m.out(m.make(x) + m.make(x).flip(-1)), C // 2),  # channels i and C - 1 - i
    ],
    aten.roll.default: [
        (through(lambda h: h.roll(1, 1)), C),
        (through(lambda h: h.roll((1, -3), (1, 2))), C),
        (lambda m, x: m.out(m.make(x) + m.make(x).roll(2, -1)), 2),  # even and odd channels
    ],
    aten.index.Tensor: [
        (lambda m, x: m.out(m.make(x)[:, m.order]), C),
        (lambda m, x: m.out(m.make(x)[:, m.mask]), C),
        (lambda m, x: m.narrow_half(m.make(x)[..., m.order]), 1),  # whichever they are
        (lambda m, x: m.out(m.make(x)[:, m.order.view(2, 2)].mean(1)), C),
    ],
    aten.index_select.default: [
        (lambda m, x: m.out(m.make(x).index_select(1, m.order)), C),
        (lambda m, x: m.narrow_half(m.make(x).index_select(-1, m.order)), 1),
    ],
    aten.lift_fresh_copy.default: [
        (lambda m, x: m.out(m.make(x) + torch.tensor([0.5, -2.0] * (C // 2), dtype=x.dtype)), C),
        (lambda m, x: m.out(m.make(x) + torch.tensor(0.5, dtype=x.dtype)), 1),
    ],
    aten.masked_fill.Scalar: [(lambda m, x: m.out(m.make(x).masked_fill(x > 0, 0.0)), C)],
    aten.where.self: [
        (lambda m, x: m.out(torch.where(x > 0, m.make(x), m.make2(x))), C),
        (lambda m, x: m.out(torch.where(m.mask[:, None], m.make(x), m.vector)), C),
        (lambda m, x: m.out(torch.where(x > 0, m.make(x), x)), 0),
    ],
    aten.where.ScalarOther: [
        (lambda m, x: m.out(torch.where(x > 0, m.make(x), 0.0)), C),
        (lambda m, x: m.out(torch.where(x > 0, m.make(x), 1.0)), 0),
    ],
    aten.mean.dim: [
        (through(lambda h: h.mean(1)), C),
        (through(lambda h: h.mean((0, 1), keepdim=True)), C),
        (lambda m, x: m.out(m.make(x).mean(-1, keepdim=True).expand(-1, -1, C)), 1),
    ],
    aten.sum.dim_IntList: [
        (through(lambda h: h.sum(1, keepdim=True)), C),
        (lambda m, x: m.narrow_half(split_heads(m.make(x)).sum(2)), D),
        (lambda m, x: m.out(m.make(x) * m.tokens.sum(-1, keepdim=True)), C),
    ],
    aten.mm.default: [
        (lambda m, x: m.out(torch.mm(x[:, 0], m.square)), C),
        (lambda m, x: m.out(torch.mm(m.square, m.make(x[:, 0]).t()).t()), C),  # the left factor's rows
    ],
    aten.movedim.int: [(through(lambda h: split_heads(h).movedim(-1, 1).movedim(1, 3).flatten(2)), C)],
    aten.movedim.intlist: [
        (through(lambda h: split_heads(h).movedim((3, 1), (0, 2)).movedim((2, 0), (1, 3)).flatten(2)), C),
    ],
    aten.swapaxes.default: [(through(lambda h: h.swapaxes(1, 2).swapaxes(-1, -2)), C)],
    aten.narrow.default: [
        (lambda m, x: m.narrow_half(m.make(x).narrow(-1, 2, D)), D),
        (lambda m, x: m.narrow_half(m.make(x).narrow(-1, -D, D)), D),
        (lambda m, x: m.out(torch.cat([m.make(x).narrow(-1, 0, 3), m.make2(x).narrow(-1, 3, 5)], -1)), C),
    ],
    aten.repeat.default: [
        (through(lambda h: h.repeat(1, 2, 1)), C),
        (through(lambda h: h.repeat(1, 1, 1, 1)[0]), C),
        (lambda m, x: m.narrow2(m.make(x).repeat(1, 1, 2)), C),
        (lambda m, x: m.out(m.make(x)[..., :1].repeat(1, 1, C)), 1),
        (lambda m, x: m.out(m.make(x) + m.vector[None, None].repeat(x.shape[0], T, 1)), C),
    ],
    aten.repeat_interleave.self_int: [
        (through(lambda h: h.repeat_interleave(2, dim=1)), C),
        (lambda m, x: m.out(m.make(x)[..., :D].view(-1, T, 2, 2).repeat_interleave(2, dim=2).flatten(2)), D),
        (lambda m, x: m.out(merged(F.scaled_dot_product_attention(*repeated_values(m, x)))), D),
        (lambda m, x: m.narrow2(m.make(x).repeat_interleave(2, -1) + F.pad(m.make2(x), (0, C))), C),
    ],
    aten.view_as.default: [(through(lambda h: split_heads(h).view_as(h)), C)],
    aten.reshape_as.default: [
        (lambda m, x: m.out(split_heads(m.make(x)).transpose(2, 3).reshape_as(x)), C),
        (lambda m, x: m.out(m.make(x).mT.reshape_as(x)), 2),  # even and odd channels
    ],
    aten.stack.default: [
        (lambda m, x: m.narrow2(torch.stack([m.make(x), m.make2(x)], 2).flatten(2)), 2 * C),
        (lambda m, x: m.narrow2(torch.stack([m.make(x), F.gelu(m.make2(x))], -1).flatten(2)), C),
        (lambda m, x: m.out(torch.stack([m.make(x), m.make2(x)]).mean(0)), C),
        (lambda m, x: m.narrow2(torch.stack([m.make(x)] * 2, -1).flatten(2)), C),
    ],
    aten.einsum.default: [
        (lambda m, x: m.out(torch.einsum("bhqk,bkhd->bqhd", mixing(heads(x)), split_heads(m.make(x))).flatten(2)), C),
        (lambda m, x: m.out(merged(torch.einsum("bhqk, bhkd -> bhqd", mixing(heads(x)), heads(m.make(x))))), C),
        (lambda m, x: m.out(torch.einsum("btc,cd->btd", x, m.square)), C),  # a parameter absorbs as a linear's does
        (lambda m, x: m.out(torch.einsum("btc->bct", m.make(x)).mT), C),
        (lambda m, x: m.out(torch.einsum("btc,btc->btc", F.silu(m.make(x)), m.make2(x))), C),
        (lambda m, x: m.out(torch.einsum("btc,bc->btc", F.silu(m.make(x)), m.make2(x[:, 0]))), C),
        (lambda m, x: m.narrow_half(torch.einsum("bthd->btd", split_heads(m.make(x)))), D),
        (lambda m, x: m.out(torch.einsum("bt,c->btc", x[..., 0], m.vector)), C),
        (lambda m, x: m.out(m.make(x) * torch.einsum("btc->", x)), C),
        (lambda m, x: m.out(torch.einsum("btc,dc->btd", m.make(x), m.square)), C),  # by square, not by make
    ],
}


def _silu_first(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return F.silu(pair[0]), pair[1]


def inputs(batch: int, body: Body, seed: int = 0) -> tuple[Tensor, ...]:
    """As many of (x, c) as the body reads."""
    generator = torch.Generator().manual_seed(seed)
    x, c = torch.randn(batch, T, C, generator=generator).double(), torch.randn(batch, C, generator=generator).double()
    return (x, c)[: len(inspect.signature(body).parameters) - 1]


def build(body: Body) -> Net:
    net = Net(body).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return net


def exported(body: Body, dynamic: Sequence[AxisKind] | None = ("batch",)) -> GraphModule:
    return export_transformer(build(body), inputs(2, body), dynamic=dynamic)


def site_of(sites: list[Site], *layers: str) -> Site:
    (site,) = [site for site in sites if {c.layer for c in site.consumers} & set(layers)]
    return site


def fold_everything(model: GraphModule, sites: list[Site]) -> None:
    """b = exp(U(-7, 7)): three decades to either side."""
    generator = torch.Generator().manual_seed(2)
    for site in sites:
        if site.refusal is None:
            b = (14 * torch.rand(site.num_variables, generator=generator, dtype=torch.float64) - 7).exp()
            insert_balance(model, site, b)
            fold_balance(model, site, b)
    model.graph.lint()
    model.recompile()


def assert_fold_preserves(body: Body, sites: list[Site], model: GraphModule) -> None:
    other = free_sizes(model).other()[0]
    samples = [inputs(2, body), inputs(5, body, seed=3)]
    samples += [tuple(map(resized, samples[0], input_specs(model), [other] * 2))]
    before = [model(*sample) for sample in samples]
    fold_everything(model, sites)
    for sample, expected in zip(samples, before, strict=True):
        assert expected.isfinite().all()
        assert not expected.numel() or (model(*sample) - expected).abs().max() <= 1e-12 * expected.abs().max()


PARAMETERS = [
    pytest.param(op, body, free, id=f"{op}-{i}")
    for op, bodies in CASES.items()
    for i, (body, free) in enumerate(bodies)
]


def test_every_rule_has_a_case():
    missing = sorted(str(op) for op in set(RULES) - set(CASES))
    assert not missing, f"add a body to CASES for {', '.join(missing)}"
    assert not set(CASES) - set(RULES)


def test_an_op_has_one_rule():
    before = dict(RULES)
    with pytest.raises(ArgumentError, match=r"aten\.neg\.default has a rule already, homogeneous; change that one"):
        rule(aten.cumsum.default, aten.neg.default)(lambda p, node: None)
    assert before == RULES


@pytest.mark.parametrize(("op", "body", "free"), PARAMETERS)
def test_rule_with_any_number_of_tokens(op, body, free):
    model = exported(body, dynamic=None)
    sites = find_sites(model, policy=ANY)
    assert site_of(sites, "out", "narrow2", "narrow_half", "by_token").num_variables <= free
    assert_fold_preserves(body, sites, model)


@pytest.mark.parametrize(("op", "body", "free"), PARAMETERS)
def test_rule(op, body, free):
    model = exported(body)
    assert op in {node.target for node in model.graph.nodes}
    sites = find_sites(model, policy=ANY)
    site = site_of(sites, "out", "narrow2", "narrow_half", "by_token")
    assert site.num_variables == free, site.refusal
    assert (site.refusal is None) == (free > 0)
    assert_fold_preserves(body, sites, model)


# Refusals

COMMUTE = "does not commute with a scale per channel"

REFUSALS: dict[str, tuple[Body, str]] = {
    "the model's input": (lambda m, x: m.out(x), f"x: a model input {COMMUTE}"),
    "the model's output": (lambda m, x: torch.cat([m.out(h := m.make(x)), h], -1), f"a model output {COMMUTE}"),
    "gelu": (through(F.gelu), f"gelu {COMMUTE}"),
    "softmax": (through(lambda h: h.softmax(-1)), f"softmax {COMMUTE}"),
    "GroupNorm without weight": (
        lambda m, x: m.out(F.group_norm(x.mT, HEADS).mT),
        "a group norm without a weight has no place for a scale",
    ),
    "GroupNorm with a bias only": (
        lambda m, x: m.out(m.make(x) + m.vector) + F.group_norm(x.mT, HEADS, None, m.vector).mT,
        "a group norm without a weight has no place for a scale",
    ),
    "input of a norm": (through(lambda h: h + F.layer_norm(h, (C,))), "a norm undoes the scale of its input"),
    "residual of the input": (lambda m, x: m.out(m.make(x) + x), f"x: a model input {COMMUTE}"),
    "square": (through(lambda h: h * h), "a square does not commute with a scale"),
    "both factors": (through(lambda h: h * h.neg()), "only one factor of a product may carry a scale"),
    "both factors, from one linear": (
        through(lambda h: F.relu(h) * (h + 1)),
        "only one factor of a product may carry a scale",
    ),
    "divisor": (through(lambda h: h / (1 + F.relu(h))), "a divisor would need the inverse scale"),
    "number over a tensor": (through(lambda h: 1 / h), f"reciprocal {COMMUTE}"),
    "number minus a tensor": (through(lambda h: 1 - h), f"rsub {COMMUTE}"),
    "both matrices": (through(lambda h: (h @ h.transpose(1, 2)) @ h), "only one factor of a matrix product"),
    "inner axis": (lambda m, x: m.out(h := m.make(x)) + h @ m.square, "only one factor of a matrix product"),
    "queries": (
        lambda m, x: m.out(h := m.make(x)) + F.scaled_dot_product_attention(h, x, x),
        "queries and keys pass through a softmax",
    ),
    "values that are keys": (
        through(lambda h: F.scaled_dot_product_attention(h, h, h)),
        "queries and keys pass through a softmax",
    ),
    "attention mask": (
        lambda m, x: m.narrow_half(h := m.make(x)[..., :T]) + F.scaled_dot_product_attention(x, x, x, attn_mask=h),
        "an attention mask passes through a softmax",
    ),
    "grouped keys that are values": (
        lambda m, x: m.out(
            merged(F.scaled_dot_product_attention(heads(x), *[m.make(x)[:, None, :, :D]] * 2, enable_gqa=True))
        ),
        "queries and keys pass through a softmax",
    ),
    "computed weight": (
        lambda m, x: m.out(h := m.make(x)) + F.linear(h, m.square * x.mean()),
        "the weight is computed, not a parameter",
    ),
    "bias beside a computed weight": (
        lambda m, x: m.out(m.make(x) + m.vector) + F.linear(x, m.square * x.mean(), m.vector),
        "the weight is computed, not a parameter",
    ),
    "input of a linear whose weight is a vector": (
        lambda m, x: m.out(h := m.make(x)) + F.linear(h, m.vector).unsqueeze(-1),
        "the weight is a vector",
    ),
    "input of a convolution": (lambda m, x: m.out(h := m.make(x)) + m.conv1(h.mT).mT, "a convolution reads it"),
    "bias beside a computed kernel": (
        lambda m, x: m.out(m.make(x) + m.vector) + F.conv1d(x.mT, m.conv1.weight * x.mean(), m.vector).mT,
        "the weight is computed, not a parameter",
    ),
    "convolution without a batch": (lambda m, x: m.out(m.conv1(x[0].mT).mT) + x, "there is no batch"),
    "convolution with padding by name": (
        lambda m, x: m.out(F.conv1d(x.mT, m.conv1.weight, padding="same").mT),
        rf"conv1d {COMMUTE}",
    ),
    "output layer tied to an embedding": (
        lambda m, x: m.out(h := m.make(x)) + F.linear(h, m.table.weight) + m.table(labels(x)),
        "its weight is also read by another kind of op",
    ),
    "padded tokens of ones": (lambda m, x: m.out(F.pad(m.make(x), (0, 0, 1, 0), value=1.0)), "no channel is free"),
    "negative padding": (lambda m, x: m.narrow_half(F.pad(m.make(x), (-2, -2))), f"pad {COMMUTE}"),
    "reflected padding": (lambda m, x: m.out(F.pad(m.make(x)[..., 1:-1], (1, 1), mode="reflect")), f"pad.* {COMMUTE}"),
    "repeated letter": (
        lambda m, x: m.out(torch.einsum("btcc->btc", m.make(x).unsqueeze(-1) * m.square)),
        f"einsum {COMMUTE}",
    ),
    "ellipsis": (lambda m, x: m.out(torch.einsum("...c,cd->...d", x, m.square)), f"einsum {COMMUTE}"),
    "einsum of three": (
        lambda m, x: m.out(torch.einsum("btc,cd,de->bte", x, m.square, m.square)),
        f"einsum {COMMUTE}",
    ),
    "both operands of an einsum": (
        lambda m, x: m.out(h := m.make(x)) + torch.einsum("btc,bsc->bt", h, h).unsqueeze(-1),
        "only one factor of a product may carry a scale",
    ),
    "index on two axes": (lambda m, x: m.narrow_half(m.make(x)[:, m.order, m.order]), rf"index\S* {COMMUTE}"),
    "roll of all elements": (through(lambda h: h.roll(1)), f"roll {COMMUTE}"),
    "repeat of all elements": (
        through(lambda h: h.repeat_interleave(2).view(-1, T, C)),
        f"repeat_interleave {COMMUTE}",
    ),
    "masked with ones": (lambda m, x: m.out(m.make(x).masked_fill(x > 0, 1.0)), f"masked_fill {COMMUTE}"),
    "inner axis of mm": (
        lambda m, x: m.out(h := m.make(x[:, 0])) + torch.mm(h, m.square),
        "only one factor of a matrix product",
    ),
    "a scaled condition": (lambda m, x: m.out(torch.where((h := m.make(x)) > 0, h, 0.0)), f"gt {COMMUTE}"),
    "weight of the consumer read by another op": (
        lambda m, x: m.out(m.make(x)) * m.out.weight.sum(),
        "its weight is also read by another kind of op",
    ),
    "weight of the producer read by another op": (
        lambda m, x: m.out(m.make(x)) * m.make.weight.sum(),
        f"sum {COMMUTE}",
    ),
    "integers": (through(lambda h: h.to(torch.int64).to(torch.float64)), "torch.int64"),
    "in place": (through(lambda h: h.view_as(h).exp_()), f"exp_ {COMMUTE}"),
    "written through a view": (through(lambda h: _written(h.clone())), f"fill_ {COMMUTE}"),
    "an op with several results": (lambda m, x: m.out(m.wide2(x).topk(C, -1).values), rf"topk\S* {COMMUTE}"),
    "ones like a scaled tensor": (through(lambda h: h + torch.ones_like(h)), "ones_like"),
}


def _written(h: Tensor) -> Tensor:
    h.view(-1, C).fill_(2.0)
    return h


@pytest.mark.parametrize(("body", "why"), REFUSALS.values(), ids=REFUSALS)
def test_refusal(body, why):
    model = exported(body)
    sites = find_sites(model, policy=ANY)
    site = site_of(sites, "out", "narrow_half")
    assert site.num_variables == 0
    assert re.search(why, site.refusal), site.refusal
    assert not any(consumer.variables.any() for consumer in site.consumers)
    assert not (site.parameters or site.scalars or site.norms or site.cuts)
    assert_fold_preserves(body, sites, model)


def test_a_norm_over_any_number_of_tokens_has_no_place_for_a_scale():
    def body(m: Net, x: Tensor) -> Tensor:
        return m.out(F.layer_norm(x, tuple(x.shape[1:])))

    model = exported(body, dynamic=None)
    sites = find_sites(model, policy=ANY)
    assert "a size that differs from call to call" in site_of(sites, "out").refusal
    assert_fold_preserves(body, sites, model)
    assert site_of(find_sites(exported(body), policy=ANY), "out").refusal is None


# One tensor, many readers


def layers(site: Site) -> list[str]:
    return [consumer.layer for consumer in site.consumers]


def edited(site: Site) -> set[str]:
    return {path for edit in site.parameters for path in edit.paths}


def solved(body: Body, *names: str, policy: SitePolicy = ANY) -> Site:
    """The site of some layers, after checking that folding every site preserves the function."""
    model = exported(body)
    sites = find_sites(model, policy=policy)
    assert_fold_preserves(body, sites, model)
    return site_of(sites, *names)


def test_two_linears_that_read_one_tensor_are_one_site():
    site = solved(lambda m, x: m.out(h := m.make(x)) + m.out2(h), "out")
    assert layers(site) == ["out", "out2"]
    assert site.name == "{out,out2}"
    assert list(site.inputs) == ["out"]
    assert site.num_variables == C


def test_one_reader_that_cannot_cope_refuses_all_of_them():
    site = solved(lambda m, x: m.out(h := m.make(x)) + m.out2(h) + F.gelu(h), "out")
    assert layers(site) == ["out", "out2"]
    assert re.search("gelu", site.refusal)


def test_a_residual_sum_scales_every_term():
    site = solved(lambda m, x: m.out(m.make(x) + (h := m.make2(x)) + m.no_bias(F.gelu(h + m.vector))), "out")
    assert site.refusal is not None  # make2 is also read by gelu
    site = solved(lambda m, x: m.out(m.make(x) + m.make2(x) + m.no_bias(F.gelu(x)) + m.vector), "out")
    assert edited(site) == {"make.weight", "make.bias", "make2.weight", "make2.bias", "no_bias.weight", "vector"}


def test_a_residual_stream_ties_every_linear_that_reads_it():
    def body(m: Net, x: Tensor) -> Tensor:
        h = m.make(x)
        h = h + m.make2(F.gelu(m.out(h)))
        return m.out2(h)

    assert re.search("2 linears, up to out2, would share one scale", solved(body, "out").refusal)
    site = solved(body, "out", policy=COUPLED)
    assert layers(site) == ["out", "out2"]
    assert site.couples_blocks
    assert len(site.inputs) == 2
    assert edited(site) == {"make.weight", "make.bias", "make2.weight", "make2.bias"}


def test_a_layer_called_twice_is_one_site_with_two_inputs():
    site = solved(lambda m, x: m.out(m.make(x)) * m.out(m.make2(x)), "out")
    assert layers(site) == ["out", "out"]
    assert list(site.inputs) == ["out", "out#2"]
    assert site.name == "out"
    assert edited(site) == {"make.weight", "make.bias", "make2.weight", "make2.bias"}


def test_a_layer_called_twice_is_refused_if_one_call_cannot_be_scaled():
    def body(m: Net, x: Tensor) -> Tensor:
        return m.out(m.make(x)) * m.out(x)

    model = exported(body)
    sites = [site for site in find_sites(model, policy=ANY) if "out" in layers(site)]
    assert len(sites) == 2  # one for either input
    assert all(re.search("a model input", site.refusal) for site in sites)
    assert_fold_preserves(body, sites, model)


def test_a_producer_called_twice_scales_both_results():
    site = solved(lambda m, x: m.out(m.make(x)) * m.out2(m.make(F.gelu(x))), "out")
    assert layers(site) == ["out", "out2"]
    site = solved(lambda m, x: m.out(m.make(x)) * F.gelu(m.make(F.gelu(x))), "out")
    assert re.search("gelu", site.refusal)


def test_two_layers_that_share_a_weight_share_a_scale():
    def tied(m: Net, x: Tensor) -> Tensor:
        return m.out(m.make(x)) * m.out2(m.make2(x))

    net = build(tied)
    net.out2.weight = net.out.weight
    net.make2.bias = net.make.bias
    model = export_transformer(net, inputs(2, tied))
    sites = find_sites(model)
    site = site_of(sites, "out", "out2")
    assert len(site.consumers) == len(site.inputs) == 2
    assert {"make.weight", "make2.weight"} < edited(site)
    assert_fold_preserves(tied, sites, model)


def test_one_chunk_of_six_used_twice_is_edited_once():
    def body(m: Net, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, shift2, *_ = m.wide6(c).chunk(6, dim=1)
        return m.out(modulated(m, x, shift, scale)) + m.out2(modulated(m, m.make(x), shift2, scale))

    site = solved(body, "out")
    assert layers(site) == ["out", "out2"]  # scale ties them
    assert edited(site) == {"wide6.weight", "wide6.bias"}
    (bias,) = [edit.variables for edit in site.parameters if edit.paths == ("wide6.bias",)]
    variables = list(range(1, C + 1))
    assert bias.tolist() == [*variables, *variables, *variables, *[0] * (3 * C)]
    assert len(site.scalars) == 2


def test_fused_attention_scales_the_rows_of_v_only():
    site = solved(fused_attention, "out")
    (weight,) = [edit.variables for edit in site.parameters if edit.paths == ("wide3.weight",)]
    assert weight.shape == (3 * C, 1)
    assert weight[:, 0].tolist() == [*[0] * (2 * C), *range(1, C + 1)]


def test_attention_by_softmax_and_matmul_is_read_as_the_fused_op_is():
    (fused, unfused) = (solved(body, "out") for body in (fused_attention, softmax_attention))
    for a, b in zip(fused.parameters, unfused.parameters, strict=True):
        assert a.paths == b.paths
        assert a.variables.tolist() == b.variables.tolist()


def test_joint_attention_ties_both_output_projections():
    def body(m: Net, x: Tensor, c: Tensor) -> Tensor:
        text = c.unsqueeze(1).expand(-1, T, -1)
        v = torch.cat([m.make(x), m.make2(text)], 1)
        both = torch.cat([x, text], 1)
        image, prompt = F.scaled_dot_product_attention(both, both, v).split([T, T], 1)
        return m.out(image) + m.out2(prompt)

    site = solved(body, "out")
    assert layers(site) == ["out", "out2"]
    assert site.num_variables == C
    assert edited(site) == {"make.weight", "make.bias", "make2.weight", "make2.bias"}


def test_channels_that_cannot_be_scaled_leave_the_others_free():
    site = solved(lambda m, x: m.narrow2(torch.cat([F.gelu(m.make(x)), m.make2(x)], -1)), "narrow2")
    assert site.consumers[0].variables.tolist() == [*[0] * C, *range(1, C + 1)]


def test_a_product_tries_its_other_factor():
    # The smaller factor comes first, but only the larger one has somewhere to put the scale.
    site = solved(lambda m, x, c: m.out(m.make(x) * F.gelu(c).unsqueeze(1)), "out")
    assert edited(site) == {"make.weight", "make.bias"}
    assert site.num_variables == C


def test_a_linear_belongs_to_one_site_though_another_could_reach_it():
    def body(m: Net, x: Tensor) -> Tensor:
        h = m.norm(x)  # its scale would pass the product as one number, which `out` could undo
        return m.out(h.mT @ m.tokens).mean(1, keepdim=True) + m.out2(h)

    model = exported(body)
    one, two = find_sites(model, policy=ANY)
    assert (layers(one), one.num_variables, edited(one)) == (["out"], C, {"tokens"})
    assert layers(two) == ["out2"]
    assert re.search("out is balanced by another site", two.refusal)
    assert_fold_preserves(body, [one, two], model)


def test_a_scale_that_is_one_number_covers_all_channels_of_a_consumer():
    site = solved(lambda m, x: m.out(m.make(x).mean(-1, keepdim=True) * x), "out")
    assert site.consumers[0].variables.tolist() == [1] * C


# What a fold may cost, and whom it may tie


def test_a_norm_without_a_weight_is_given_one_per_site():
    site = solved(lambda m, x: m.out(m.plain(x)) + m.out2(m.plain(m.make(x))), "out")
    assert site.kind == "offline"
    assert (len(site.norms), site.parameters, site.scalars, site.cuts) == (1, (), (), ())
    assert site.norms[0].variables.tolist() == list(range(1, C + 1))


def adaln_single(m: Net, x: Tensor, c: Tensor) -> Tensor:
    """One modulation for two blocks in sequence."""
    shift, scale, gate, *_ = m.wide6(F.silu(c)).chunk(6, dim=1)
    for out in (m.out, m.out2):
        x = x + gate.unsqueeze(1) * out(modulated(m, x, shift, scale))
    return x


@pytest.mark.parametrize("couple_blocks", [False, True])
def test_one_modulation_for_all_blocks_is_multiplied_where_it_is_read(couple_blocks):
    policy = SitePolicy(couple_blocks=couple_blocks)
    for name in ("out", "out2"):
        site = solved(adaln_single, name, policy=policy)
        assert (layers(site), site.kind, site.num_variables) == ([name], "vector multiply", C)
        assert not site.couples_blocks
        assert (len(site.norms), len(site.cuts)) == (1, 1)  # the norm takes the scale, only the shift is cut
        assert not site.parameters and not site.scalars


def test_one_modulation_for_all_blocks_without_vector_multiplies_is_refused_or_couples():
    site = solved(adaln_single, "out", policy=SitePolicy(vector_multiply=False))
    assert site.kind == "refused"
    assert re.search("2 linears, up to out2, would share one scale; couple_blocks allows that", site.refusal)
    site = solved(adaln_single, "out", policy=SitePolicy(vector_multiply=False, couple_blocks=True))
    assert (layers(site), site.kind, site.num_variables) == (["out", "out2"], "offline", C)
    assert site.couples_blocks
    assert edited(site) == {"wide6.weight", "wide6.bias"}


def test_modulation_of_one_block_costs_nothing():
    assert solved(adaln, "out").kind == "offline"


class TwoBlocks(nn.Module):
    """Two ``blocks`` that read one projected condition."""

    def __init__(self) -> None:
        super().__init__()
        self.caption = nn.Linear(C, C)
        self.blocks = nn.ModuleList([nn.Linear(C, C), nn.Linear(C, C)])

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        caption = self.caption(c)
        return x + sum(block(caption) for block in self.blocks).unsqueeze(1)


@pytest.mark.parametrize("vector_multiply", [False, True])
@pytest.mark.parametrize("couple_blocks", [False, True])
def test_two_blocks_that_read_one_condition_share_a_scale_only_if_they_may(couple_blocks, vector_multiply):
    model = export_transformer(TwoBlocks().double().eval(), inputs(2, adaln))
    sites = find_sites(model, policy=SitePolicy(couple_blocks=couple_blocks, vector_multiply=vector_multiply))
    site = site_of(sites, "blocks.0", "blocks.1")
    assert layers(site) == ["blocks.0", "blocks.1"]
    assert site.kind == ("offline" if couple_blocks else "refused")
    assert couple_blocks or re.search("up to blocks.1, would share one scale", site.refusal)
    assert_fold_preserves(adaln, sites, model)


def test_fewer_free_scales_than_the_policy_asks_are_refused():
    body = lambda m, x: m.out(m.make(x)[..., :2].repeat(1, 1, D))  # noqa: E731
    assert solved(body, "out", policy=SitePolicy(min_variables=2)).num_variables == 2
    refusal = solved(body, "out", policy=SitePolicy(min_variables=3)).refusal
    assert re.search("only 2 of 8 channels could differ in scale; min_variables is 3", refusal)


def test_a_parameter_without_axes_keeps_its_shape():
    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain, self.out = nn.Parameter(torch.tensor(0.7)), nn.Linear(C, C)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(x * self.gain)

    model = export_transformer(Gain().double().eval(), inputs(2, through(F.relu)))
    sites = find_sites(model, policy=ANY)
    assert sites[0].num_variables == 1
    assert_fold_preserves(through(F.relu), sites, model)
    assert model.gain.shape == ()


def test_users_that_read_a_shape_do_not_refuse():
    site = solved(lambda m, x: m.out(h := m.make(x)) + torch.zeros_like(h) * h.shape[1], "out")
    assert site.refusal is None
    assert {aten.zeros_like.default, aten.sym_size.int} <= IGNORED


@pytest.mark.parametrize(
    "f",
    [
        pytest.param(lambda h: h * h.shape[0], id="mul"),
        pytest.param(lambda h: h + h.shape[0], id="add"),
        pytest.param(lambda h: h / h.shape[0], id="div"),
    ],
)
def test_arithmetic_with_the_batch_size_is_exact(f):
    solved(through(f), "out")


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(lambda m, x: m.narrow_half(m.make(x)[:, :T] @ m.vector), id="vector on the right"),
        pytest.param(lambda m, x: m.out(m.vector @ m.square + m.make(x)), id="vector on the left"),
        pytest.param(lambda m, x: m.out(m.vector[:T] @ m.make(x)), id="vector times tokens"),
    ],
)
def test_a_matrix_times_a_vector_is_exact(body):
    solved(body, "out", "narrow_half")


def test_alpha_of_a_scalar_sum_survives_the_fold():
    solved(through(lambda h: aten.add.Scalar(h, 1.5, 2)), "out")


def test_only_starts_from_the_named_linears():
    model = exported(lambda m, x: m.out(m.make(x)) + m.out2(m.make2(x)))
    consumer = next(c.node for site in find_sites(model) for c in site.consumers if c.layer == "out2")
    (site,) = find_sites(model, [consumer])
    assert layers(site) == ["out2"]


def test_sites_come_in_execution_order_and_cover_every_linear_once():
    model = exported(adaln)
    found = [name for site in find_sites(model) for name in layers(site)]
    assert found == ["wide6", "out"]
