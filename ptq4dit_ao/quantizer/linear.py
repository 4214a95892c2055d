"""A small quantizer of linears only, with static per-tensor uint8 activations and per-output-channel int8 weights.

The x86 Inductor backend and the eager integer kernels can lower its graphs. It annotates neither element-wise ops nor
patterns, so it also accepts graphs of diffusion transformers that X86InductorQuantizer refuses (``1 + linear(x)``, a
reused SiLU, products of activations).
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
# torchao's x86 configuration has eps 2**-12, which is too coarse for output channels whose weights stay below 0.03.
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
        """Annotate every linear of a graph, in place; called by ``prepare_pt2e``."""
        for node in linears(model):
            x, weight = node.args[:2]
            node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(
                input_qspec_map={x: ACTIVATION, weight: WEIGHT},  # type: ignore[dict-item]
                _annotated=True,
            )
        return model

    def validate(self, model: GraphModule) -> None:
        """Accept every graph; called by ``prepare_pt2e``."""
