"""Paired errors: the same inputs through the float and the quantized model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from ptq4dit_ao.core import sqnr_db
from ptq4dit_ao.graph.names import LINEAR

Denoiser = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True, kw_only=True)
class PairedError:
    """Signal-to-quantization-noise ratio of the predicted noise, pooled and per timestep, in dB."""

    sqnr_db: float
    per_timestep: dict[float, float]
    rows: int


@torch.no_grad()
def paired_error(
    reference: Denoiser, quantized: Denoiser, batches: Iterable[tuple[Tensor, ...]], *, timestep_index: int | None = 1
) -> PairedError:
    """Compare two models on the same inputs.

    Args:
        reference: the float model.
        quantized: its quantized form.
        batches: input tuples, each tensor (N, ...).
        timestep_index: which input holds the timestep, (N,) or, with one for each token, (N, T); None if none does.
    """
    expected, actual, timesteps = [], [], []
    for inputs in batches:
        expected.append(_rows(reference(*inputs)))
        actual.append(_rows(quantized(*inputs)))
        t = torch.zeros(len(expected[-1])) if timestep_index is None else inputs[timestep_index].double().cpu()
        timesteps.append(t.flatten(1).amax(1) if t.ndim > 1 else t)
    e, a, t = torch.cat(expected), torch.cat(actual), torch.cat(timesteps)
    per_timestep = {value.item(): sqnr_db(e[t == value], a[t == value]) for value in t.unique()}
    return PairedError(sqnr_db=sqnr_db(e, a), per_timestep=per_timestep, rows=len(t))


def _rows(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """(N, ...) on the CPU; several outputs side by side, (N, values)."""
    if isinstance(output, Tensor):
        return output.float().cpu()
    return torch.cat([part.float().cpu().flatten(1) for part in output], dim=1)


@torch.no_grad()
def layer_sqnr(balanced: GraphModule, quantized: GraphModule, inputs: tuple[Tensor, ...]) -> dict[str, float]:
    """SQNR in dB of every linear's output, with the error that has built up before it: node name -> dB.

    Args:
        balanced: the float graph after folding, whose tensors correspond to the quantized graph's one to one.
        quantized: the converted graph.
        inputs: one batch.
    """
    expected = _linear_outputs(balanced, inputs)
    actual = _linear_outputs(quantized, inputs)
    return {name: sqnr_db(expected[name], actual[name]) for name in actual}


class _Recorder(Interpreter):
    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__(graph_module)
        self.outputs: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> object:
        result = super().run_node(n)
        if n.target is LINEAR:
            self.outputs[n.name] = result
        return result


def _linear_outputs(graph_module: GraphModule, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    recorder = _Recorder(graph_module)
    recorder.run(*inputs)
    return recorder.outputs
