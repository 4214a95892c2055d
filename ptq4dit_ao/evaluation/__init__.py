"""How good and how fast: paired errors and latency."""

from ptq4dit_ao.evaluation.latency import LatencyResult, measure_latency
from ptq4dit_ao.evaluation.paired import PairedError, layer_sqnr, paired_error

__all__ = ["LatencyResult", "PairedError", "layer_sqnr", "measure_latency", "paired_error"]
