"""The plan that a prepared model carries in its observers, by which it is balanced when it is converted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ptq4dit_ao._progress import OnProgress
from ptq4dit_ao.errors import CalibrationError
from ptq4dit_ao.graph import Site
from ptq4dit_ao.graph.pending import factors_wait
from ptq4dit_ao.observers import AttentionObserver, SalienceObserver, SalienceStatistics, TimestepClock
from ptq4dit_ao.observers.hooks import WeightObserver
from ptq4dit_ao.passes import (
    BalanceResult,
    BalanceSettings,
    SelfCheck,
    SiteOutcome,
    attach_result,
    balance_result,
    balance_sites,
)
from ptq4dit_ao.passes.edit import scale_of
from ptq4dit_ao.rounding import (
    DistillationSettings,
    PostRoundingScore,
    RoundingSettings,
    activation_clipping,
    distill,
    round_in_one_pass,
    round_sequentially,
)


@dataclass
class BalancePlan:
    """The :class:`~ptq4dit_ao.observers.ConvertHook` of one prepared model.

    It holds names and no fx nodes, so that a prepared model can be deep-copied.
    """

    sites: tuple[Site, ...]
    settings: BalanceSettings | None
    rounding: RoundingSettings
    sequential: bool
    """Whether weights are rounded by :meth:`round_sequentially` instead of in one pass."""
    clock: TimestepClock
    verify: bool
    layers: dict[str, str]
    """Layer name of every linear, by its node name."""
    weights: dict[str, str]
    """Path of every linear's weight, by its node name."""
    observers: dict[str, list[SalienceObserver]] = field(default_factory=dict)
    """Observers by site input key; several for one key if layers ask for different bits."""
    operands: dict[str, list[AttentionObserver]] = field(default_factory=dict)
    """Observers of attention's operands, by node name."""
    _balanced: bool = False
    _done: bool = False

    def before_convert(self, model: GraphModule) -> None:
        """Balance, fold and round, once.

        Raises:
            CalibrationError: the plan is sequential, but the model was not rounded layer by layer yet.
        """
        if self._done:
            return
        if self.sequential:
            raise CalibrationError(
                "this quantizer rounds layer by layer: call ptq4dit_ao.round_sequentially(prepared, batches) between "
                "calibration and convert_pt2e, or leave out sequential=True"
            )
        self.balance(model)
        round_in_one_pass(model, self.rounding)
        balance_result(model).clipping.update(activation_clipping(model))
        self._done = True

    def round_sequentially(
        self, model: GraphModule, batches: Iterable[Sequence[Tensor]], on_progress: OnProgress, resume: Path | None
    ) -> None:
        """Balance, fold, and round layer by layer.

        Raises:
            CalibrationError: the model was rounded before.
        """
        if self._done:
            raise CalibrationError("this model has been rounded already; prepare it again to round it again")
        self.balance(model)
        for observer in self._every_observer():
            observer.moments = None  # only the search needs them; this frees memory for rounding
        round_sequentially(model, batches, self.rounding, on_progress=on_progress, resume=resume)
        balance_result(model).clipping.update(activation_clipping(model))
        self._done = True

    def distill(
        self,
        model: GraphModule,
        batches: Sequence[Sequence[Tensor]],
        settings: DistillationSettings,
        on_progress: OnProgress,
        resume: Path | None,
    ) -> None:
        """Distill a model that was rounded layer by layer from the float network's output.

        Raises:
            CalibrationError: the model was not rounded layer by layer.
        """
        if not (self.sequential and self._done):
            raise CalibrationError(
                "only a model that was rounded layer by layer can be distilled: prepare with sequential=True, and call "
                "ptq4dit_ao.round_sequentially(prepared, batches) first"
            )
        distill(model, batches, settings, on_progress=on_progress, resume=resume)
        balance_result(model).clipping.update(activation_clipping(model))

    def balance(self, model: GraphModule) -> None:
        """Balance and fold, once; a second call, such as after a failed rounding, does nothing."""
        if self._balanced:
            return
        statistics = self.statistics()
        outcomes: dict[str, SiteOutcome] = {}
        if self.settings is not None:
            check = SelfCheck(model, self.clock.example) if self.verify else None
            with factors_wait(model, may_stay=_only_quantized(model).__contains__):
                score = None
                if self.settings.searches:
                    score = PostRoundingScore(model, self.observers, self.rounding)
                specs = {key: observers[0].spec for key, observers in self.observers.items()}
                outcomes = balance_sites(model, self.sites, statistics, self.settings, score, specs)
                if check is not None:
                    self.sites, outcomes = check.settle(model, self.sites, outcomes, self.settings.fold_form)
        for site in self.sites:
            if site.name in outcomes and outcomes[site.name].method != "none":
                self._set_balance(outcomes[site.name])
        result = BalanceResult(
            sites=self.sites,
            outcomes=outcomes,
            statistics=statistics,
            settings=self.settings,
            layers=self.layers,
            weights=self.weights,
        )
        attach_result(model, result)
        self._balanced = True

    def statistics(self) -> SalienceStatistics:
        """The salience statistics that the observers have gathered so far."""
        return SalienceStatistics(
            {key: observers[0].statistics for key, observers in self.observers.items()}, self.clock.example
        )

    def _every_observer(self) -> Iterator[SalienceObserver]:
        for observers in self.observers.values():
            yield from observers

    def _set_balance(self, outcome: SiteOutcome) -> None:
        for key, consumer in outcome.site.inputs.items():
            for observer in self.observers.get(key, []):
                observer.balance = scale_of(outcome.b, consumer.variables).to(torch.float64)
                observer.offset, observer.chosen_range = outcome.offset, outcome.range
        for name in outcome.site.activations.keys() & self.operands.keys():
            for operand in self.operands[name]:
                operand.divide(scale_of(outcome.b, outcome.site.activations[name]))


def _only_quantized(model: GraphModule) -> set[str]:
    """Paths of the tensors that only weight observers read."""
    readers: dict[str, set[bool]] = {}
    for node in model.graph.nodes:
        if node.op == "get_attr":
            observed = {u.op == "call_module" and isinstance(_module(model, u), WeightObserver) for u in node.users}
            readers.setdefault(str(node.target), set()).update(observed)
    return {path for path, observed in readers.items() if observed == {True}}


def _module(model: GraphModule, node: Node) -> nn.Module:
    return model.get_submodule(str(node.target))
