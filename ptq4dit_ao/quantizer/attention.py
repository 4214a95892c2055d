"""Attention's operands as integers: which specs they get.

As in PTQ4DiT (arXiv 2405.16005, section 4.1): q, k, v and the probabilities, static and per tensor. Probabilities start
at 0, so their zero point is 0.
"""

from __future__ import annotations

import dataclasses
import logging

from torch.fx import GraphModule
from torchao.quantization.pt2e.observer import MinMaxObserver
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.graph.attention import SOFTMAX, Attention, find_attention
from ptq4dit_ao.quantizer.linear import ACTIVATION
from ptq4dit_ao.quantizer.overrides import with_bits

logger = logging.getLogger(__name__)

# Of a thousand tokens, each gets a probability of about 0.001: torchao's 2**-12 would be a coarse step.
OPERAND = dataclasses.replace(ACTIVATION, observer_or_fake_quant_ctr=MinMaxObserver.with_args(eps=2**-40))


def annotate_attention(model: GraphModule, bits: int) -> None:
    """Ask for quantized operands of every attention, whatever the base quantizer has asked for.

    Raises:
        ArgumentError: the graph has none.
    """
    found = find_attention(model)
    if not found:
        raise ArgumentError(
            "attention is to be quantized, but the graph has no scaled_dot_product_attention, and no product, softmax, "
            "product that can be read; leave attention_bits out (in a recipe: attention.quantize: false)"
        )
    _warn_of_others(model, found)
    spec = with_bits(OPERAND, bits)
    for attention in found:
        for product in (attention.scores, attention.mixed):
            product.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(
                input_qspec_map=dict.fromkeys(product.args[:2], spec),  # type: ignore[arg-type]
                _annotated=True,
            )


def _warn_of_others(model: GraphModule, found: list[Attention]) -> None:
    read = {attention.softmax for attention in found}
    others = [node.name for node in model.graph.nodes if node.target in SOFTMAX and node not in read]
    if others:
        logger.warning(
            "%d of %d softmaxes are not between two matrix products, and what is computed of them stays float: %s",
            len(others),
            len(others) + len(read),
            ", ".join(others[:3]),
        )
