"""Random small networks, as programs over the ops that scale propagation reads.

A program is a list of steps, each an op and a few numbers that choose its operands and sizes; a step that fits no
tensor at hand does nothing, so every list is a program and hypothesis can shrink it. Axis 0 is the batch wherever a
tensor has one. The operands are chosen in a first call, so that later calls take the same at any size: the number of
tokens and the length of the text are free unless a layer depends on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

C, T, TEXT = 8, 3, 5
MAX_SIZE = 600
"""Elements per sample; larger results are dropped."""

Step = tuple[str, tuple[int, ...]]
Made = TypeVar("Made", nn.Module, Tensor)
Choice = TypeVar("Choice")


@dataclass
class Item:
    tensor: Tensor
    batched: bool = True
    used: bool = False

    @property
    def sizes(self) -> tuple[int, ...]:
        """Without the batch."""
        return tuple(self.tensor.shape[self.batched :])


class SkipError(Exception):
    """The step fits nothing."""


class Run:
    """One pass over a program: the tensors made so far, and the numbers of the current step."""

    def __init__(self, net: RandomNet, x: Tensor, c: Tensor, text: Tensor) -> None:
        self.net, self.x = net, x
        self.pool = [Item(text), Item(x), Item(c)]
        self.linears: list[nn.Linear] = []
        self.count = 0
        self.numbers: Iterator[int] = iter(())
        self.earlier: Iterator[Any] | None = iter(net.choices) if net.choices else None

    def chosen(self, choose: Callable[[], Choice]) -> Choice:
        """What ``choose`` gave at this place of the program in the first call."""
        if self.earlier is not None:
            return next(self.earlier)
        self.net.choices.append(choose())
        return self.net.choices[-1]

    def pick(self, n: int) -> int:
        return next(self.numbers, 0) % n

    def take(self, fits: Callable[[Item], bool] = lambda item: True) -> Item:
        """A tensor with a batch, of late ones sooner."""
        number = next(self.numbers, 0)

        def choose() -> int | None:
            found = [i for i, item in reversed(list(enumerate(self.pool))) if item.batched and fits(item)]
            return found[number % len(found)] if found else None

        if (place := self.chosen(choose)) is None:
            raise SkipError
        self.pool[place].used = True
        return self.pool[place]

    def one_of(self, *makers: Callable[[], Tensor]) -> Tensor:
        return makers[self.pick(len(makers))]()

    def tokens(self, ndim: int = 3) -> Tensor:
        return self.take(lambda item: item.tensor.dim() == ndim).tensor

    def axis(self, h: Tensor) -> int:
        """Any axis but the batch, the last one first."""
        return h.dim() - 1 - self.pick(h.dim() - 1)

    def made(self, make: Callable[[], Made]) -> Made:
        """What ``make`` gave for this place of the program in the first pass; later passes find it again."""
        self.count += 1
        owner, name = self.net.blocks[min(self.count // 6, 7)], f"layer{self.count}"
        if not hasattr(owner, name):
            value = make()
            if isinstance(value, Tensor) and not value.is_floating_point():
                owner.register_buffer(name, value)
            else:
                setattr(owner, name, nn.Parameter(value) if isinstance(value, Tensor) else value.double())
        return getattr(owner, name)

    def parameter(self, *shape: int) -> Tensor:
        return self.made(lambda: torch.randn(shape, dtype=torch.float64) * 0.5)

    def linear(self, h: Tensor, width: int, bias: bool = True) -> Tensor:
        layer = self.made(lambda: nn.Linear(h.shape[-1], width, bias=bias))
        self.linears.append(layer)
        return layer(h)


class RandomNet(nn.Module):
    """Runs a program on tokens (N, T, C), a condition (N, C) and text (N, TEXT, C).

    Loose ends go through a linear each.
    """

    def __init__(self, program: list[Step]) -> None:
        super().__init__()
        self.program = program
        self.blocks = nn.ModuleList(nn.Module() for _ in range(8))
        self.choices: list[Any] = []
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            self(*inputs(2))
        self.eval()

    def forward(self, x: Tensor, c: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        run = Run(self, x, c, text)
        for name, numbers in self.program:
            run.numbers = iter(numbers)
            try:
                results = OPS[name](run)
            except SkipError:
                continue
            for result in [results] if isinstance(results, Tensor) else results:
                item = Item(result)
                if run.chosen(lambda item=item: torch.Size(item.sizes).numel() <= MAX_SIZE):
                    run.pool.append(item)
        loose = [item.tensor for item in run.pool if item.batched and not item.used and item.tensor.dim() > 1]
        return tuple(run.linear(h, 2) for h in loose) or (run.linear(x, 2),)


def inputs(batch: int = 2, seed: int = 0, *, tokens: int = T, text: int = TEXT) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((tokens, C), (C,), (text, C))
    return tuple(torch.randn(batch, *shape, generator=generator, dtype=torch.float64) for shape in shapes)


def programs(max_size: int = 12) -> st.SearchStrategy[list[Step]]:
    numbers = st.tuples(*[st.integers(0, 11)] * 4)
    names = [*sorted(OPS), "linear", "modulation", "two_readers"]
    return st.lists(st.tuples(st.sampled_from(names), numbers), min_size=4, max_size=max_size)


Result = Tensor | list[Tensor]
OPS: dict[str, Callable[[Run], Result]] = {}


def op(function: Callable[[Run], Result]) -> Callable[[Run], Result]:
    OPS[function.__name__.strip("_")] = function
    return function


# -- layers ------------------------------------------------------------------------------------------------------------


@op
def linear(run: Run) -> Result:
    h = run.take().tensor
    return run.linear(h, (C, C, 2 * C, 3 * C)[run.pick(4)], bias=run.pick(4) != 3)


@op
def linear_of_input(run: Run) -> Result:
    return run.linear(run.x, (C, C, 2 * C, 3 * C)[run.pick(4)])


@op
def two_readers(run: Run) -> Result:
    """A linear, and something else that reads the same: often what forbids a scale."""
    h = run.take(lambda item: item.sizes != () and item.sizes[-1] > 1).tensor
    width = h.shape[-1]
    other = run.one_of(
        lambda: run.linear(h, 2 * C),
        lambda: F.layer_norm(h, (width,), run.parameter(width), run.parameter(width)),
        lambda: F.rms_norm(h, (width,)),
        lambda: h @ run.parameter(width, C),
        lambda: F.linear(h, run.parameter(C, width) * run.x.mean(), run.parameter(C)),
        lambda: torch.einsum("nc,nc->n", h.flatten(1), h.flatten(1)).unsqueeze(-1),
        lambda: F.scaled_dot_product_attention(h, h, run.linear(h, C)) if h.dim() > 2 else F.gelu(h),
    )
    return [run.linear(h, C), other]


@op
def again(run: Run) -> Result:
    """A layer that was called before, or its weight with another bias."""
    widths = {layer.in_features for layer in run.linears}
    h = run.take(lambda item: item.sizes[-1:] != () and item.sizes[-1] in widths).tensor
    fitting = [layer for layer in run.linears if layer.in_features == h.shape[-1]]
    layer = fitting[run.pick(len(fitting))]
    return layer(h) if run.pick(2) else F.linear(h, layer.weight, run.parameter(layer.out_features))


@op
def norm(run: Run) -> Result:
    h = run.take(lambda item: item.sizes != () and item.sizes[-1] > 1).tensor
    width = h.shape[-1]
    kind = run.pick(8)
    if kind == 0:
        return F.layer_norm(h, (width,), run.parameter(width), run.parameter(width))
    if kind == 1:
        return F.layer_norm(h, (width,))
    if kind == 2:
        return F.layer_norm(h, (width,), bias=run.parameter(width))
    if kind == 3:
        return F.rms_norm(h, (width,), run.parameter(width))
    if kind == 4:
        return F.rms_norm(h, (width,), 1 + run.parameter(width))
    if kind == 5:
        return F.rms_norm(h, (width,))
    if kind == 6 and h.dim() > 2:
        return F.layer_norm(h, tuple(h.shape[-2:]))
    return F.layer_norm(h, (width,), run.parameter(width))


@op
def group_norm(run: Run) -> Result:
    h = run.tokens()
    weight, bias = run.parameter(h.shape[1]), run.parameter(h.shape[1])
    return F.group_norm(h, 1, *((weight, bias), (weight, None), (None, bias))[run.pick(3)])


@op
def convolution(run: Run) -> Result:
    h = run.tokens()
    return run.made(lambda: nn.Conv1d(h.shape[1], C, 1))(h)


@op
def embedding(run: Run) -> Result:
    labels = (run.x[..., run.pick(C)] > 0).long()
    return run.made(lambda: nn.Embedding(2, C))(labels)


@op
def modulation(run: Run) -> Result:
    """adaLN: (1 + scale) and shift, perhaps one pair of them for two layers."""
    h = run.take(lambda item: item.tensor.dim() == 3 and item.sizes[-1] > 1).tensor
    condition = run.take(lambda item: item.tensor.dim() == 2).tensor
    shift, scale = run.linear(F.silu(condition), 2 * h.shape[-1]).unsqueeze(1).chunk(2, -1)
    first = F.layer_norm(h, h.shape[-1:]) * (1 + scale) + shift
    if run.pick(2):
        return first
    other = run.linear(first, h.shape[-1])
    return F.layer_norm(other, h.shape[-1:]) * (1 + scale) + shift


# -- arithmetic --------------------------------------------------------------------------------------------------------


def _pair(run: Run) -> tuple[Tensor, Tensor]:
    """Two tensors that broadcast; the one with fewer axes gets new ones after the batch."""
    a = run.take()

    def fits(item: Item) -> bool:
        short, long = sorted((item.sizes, a.sizes), key=len)
        short = (1,) * (len(long) - len(short)) + short
        return all(m == n or 1 in (m, n) for m, n in zip(short, long, strict=True))

    h, g = a.tensor, run.take(fits).tensor
    while h.dim() < g.dim():
        h = h.unsqueeze(1)
    while g.dim() < h.dim():
        g = g.unsqueeze(1)
    return (h, g) if run.pick(2) else (g, h)


@op
def add(run: Run) -> Result:
    a, b = _pair(run)
    return run.one_of(lambda: a + b, lambda: a - b, lambda: torch.add(a, b, alpha=2))


@op
def mul(run: Run) -> Result:
    a, b = _pair(run)
    return a * b


@op
def gate(run: Run) -> Result:
    a, b = _pair(run)
    return F.silu(a) * b


@op
def residual(run: Run) -> Result:
    h = run.take(lambda item: item.sizes != ()).tensor
    return h + run.linear(F.gelu(run.linear(h, C)), h.shape[-1])


@op
def constant(run: Run) -> Result:
    h = run.take().tensor
    return run.one_of(
        lambda: 1 + h,
        lambda: h + 0.5,
        lambda: h - 2,
        lambda: torch.add(h, 3, alpha=2),
        lambda: torch.sub(h, 1, alpha=-2),
        lambda: h * 0.5,
        lambda: -h,
        lambda: h / 4,
    )


@op
def parameter(run: Run) -> Result:
    h = run.take(lambda item: item.sizes != ()).tensor
    shape = ((h.shape[-1],), h.shape[1:], (h.shape[-1],), ())[run.pick(4)]
    value = run.parameter(*shape)
    return run.one_of(
        lambda: h + value,
        lambda: h * value,
        lambda: value - h,
        lambda: h * (1 + value),
        lambda: h * value.expand(h.shape),
    )


@op
def activation(run: Run) -> Result:
    h = run.take().tensor
    return (F.relu, F.silu, F.gelu, F.leaky_relu, torch.tanh, lambda h: h.softmax(-1))[run.pick(6)](h)


@op
def total(run: Run) -> Result:
    h = run.take(lambda item: len(item.sizes) > 1).tensor
    axis, keep = run.axis(h), bool(run.pick(2))
    return (h.mean if run.pick(2) else h.sum)(axis, keepdim=keep)


@op
def masked(run: Run) -> Result:
    h = run.take(lambda item: item.sizes != ()).tensor
    mask = run.made(lambda: torch.arange(h.shape[-1]) % 3 > 0)
    other = run.parameter(h.shape[-1])
    return run.one_of(
        lambda: h.masked_fill(mask, 0.0),
        lambda: h.masked_fill(mask, 1.0),
        lambda: torch.where(mask, h, other),
        lambda: torch.where(mask, h, 0.0),
    )


@op
def attention(run: Run) -> Result:
    """Values (N, ..., T, D), mixed by the inputs alone."""
    v = run.take(lambda item: len(item.sizes) in (2, 3) and item.sizes[-2] == T).tensor
    x = run.x if v.dim() == 3 else run.x.unsqueeze(1).expand(-1, v.shape[1], -1, -1)
    if run.pick(2):
        return F.scaled_dot_product_attention(x, x, v)
    weights = (x @ x.transpose(-2, -1)).softmax(-1)
    if run.pick(2):
        return torch.einsum("bqk,bkd->bqd" if v.dim() == 3 else "bhqk,bhkd->bhqd", weights, v)
    return torch.bmm(weights, v) if v.dim() == 3 else weights @ v


@op
def self_attention(run: Run) -> Result:
    h = run.take(lambda item: len(item.sizes) == 2 and item.sizes[-1] > 1).tensor
    q, k, v = run.linear(h, 3 * C).reshape(h.shape[0], -1, 3, 2, C // 2).permute(2, 0, 3, 1, 4).unbind(0)
    if run.pick(2):  # grouped queries
        k, v = k[:, :1], v[:, :1]
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).flatten(2)


@op
def product(run: Run) -> Result:
    """Matrices: with a parameter on either side, or of two activations."""
    h = run.tokens()
    kind = run.pick(6)
    if kind == 0:
        return h @ run.parameter(h.shape[-1], C)
    if kind == 1:
        return run.parameter(C, h.shape[1]) @ h
    if kind == 2:
        return torch.einsum("btc,dc->btd", h, run.parameter(C, h.shape[-1]))
    other = run.take(lambda item: item.tensor.dim() == 3 and item.sizes[0] == h.shape[1]).tensor
    if kind == 3:
        return h.transpose(1, 2) @ other
    return torch.einsum(("btc,btd->bcd", "btc,btd->btcd")[kind % 2], h, other)


# -- movement ----------------------------------------------------------------------------------------------------------


@op
def chunk(run: Run) -> Result:
    h = run.take(lambda item: item.sizes != ()).tensor
    return list(h.chunk(2 + run.pick(2), run.axis(h)))


@op
def split(run: Run) -> Result:
    h = run.take(lambda item: item.sizes != () and item.sizes[-1] > 2).tensor
    first = 1 + run.pick(h.shape[-1] - 1)
    return list(h.split([first, h.shape[-1] - first], -1))


@op
def cat(run: Run) -> Result:
    a = run.take(lambda item: item.sizes != ())
    b = run.take(lambda item: item.sizes == a.sizes)
    axis = run.axis(a.tensor)
    parts = [a.tensor, b.tensor]
    return torch.cat(parts, axis) if run.pick(3) else torch.stack(parts, axis)


@op
def heads(run: Run) -> Result:
    h = run.take(lambda item: item.sizes != () and item.sizes[-1] % 2 == 0 and len(item.sizes) < 3).tensor
    h = h.unflatten(-1, (2, -1) if run.pick(2) else (-1, 2))
    return h.transpose(-3, -2) if h.dim() == 4 and run.pick(2) else h


@op
def merge(run: Run) -> Result:
    h = run.take(lambda item: len(item.sizes) > 2).tensor
    return run.one_of(lambda: h.transpose(1, 2).flatten(2), lambda: h.flatten(2), lambda: h.flatten(1, 2))


@op
def reshape(run: Run) -> Result:
    """Elements in order, across axes."""
    h = run.take(lambda item: len(item.sizes) > 1).tensor
    flat = h.flatten(1)
    width = next(n for n in (4, 3, 2, 1)[run.pick(4) :] if flat.shape[1] % n == 0)
    return flat.view(flat.shape[0], -1, width) if run.pick(2) else flat.unflatten(1, (width, -1))


@op
def permute(run: Run) -> Result:
    h = run.take(lambda item: len(item.sizes) > 1).tensor
    axis = 1 + run.pick(h.dim() - 1)
    return run.one_of(
        lambda: h.transpose(axis, -1), lambda: h.mT, lambda: h.movedim(axis, -1), lambda: h.movedim(-1, 1)
    )


@op
def through_the_batch(run: Run) -> Result:
    """Tokens beside the batch, or before it, while a linear reads them."""
    h = run.tokens()
    if run.pick(2):
        return run.linear(h.flatten(0, 1), C).unflatten(0, (-1, h.shape[1]))
    return run.linear(h.transpose(0, 1).contiguous(), C).permute(1, 0, 2)


@op
def part(run: Run) -> Result:
    h = run.take(lambda item: len(item.sizes) > 1).tensor
    axis = run.axis(h)
    size, start = h.shape[axis], run.pick(2) if h.shape[axis] > 1 else 0
    kind = run.pick(4)
    if kind == 0:
        return h.select(axis, start)
    if kind == 1:
        return h.narrow(axis, start, size - start)
    return h[(slice(None),) * axis + (slice(start, None, kind),)]


@op
def pad(run: Run) -> Result:
    h = run.take(lambda item: item.sizes != ()).tensor
    axis = run.axis(h)
    widths = [0, 0] * (h.dim() - 1 - axis) + [run.pick(3), run.pick(2)]
    return F.pad(h, widths, value=float(run.pick(3) == 2))


@op
def copies(run: Run) -> Result:
    h = run.take(lambda item: item.sizes != ()).tensor
    axis = run.axis(h)
    kind = run.pick(4)
    if kind == 0:
        return h.repeat([2 if i == axis else 1 for i in range(h.dim())])
    if kind == 1:
        return h.repeat_interleave(2, dim=axis)
    if kind == 2:
        one = h.narrow(axis, 0, 1)
        return one.expand([C if i == axis else -1 for i in range(h.dim())])
    return h.unsqueeze(axis).expand([-1 if i != axis else 2 for i in range(h.dim() + 1)])


@op
def order(run: Run) -> Result:
    h = run.take(lambda item: item.sizes != ()).tensor
    axis = run.axis(h)
    indices = run.made(lambda: torch.arange(h.shape[axis]).flip(0))
    kind = run.pick(4)
    if kind == 0:
        return h.index_select(axis, indices)
    if kind == 1:
        return h[(slice(None),) * axis + (indices,)]
    return h.flip(axis) if kind == 2 else h.roll(1, axis)


@op
def copy(run: Run) -> Result:
    h = run.take().tensor
    return run.one_of(
        h.clone, h.contiguous, h.detach, lambda: h.to(run.x.dtype), lambda: F.dropout(h, 0.3, training=False)
    )
