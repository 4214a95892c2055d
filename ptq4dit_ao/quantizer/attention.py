"""Quantization specs of attention's operands.

Like PTQ4DiT (arXiv 2405.16005, section 4.1), they quantize q, k, v and the probabilities statically and per tensor.
No operand has a zero point other than 0: q, k and v are symmetric, and probabilities start at 0. Integer kernels that
multiply two activations expect this form.
"""

from __future__ import annotations

import dataclasses
import logging

import torch
from torch.fx import GraphModule
from torchao.quantization.pt2e.observer import MinMaxObserver
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.graph.attention import SOFTMAX, Attention, find_attention
from ptq4dit_ao.quantizer.linear import ACTIVATION
from ptq4dit_ao.quantizer.overrides import with_bits

logger = logging.getLogger(__name__)

# Among a thousand tokens, each gets a probability of about 0.001. torchao's smallest scale, 2**-12, is coarse for that.
PROBABILITIES = dataclasses.replace(ACTIVATION, observer_or_fake_quant_ctr=MinMaxObserver.with_args(eps=2**-40))
OPERAND = dataclasses.replace(
    PROBABILITIES, dtype=torch.int8, quant_min=-128, quant_max=127, qscheme=torch.per_tensor_symmetric
)
SPECS = {"q": OPERAND, "k": OPERAND, "probabilities": PROBABILITIES, "v": OPERAND}


def annotate_attention(model: GraphModule, bits: int) -> None:
    """Annotate the operands of every attention as quantized; this overrides the base quantizer's annotations.

    Raises:
        ArgumentError: the graph has no attention that can be read.
    """
    found = find_attention(model)
    if not found:
        raise ArgumentError(
            "attention is to be quantized, but the graph has no scaled_dot_product_attention, and no product, softmax, "
            "product that can be read; leave attention_bits out (in a recipe: attention.quantize: false)"
        )
    _warn_of_others(model, found)
    for attention in found:
        for product in (attention.scores, attention.mixed):
            product.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(input_qspec_map={}, _annotated=True)
        for name, (x, product) in attention.operands.items():
            product.meta[Q_ANNOTATION_KEY].input_qspec_map[x] = with_bits(SPECS[name], bits)


def _warn_of_others(model: GraphModule, found: list[Attention]) -> None:
    read = {attention.softmax for attention in found}
    others = [node.name for node in model.graph.nodes if node.target in SOFTMAX and node not in read]
    if others:
        logger.warning(
            "%d of %d softmaxes are not between two matrix products that can be read; their operands stay float: %s",
            len(others),
            len(others) + len(read),
            ", ".join(others[:3]),
        )
