"""A quantized model that is ready to run."""

from __future__ import annotations

import copy
from typing import NoReturn

import torch
from torch import Tensor, nn

from ptq4dit_ao._modes import without_autocast
from ptq4dit_ao.capture.interface import CapturedModule, InputSpec
from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.lowering.backend import Runnable
from ptq4dit_ao.lowering.proof import KernelProof


class LoweredModel(nn.Module):
    """A quantized model ready to run; called with the exported graph's inputs."""

    inputs: tuple[InputSpec, ...] = ()
    captured: CapturedModule | None = None
    """These two are known of a :class:`~ptq4dit_ao.QuantizedModel`."""

    def __init__(self, run: Runnable, proof: KernelProof) -> None:
        super().__init__()
        self.run = run
        self.proof = proof

    @torch.compiler.disable(reason="it is built already")  # compilers do not know the kernels in it
    @torch.no_grad()
    @without_autocast()
    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.run(*inputs)

    def __copy__(self) -> LoweredModel:
        other = LoweredModel(self.run, self.proof)
        other.inputs, other.captured = self.inputs, self.captured
        return other

    def __deepcopy__(self, memo: object) -> LoweredModel:
        """Shares what runs, which does not change."""
        return copy.copy(self)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise ArgumentError(
            f"a lowered model is bound to this process and backend {self.proof.backend!r}, and cannot be pickled; "
            "save the quantized model with save_quantized and lower it where it runs, or write a file with export_to"
        )
