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
"""Exponents that a search tries."""


SEARCHED: tuple[Aggregation, ...] = ("ssc", "max")
"""Aggregations that a search tries."""


@dataclass(frozen=True, kw_only=True)
class BalanceSettings:
    """How b is computed and folded.

    ``alpha`` or ``method`` ``"auto"``: of several, and of no balancing at all, each site takes what scores best.
    ``method`` ``"repq"``: not the salience, but the range of each channel over all timesteps decides, and the
    input is also shifted (:mod:`ptq4dit_ao.core.repq`); there is no ``alpha`` then.
    ``max_scale`` bounds b to [1/max_scale, max_scale]; ``min_timesteps`` is how many distinct timesteps SSC needs.
    Storing ``(1 + bias)/b - 1`` (fold form ``bias``) rounds ``1 + scale`` by up to ``b * eps/2`` of its size;
    ``max_rounding`` bounds that: a vector that exceeds 2.56 in bfloat16, 20 in float16, is scaled down as a whole.
    ``stored_dtype`` says what a float32 model will be stored in.
    """

    method: BalanceMethod = "ssc"
    alpha: float | Literal["auto"] = 0.5
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
        clip_balance(torch.ones(1), self.max_scale)

    @property
    def searches(self) -> bool:
        """Does it take a score to find b?"""
        return "auto" in (self.alpha, self.method)

    def candidates(self) -> list[tuple[Aggregation, float]]:
        """Aggregations and exponents to choose from."""
        if self.method == "auto":
            aggregations = SEARCHED
        else:  # RepQ's b does not come from salience, which is for the report then
            aggregations = tuple(how for how in AGGREGATIONS if how == self.method) or ("max",)
        alphas = ALPHAS if isinstance(self.alpha, str) else (self.alpha,)
        return list(itertools.product(aggregations, alphas))


BalanceSettings.__init__ = renamed(aggregation="method")(BalanceSettings.__init__)  # type: ignore[method-assign]
