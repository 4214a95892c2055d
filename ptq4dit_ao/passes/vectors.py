"""Balancing vectors computed from statistics (CSB and SSC per site), and folded one site after another."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.fx import GraphModule

from ptq4dit_ao.choices import AGGREGATIONS, Aggregation, BalanceMethod, FoldForm
from ptq4dit_ao.core import aggregate_salience, balance_vector, clip_balance, ssc_weights
from ptq4dit_ao.core.repq import reparameterise
from ptq4dit_ao.errors import ArgumentError, CalibrationError
from ptq4dit_ao.graph import Consumer, Site
from ptq4dit_ao.graph.names import get_attribute
from ptq4dit_ao.graph.pending import tensor_at
from ptq4dit_ao.observers import SalienceStatistics
from ptq4dit_ao.observers.qdq import QuantSpec
from ptq4dit_ao.passes.fold import fold_balance
from ptq4dit_ao.passes.insert import insert_balance
from ptq4dit_ao.passes.offset import subtract_offset
from ptq4dit_ao.passes.settings import BalanceSettings

logger = logging.getLogger(__name__)


CENTRED = " centred"

Score = Callable[[GraphModule, Site, Tensor, Tensor | None], float]
"""Function ``score(model, site, b, offset)`` that rates a vector (V,) of an unbalanced site; lower is better."""


@dataclass(frozen=True, kw_only=True)
class SiteOutcome:
    """Outcome of balancing one site; vectors are per variable, (V,), or per timestep, (T,)."""

    site: Site
    b: Tensor
    clipped: Tensor
    salience_x: Tensor
    salience_w: Tensor
    timesteps: Tensor
    salience_t: Tensor
    """Largest salience of any channel, per timestep: (T,)."""
    rho: Tensor
    eta: Tensor
    method: BalanceMethod
    """The method that was used; ``none`` if a search found no balancing (b = 1) best."""
    alpha: float | None
    """The exponent; None if the method has none."""
    scores: dict[str, float] = field(default_factory=dict)
    """Scores of a search's candidates, lower is better; keys are ``"AGGREGATION ALPHA"``, with :data:`CENTRED` behind
    it for a centred input, and ``"none"``."""
    offset: Tensor | None = None
    """Offset that is subtracted from the input before it is divided by b, (C,); None if there is none."""
    range: tuple[float, float] | None = None
    """Quantization range of the balanced input, if the method determines it."""


def balance_sites(
    model: GraphModule,
    sites: Sequence[Site],
    statistics: SalienceStatistics,
    settings: BalanceSettings,
    score: Score | None = None,
    specs: Mapping[str, QuantSpec] | None = None,
) -> dict[str, SiteOutcome]:
    """Balance and fold every site without refusal, in place, from the output towards the input.

    The order matters: folding an attention output changes rows of V's weight, and the salience of the QKV site before
    it is computed from that weight.

    Raises:
        ArgumentError: the settings ask for a search, but there is no score; or for RepQ, but ``specs`` (by site input)
            is missing.
        CalibrationError: a site was not observed, or at too few timesteps; the graph is not changed then.
    """
    if settings.searches and score is None:
        raise ArgumentError(
            "alpha or method 'auto' is chosen by the error after quantization, which only PTQ4DiTQuantizer and "
            "apply_recipe know; give a number and one of " + ", ".join(AGGREGATIONS)
        )
    if settings.method == "repq" and specs is None:
        raise ArgumentError(
            "method 'repq' needs to know how the inputs will be quantized, which only PTQ4DiTQuantizer and "
            "apply_recipe do; give one of " + ", ".join(AGGREGATIONS)
        )
    observed = [(site, _observed(site, statistics, settings)) for site in sites if site.refusal is None]
    outcomes: dict[str, SiteOutcome] = {}
    for site, salience in reversed(observed):
        outcome = _solve(model, site, salience, settings, score)
        if settings.method == "repq" and specs is not None:
            outcome = _reparameterised(outcome, statistics, specs, settings.max_scale)
        apply_outcome(model, outcome, settings.fold_form)
        outcomes[site.name] = outcome
        logger.debug("%s: b in [%.3g, %.3g]", site.name, outcome.b.min(), outcome.b.max())
    model.recompile()
    logger.info("balanced and folded %d of %d sites", len(outcomes), len(sites))
    return dict(reversed(outcomes.items()))


def apply_outcome(model: GraphModule, outcome: SiteOutcome, form: FoldForm) -> None:
    """Insert and fold one site's vector; the caller must call ``model.recompile()``."""
    if outcome.offset is not None:
        subtract_offset(model, outcome.site, outcome.offset)
    if outcome.method != "none":
        insert_balance(model, outcome.site, outcome.b)
        fold_balance(model, outcome.site, outcome.b, form)


@dataclass(frozen=True, kw_only=True)
class _Salience:
    """Salience of a site's input by timestep."""

    timesteps: Tensor
    salience: Tensor
    """(T, V)."""
    offset: Tensor | None = None
    """Vector that was subtracted from the input, (C,) float64; None for zeros."""


def _observed(site: Site, statistics: SalienceStatistics, settings: BalanceSettings) -> list[_Salience]:
    """Salience of a site's input as it is, and centred; one of them without a search.

    Raises:
        CalibrationError: there are fewer timesteps than the method needs.
    """
    timesteps, salience_t = _activation_salience(site, statistics)
    if settings.method in ("ssc", "auto") and len(timesteps) < settings.min_timesteps:
        raise CalibrationError(
            f"{site.name} was observed at {len(timesteps)} timestep(s); method {settings.method!r} needs at "
            f"least {settings.min_timesteps}: calibrate on more timesteps, name the input that holds the "
            "timestep with timestep_input, or use method 'max'"
        )
    found = [_Salience(timesteps=timesteps, salience=salience_t)]
    if settings.center and site.shift is not None:
        found.append(_centred(site, statistics))
    return found if settings.searches else found[-1:]


def _centred(site: Site, statistics: SalienceStatistics) -> _Salience:
    """Salience of a site with one input and a variable for each channel, about the middle of each channel's range."""
    ((key, consumer),) = site.inputs.items()
    table = statistics[key]
    low, high = table.minimum.to(torch.float64), table.maximum.to(torch.float64)
    offset = (low.amin(0) + high.amax(0)) / 2
    salience = torch.maximum((low - offset).abs(), (high - offset).abs())
    salience = _per_variable(salience, consumer, site.num_variables)
    return _Salience(timesteps=table.timesteps, salience=salience, offset=offset)


def _solve(
    model: GraphModule, site: Site, observed: Sequence[_Salience], settings: BalanceSettings, score: Score | None
) -> SiteOutcome:
    salience_w = _weight_salience(model, site)
    found = {}
    for salience in observed:
        weights = ssc_weights(salience.salience, salience_w)
        for method, alpha in settings.candidates():
            name = f"{method} {alpha:g}{'' if salience.offset is None else CENTRED}"
            found[name] = _outcome(model, site, salience, salience_w, weights, method, alpha, settings)
    alone = next(iter(found.values()))
    if not settings.searches:
        return alone
    assert score is not None
    ones = torch.ones_like(alone.b)
    found["none"] = replace(alone, method="none", alpha=0.0, b=ones, clipped=torch.zeros_like(alone.clipped))
    scores = {name: score(model, site, candidate.b, candidate.offset) for name, candidate in found.items()}
    return replace(found[min(scores, key=scores.__getitem__)], scores=scores)


def _outcome(
    model: GraphModule,
    site: Site,
    observed: _Salience,
    salience_w: Tensor,
    weights: tuple[Tensor, Tensor],
    method: Aggregation,
    alpha: float,
    settings: BalanceSettings,
) -> SiteOutcome:
    salience_t, (eta, rho) = observed.salience, weights
    salience_x = aggregate_salience(salience_t, salience_w, method)
    b, clipped = _bounded(model, site, balance_vector(salience_x, salience_w, alpha), settings)
    return SiteOutcome(
        site=site,
        b=b,
        clipped=clipped,
        salience_x=salience_x,
        salience_w=salience_w,
        timesteps=observed.timesteps,
        salience_t=salience_t.amax(1),
        rho=rho,
        eta=eta,
        method=method,
        alpha=alpha,
        offset=observed.offset,
    )


def _reparameterised(
    outcome: SiteOutcome, statistics: SalienceStatistics, specs: Mapping[str, QuantSpec], max_scale: float
) -> SiteOutcome:
    """The outcome with RepQ's vector, offset and range, for a site with one input and a variable for each channel."""
    ((key, consumer),) = outcome.site.inputs.items()
    table, spec = statistics[key], specs[key]
    found = reparameterise(table.minimum.amin(0), table.maximum.amax(0), spec.quant_min, spec.quant_max)
    b, clipped = torch.empty_like(outcome.b), torch.empty_like(outcome.clipped)
    variables = torch.from_numpy(consumer.variables) - 1
    ratio, clipped[variables] = clip_balance(found.ratio, max_scale)
    b[variables] = ratio
    return replace(
        outcome,
        method="repq",
        alpha=None,
        b=b,
        clipped=clipped,
        offset=ratio * found.offset(ratio),
        range=found.range(spec.quant_min, spec.quant_max),
    )


def _bounded(model: GraphModule, site: Site, b: Tensor, settings: BalanceSettings) -> tuple[Tensor, Tensor]:
    if settings.fold_form == "bias" and site.scalars:
        # Scaling all of b by a common factor does not affect the balance, only the precision of the stored bias.
        dtype = settings.stored_dtype or get_attribute(model, site.parameters[0].paths[0]).dtype
        b = b * (2 * settings.max_rounding / torch.finfo(dtype).eps / b.max()).clamp_max(1)
    return clip_balance(b, settings.max_scale)


def _activation_salience(site: Site, statistics: SalienceStatistics) -> tuple[Tensor, Tensor]:
    """Timesteps (T,) and salience per variable (T, V), the largest over all tensors and channels that share it.

    If some tensors have statistics, those without are ignored, because only layers that stay float read them.
    """
    timesteps, total = None, None
    observed = {key: consumer for key, consumer in site.inputs.items() if key in statistics}
    for key, consumer in (observed or site.inputs).items():
        table = statistics.get(key)
        if table is None or len(table.timesteps) == 0:
            raise CalibrationError(
                f"{key!r} was never run: call the prepared model on calibration samples before converting"
            )
        part = _per_variable(table.salience.to(torch.float64), consumer, site.num_variables)
        if timesteps is not None and not torch.equal(timesteps, table.timesteps):
            raise CalibrationError(f"{site.name}: its inputs were observed at different timesteps; calibrate again")
        timesteps, total = table.timesteps, part if total is None else torch.maximum(total, part)
    assert timesteps is not None and total is not None
    return timesteps, total


def _weight_salience(model: GraphModule, site: Site) -> Tensor:
    """Salience per variable (V,), the largest over all consumers' weight columns."""
    parts = []
    for consumer in site.consumers:
        low, high = torch.aminmax(tensor_at(model, consumer.weight).detach(), dim=0, keepdim=True)
        largest = torch.maximum(-low, high).to("cpu", torch.float64)
        parts.append(_per_variable(largest, consumer, site.num_variables)[0])
    return torch.stack(parts).amax(0)


def _per_variable(channels: Tensor, consumer: Consumer, num_variables: int) -> Tensor:
    """The largest value over the channels of each variable, (T, C) -> (T, V)."""
    index = torch.from_numpy(consumer.variables).expand(len(channels), -1)
    table = torch.zeros(len(channels), num_variables + 1, dtype=channels.dtype)
    return table.scatter_reduce_(1, index, channels, "amax")[:, 1:]
