"""Observers that torchao's prepare/convert insert and call, and the statistics they keep."""

from ptq4dit_ao.observers.clock import InputObserver, TimestepClock
from ptq4dit_ao.observers.hooks import ConvertHook, RangeObserver, SalienceObserver, WeightObserver
from ptq4dit_ao.observers.statistics import ChannelStatistics, SalienceStatistics

__all__ = [
    "ChannelStatistics",
    "ConvertHook",
    "InputObserver",
    "RangeObserver",
    "SalienceObserver",
    "SalienceStatistics",
    "TimestepClock",
    "WeightObserver",
]
