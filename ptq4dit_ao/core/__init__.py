"""The maths of PTQ4DiT as pure functions of tensors, independent of models and graphs."""

from ptq4dit_ao.core.allocation import allocate
from ptq4dit_ao.core.balance import balance_vector, clip_balance
from ptq4dit_ao.core.metrics import sqnr_db
from ptq4dit_ao.core.qparams import affine_qparams, fake_quantize
from ptq4dit_ao.core.salience import aggregate_salience, channel_salience
from ptq4dit_ao.core.ssc import spearman, ssc_weights

__all__ = [
    "affine_qparams",
    "aggregate_salience",
    "allocate",
    "balance_vector",
    "channel_salience",
    "clip_balance",
    "fake_quantize",
    "spearman",
    "sqnr_db",
    "ssc_weights",
]
