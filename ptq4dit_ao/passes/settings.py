"""Settings of balancing."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import torch

from ptq4dit_ao.choices import AGGREGATIONS, BALANCE_METHODS, FOLD_FORMS, Aggregation, BalanceMethod, FoldForm
from ptq4dit_ao.core import balance_vector, clip_balance
from ptq4dit_ao.errors import ArgumentError, check_choice, renamed

ALPHAS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Exponents that the search of ``alpha="auto"`` tries."""


SEARCHED: tuple[Aggregation, ...] = ("ssc", "max")
"""Aggregations that the search of ``method="auto"`` tries."""


@dataclass(frozen=True, kw_only=True)
class BalanceSettings:
    """Settings by which b is computed and folded.

    Args:
        method: aggregation of salience over timesteps (``ssc``, ``max`` or ``mean``). With ``auto``, each site takes
            the candidate with the best score, which may be no balancing. ``repq`` uses the range of each channel over
            all timesteps instead of salience, and also shifts the input (:mod:`ptq4dit_ao.core.repq`).
        alpha: exponent of ``b = s(X)^alpha / s(W)^(1 - alpha)``, or ``auto`` for a choice by score. ``repq`` has none.
        center: whether the middle of each channel's range is subtracted first, where a parameter shifts the input. A
            search chooses between both.
        max_scale: bound on b, to [1/max_scale, max_scale].
        fold_form: where the 1 of ``1 + scale`` goes; see :mod:`ptq4dit_ao.passes.fold`.
        max_rounding: bound on the rounding of ``1 + scale`` in fold form ``bias``, which stores ``(1 + bias)/b - 1``
            and so rounds by up to ``b * eps/2`` of its size. A vector that exceeds 2.56 in bfloat16, or 20 in float16,
            is scaled down as a whole.
        stored_dtype: the dtype in which a float32 model will be stored; None for the model's own.
        min_timesteps: number of distinct timesteps that SSC needs.

    Raises:
        ArgumentError: a value is out of range.
    """

    method: BalanceMethod = "ssc"
    alpha: float | Literal["auto"] = 0.5
    center: bool = False
    max_scale: float = 1000.0
    fold_form: FoldForm = "constant"
    max_rounding: float = 0.01
    stored_dtype: torch.dtype | None = None
    min_timesteps: int = 2

    def __post_init__(self) -> None:
        check_choice("method", self.method, tuple(m for m in BALANCE_METHODS if m != "none"))
        check_choice("fold_form", self.fold_form, FOLD_FORMS)
        if isinstance(self.alpha, str):
            check_choice("alpha", self.alpha, ("auto",))
        else:
            balance_vector(torch.ones(1), torch.ones(1), self.alpha)
        if self.method == "repq" and self.alpha != 0.5:
            raise ArgumentError(f"alpha is {self.alpha!r}, but method 'repq' has no exponent; leave alpha out")
        if self.method == "repq" and self.center:
            raise ArgumentError("center is on, but method 'repq' shifts the input itself; leave center out")
        clip_balance(torch.ones(1), self.max_scale)

    @property
    def searches(self) -> bool:
        """Whether b is chosen among candidates by a score."""
        return "auto" in (self.alpha, self.method)

    def candidates(self) -> list[tuple[Aggregation, float]]:
        """Candidate aggregations and exponents; a single pair without a search."""
        if self.method == "auto":
            aggregations = SEARCHED
        else:  # RepQ does not need salience; the report shows the maximum
            aggregations = tuple(how for how in AGGREGATIONS if how == self.method) or ("max",)
        alphas = ALPHAS if isinstance(self.alpha, str) else (self.alpha,)
        return list(itertools.product(aggregations, alphas))


BalanceSettings.__init__ = renamed(aggregation="method")(BalanceSettings.__init__)  # type: ignore[method-assign]
