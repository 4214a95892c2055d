"""Lowered model: a quantized model that is ready to run."""

from __future__ import annotations

import copy
from typing import NoReturn

import torch
from torch import Tensor, nn

from ptq4dit_ao._modes import without_autocast
from ptq4dit_ao.capture.interface import CapturedModule, InputSpec, bind_sizes
from ptq4dit_ao.capture.sizes import FreeSizes
from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.lowering.backend import Runnable
from ptq4dit_ao.lowering.proof import KernelProof


class LoweredModel(nn.Module):
    """A quantized model that is ready to run. It is called with the exported graph's inputs."""

    inputs: tuple[InputSpec, ...] = ()
    """Inputs of the graph, where they are known."""
    sizes: FreeSizes = FreeSizes()
    """Sizes of the inputs that may differ from call to call."""
    captured: CapturedModule | None = None
    """Interface of the captured diffusers model, if it was lowered from a :class:`~ptq4dit_ao.QuantizedModel`."""

    def __init__(self, run: Runnable, proof: KernelProof) -> None:
        super().__init__()
        self.run = run
        self.proof = proof

    @torch.compiler.disable(reason="it is built already")  # compilers do not know its kernels
    @torch.no_grad()
    @without_autocast()
    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Run the model on the graph's inputs, without gradients and autocast.

        Raises:
            ArgumentError: a free size is beyond its bounds, at which the built model would compute something else.
        """
        if len(inputs) == len(self.inputs):
            problem = self.sizes.problem(bind_sizes(self.inputs, [x.shape for x in inputs]))
            if problem is not None:
                raise ArgumentError(f"the model cannot be called so: {problem}; give it other sizes, or export again")
        return self.run(*inputs)

    def __copy__(self) -> LoweredModel:
        other = LoweredModel(self.run, self.proof)
        other.inputs, other.sizes, other.captured = self.inputs, self.sizes, self.captured
        return other

    def __deepcopy__(self, memo: object) -> LoweredModel:
        """Copy the module and share the built model, which does not change."""
        return copy.copy(self)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise ArgumentError(
            f"a lowered model is bound to this process and backend {self.proof.backend!r}, and cannot be pickled; "
            "save the quantized model with save_quantized and lower it where it runs, or write a file with export_to"
        )
