"""Observers that torchao's ``prepare_pt2e`` and ``convert_pt2e`` insert and call, and the statistics that they keep."""

from ptq4dit_ao.observers.attention import AttentionObserver
from ptq4dit_ao.observers.clock import InputObserver, TimestepClock
from ptq4dit_ao.observers.hooks import (
    ActivationObserver,
    ConvertHook,
    RangeObserver,
    Rounded,
    SalienceObserver,
    WeightObserver,
)
from ptq4dit_ao.observers.moments import Moments, TokenSample
from ptq4dit_ao.observers.statistics import ChannelStatistics, SalienceStatistics

__all__ = [
    "ActivationObserver",
    "AttentionObserver",
    "ChannelStatistics",
    "ConvertHook",
    "InputObserver",
    "Moments",
    "RangeObserver",
    "Rounded",
    "SalienceObserver",
    "SalienceStatistics",
    "TimestepClock",
    "TokenSample",
    "WeightObserver",
]
