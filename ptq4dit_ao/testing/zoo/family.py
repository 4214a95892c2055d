"""Families of diffusion transformers: builders of tiny models, and the arguments of their ``forward``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.evaluation.bench.random_dit import randomize_

Inputs = dict[str, Any]
"""Keyword arguments of ``forward``; tensors may be in lists, and floating ones are float32."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture with a tiny configuration.

    ``build`` returns the module with its own initialisation. ``make_inputs`` takes a batch size and a generator.
    """

    name: str
    group: str
    """Group of the family: image, video or audio."""
    build: Callable[[], nn.Module]
    make_inputs: Callable[[int, torch.Generator], Inputs]
    dynamic_batch: bool = True
    """Whether it can be exported with a batch that differs from call to call."""
    note: str = ""
    """Special features, for the table in the docs."""

    @torch.no_grad()
    def model(self, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        """An eval-mode model with random parameters, none of which is 0; equal for equal seeds."""
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            model = self.build()
        model.requires_grad_(True)
        return randomize_(model, seed).to(dtype).eval().requires_grad_(False)

    def inputs(self, batch: int = 2, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Inputs:
        """Random arguments of ``forward``, with floating tensors in ``dtype``."""
        inputs = self.make_inputs(batch, torch.Generator().manual_seed(seed))

        def cast(value: object) -> object:
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        return {name: tree_map(cast, value) for name, value in inputs.items()}


FAMILIES: dict[str, Family] = {}


def family(
    name: str, group: str, make_inputs: Callable[[int, torch.Generator], Inputs], **options: Any
) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Register the decorated function as the builder of a family.

    Raises:
        ArgumentError: the name is taken.
    """

    def register(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        if name in FAMILIES:
            raise ArgumentError(f"there is a family {name!r} already; register this one under another name")
        FAMILIES[name] = Family(name=name, group=group, build=build, make_inputs=make_inputs, **options)
        return build

    return register


def iter_families() -> Iterator[Family]:
    """All families, sorted by group and name."""
    yield from sorted(FAMILIES.values(), key=lambda f: (f.group, f.name))
