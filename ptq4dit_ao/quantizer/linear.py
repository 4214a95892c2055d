"""A small annotator: every linear, nothing else. Static uint8 activations per tensor, int8 weights per output channel.

Its graphs are what the x86 Inductor backend and the eager integer kernels lower. It annotates no element-wise op and
no pattern, so it does not trip over the graphs of diffusion transformers that X86InductorQuantizer refuses
(``1 + linear(x)``, a reused SiLU, products of activations).
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule
from torchao.quantization.pt2e.observer import MinMaxObserver, PerChannelMinMaxObserver
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from ptq4dit_ao.graph.names import linears

ACTIVATION = QuantizationSpec(
    dtype=torch.uint8,
    quant_min=0,
    quant_max=255,
    qscheme=torch.per_tensor_affine,
    observer_or_fake_quant_ctr=MinMaxObserver.with_args(eps=2**-12),
)
# Not the 2**-12 of torchao's x86 configuration: an output channel whose weights stay below 0.03 would be cut short.
WEIGHT = QuantizationSpec(
    dtype=torch.int8,
    quant_min=-128,
    quant_max=127,
    qscheme=torch.per_channel_symmetric,
    ch_axis=0,
    observer_or_fake_quant_ctr=PerChannelMinMaxObserver.with_args(eps=torch.finfo(torch.float32).eps),
)


class LinearQuantizer(Quantizer):
    """Annotate the input and the weight of every ``aten.linear`` whose weight is a parameter."""

    def annotate(self, model: GraphModule) -> GraphModule:
        for node in linears(model):
            x, weight = node.args[:2]
            node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(
                input_qspec_map={x: ACTIVATION, weight: WEIGHT},  # type: ignore[dict-item]
                _annotated=True,
            )
        return model

    def validate(self, model: GraphModule) -> None:
        pass
