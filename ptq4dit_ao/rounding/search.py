"""Score of a site's balancing vector: the error of its layers' outputs after rounding at the true bit widths.

Candidates are rounded by the same method as the weights will be. Rounding to nearest would favour vectors with small
weight errors, which GPTQ reduces anyway. To save time, GPTQ rounds candidates at one scale only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import GraphModule

from ptq4dit_ao.graph import Site
from ptq4dit_ao.observers import SalienceObserver
from ptq4dit_ao.passes.edit import scale_of
from ptq4dit_ao.rounding.layers import Group, find_groups
from ptq4dit_ao.rounding.one_pass import balanced_moments
from ptq4dit_ao.rounding.settings import RoundingSettings
from ptq4dit_ao.rounding.solve import Inputs, choose_range, quantize_tokens, solve

ROWS = 1024
"""Maximum number of output channels that a score uses, per group and weight spec."""

STEP = 4
"""Stride of the tokens that are used to choose a candidate's range."""


class PostRoundingScore:
    """Score ``score(model, site, b, offset)``: mean square error of a site's outputs on its observers' tokens."""

    def __init__(
        self, prepared: GraphModule, observers: Mapping[str, Sequence[SalienceObserver]], settings: RoundingSettings
    ) -> None:
        self._observers = observers
        # Learned rounding is closer to GPTQ's solution than to rounding to nearest.
        self._settings = replace(settings, rounding="gptq") if settings.learned else settings
        self._groups: dict[SalienceObserver, list[Group]] = {}
        for group in find_groups(prepared):
            if isinstance(group.observer, SalienceObserver):
                self._groups.setdefault(group.observer, []).append(group)

    def __call__(self, model: GraphModule, site: Site, b: Tensor, offset: Tensor | None) -> float:
        """Error with the balancing vector ``b`` (V,) behind an offset (C,), for a site that is not balanced yet."""
        total = 0.0
        for key, consumer in site.inputs.items():
            scale = scale_of(b, consumer.variables)
            for observer in self._observers.get(key, ()):
                total += sum(self._error(model, group, scale, offset) for group in self._groups.get(observer, ()))
        return total

    def _error(self, model: GraphModule, group: Group, scale: Tensor, offset: Tensor | None) -> float:
        observer, moments = group.observer, group.observer.moments
        assert isinstance(observer, SalienceObserver) and moments is not None
        tokens, second, mean = balanced_moments(moments, scale, offset)
        error = 0.0
        for spec, layers in group.by_spec().items():
            weight = torch.cat([layer.weight(model) for layer in layers])
            weight = weight[:: -(-len(weight) // ROWS)] * scale.to(weight)
            low, high = observer.statistics.range(scale, offset)
            bounds = choose_range(observer.spec, tokens[::STEP], low, high, weight, spec.levels, self._settings)
            quantized = quantize_tokens(observer.spec, tokens, bounds)
            inputs = Inputs.from_moments(mean, mean + (quantized - tokens).mean(0), second.clone())
            (rounded,) = solve([weight], [None], spec, inputs, self._settings, try_scales=False)
            noise = quantized @ rounded.weight().T - tokens @ weight.T
            if rounded.bias is not None:
                noise += rounded.bias
            error += float(noise.square().sum(1).mean())
        return error
