"""Exported graphs to store: a DiT of one block, and a module of a few nodes for the error paths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

EXPORTED_BATCH = 2


class Small(torch.nn.Module):
    """Few nodes, but containers in and out, a tied layer, an in-place add, SymInt arithmetic and builtins as names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(4, 4)
        self.tied = self.layer
        self.blocks = torch.nn.ModuleDict({"a-b": torch.nn.Linear(4, 4)})
        self.register_buffer("unused", torch.ones(3))
        self.register_buffer("offset", torch.zeros(4, dtype=torch.int64))

    def forward(self, input: Tensor, extra: list[Tensor], *, scale: dict[str, Tensor]) -> dict[str, object]:
        x = self.layer(input) + self.offset
        x += self.tied(input)
        y = x.reshape(x.shape[0] * 2, -1).clamp(max=float("inf"))
        return {"x": self.blocks["a-b"](x), "rest": (y, None, [extra[0] * scale["k"]])}


def small_args(batch: int = 4) -> tuple[tuple[Tensor, list[Tensor]], dict[str, dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(batch)
    return (torch.randn(batch, 4, generator=generator), [torch.ones(2)]), {"scale": {"k": torch.full((2,), 3.0)}}


def export_small(model: torch.nn.Module | None = None, check_guards: bool = False) -> GraphModule:
    args, kwargs = small_args()
    shapes = {"input": {0: Dim("batch", min=3, max=64)}, "extra": [None], "scale": {"k": None}}
    exported = torch.export.export(model or Small().eval(), args, kwargs, dynamic_shapes=shapes, strict=False)
    return exported.module(check_guards=check_guards)


def dit_args(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (N, 4, 8, 8), timesteps (N,), classes (N,)."""
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 4, 8, 8, generator=generator), torch.arange(batch) * 100, torch.arange(batch) % 10


def export_dit() -> ExportedProgram:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    dit = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_type="ada_norm_zero",
    )
    batch = {0: Dim("batch", min=1, max=64)}
    return torch.export.export(
        _Positional(dit).eval(), dit_args(EXPORTED_BATCH), dynamic_shapes=(batch, batch, batch), strict=False
    )


def quantize_int8(gm: GraphModule) -> GraphModule:
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    config = x86.get_default_x86_inductor_quantization_config()
    return _convert(gm, x86.X86InductorQuantizer().set_global(config))


def quantize_int4(gm: GraphModule) -> GraphModule:
    """4-bit weights of every linear, float activations."""
    from torchao.quantization.pt2e import PerChannelMinMaxObserver
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer

    spec = QuantizationSpec(
        dtype=torch.int8,
        observer_or_fake_quant_ctr=PerChannelMinMaxObserver.with_args(eps=2**-12),
        quant_min=-8,
        quant_max=7,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
    )

    class Int4Linears(Quantizer):
        def annotate(self, model: GraphModule) -> GraphModule:
            for node in model.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
                node.meta["quantization_annotation"] = QuantizationAnnotation(
                    input_qspec_map={node.args[1]: spec}, _annotated=True
                )
            return model

        def validate(self, model: GraphModule) -> None:
            pass

    return _convert(gm, Int4Linears())


class _Positional(torch.nn.Module):
    def __init__(self, dit: Any) -> None:
        super().__init__()
        self.dit = dit

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        return self.dit(hidden_states, timestep=timestep, class_labels=class_labels, return_dict=False)[0]


def _convert(gm: GraphModule, quantizer: object) -> GraphModule:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    prepared = prepare_pt2e(gm, quantizer)
    prepared(*dit_args(EXPORTED_BATCH))
    return convert_pt2e(prepared)
