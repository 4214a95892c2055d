"""Graph passes that compute the balancing vectors, insert them, and fold them into parameters."""

from ptq4dit_ao.passes.fold import fold_balance
from ptq4dit_ao.passes.graph import balance, balanced_as, collect_salience
from ptq4dit_ao.passes.insert import insert_balance
from ptq4dit_ao.passes.module import ModuleBalance, balance_module
from ptq4dit_ao.passes.result import BalanceResult, attach_result, balance_result
from ptq4dit_ao.passes.settings import BalanceSettings
from ptq4dit_ao.passes.vectors import SiteOutcome, balance_sites
from ptq4dit_ao.passes.verify import SelfCheck, example_inputs

__all__ = [
    "BalanceResult",
    "BalanceSettings",
    "ModuleBalance",
    "SelfCheck",
    "SiteOutcome",
    "attach_result",
    "balance",
    "balance_module",
    "balance_result",
    "balance_sites",
    "balanced_as",
    "collect_salience",
    "example_inputs",
    "fold_balance",
    "insert_balance",
]
