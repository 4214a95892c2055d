"""Kernel proof: run the lowered model under the profiler and count the integer matrix products."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ptq4dit_ao.errors import LoweringError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class KernelProof:
    """Kernels that ran in one call of the lowered model."""

    backend: str
    promised: int
    """Number of quantized linears in the graph; 0 for a backend that only simulates."""
    kernels: dict[str, int] = field(default_factory=dict)
    """Integer kernel -> number of calls."""
    float_layers: tuple[tuple[str, str], ...] = ()
    """Linears that compute in float, as (name, reason)."""
    idle: tuple[str, ...] = ()
    """Linears that no output depends on, which the backend leaves out. They are not counted in ``promised``."""
    attention: int = 0
    """Number of attention's quantized matrix products in the graph. Those without an integer kernel are simulated."""
    attention_kernels: dict[str, int] = field(default_factory=dict)
    """Integer kernel -> number of attention's matrix products that it computes."""
    weight_only: int = 0
    """Number of linears of float inputs and integer weights, whose products are float."""
    difference: float | None = None
    """Largest difference from the quantized graph run in float, relative to the output; None if not compared."""

    @property
    def integer_gemms(self) -> int:
        """Number of integer matrix products of linears."""
        return sum(self.kernels.values())

    def __str__(self) -> str:
        kernels = _listed(self.kernels) or "no integer kernels"
        linears = f"{self.integer_gemms}/{self.promised} quantized linears on integer GEMMs ({kernels})"
        idle = f"; {len(self.idle)} that no output depends on left out" if self.idle else ""
        float_inputs = f"; {self.weight_only} linears of integer weights and float inputs" if self.weight_only else ""
        return f"{self.backend}: {linears}{idle}{float_inputs}{self._attention()}"

    @property
    def parity(self) -> str:
        """:attr:`difference` as a sentence."""
        if self.difference is None:
            return "not compared with the simulated graph"
        return f"differs from the simulated graph by {self.difference:.1g} of the output's size"

    @property
    def simulated(self) -> int:
        """Number of attention's quantized matrix products that are computed in float, from quantized values."""
        return self.attention - sum(self.attention_kernels.values())

    def _attention(self) -> str:
        if not self.attention:
            return ""
        if not self.attention_kernels:
            return f"; attention: {self.attention} matmuls simulated in float"
        integer = self.attention - self.simulated
        return f"; attention: {integer}/{self.attention} matmuls with integers ({_listed(self.attention_kernels)})"


def count_kernels(model: Callable[..., object], inputs: Sequence[Tensor], kernels: Sequence[str]) -> dict[str, int]:
    """Calls of each kernel in one run of ``model``, from torch's profiler. A run before it does any compilation."""
    with torch.no_grad():
        model(*inputs)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            model(*inputs)
    calls = {event.key: event.count for event in profiler.key_averages()}
    return {name: calls[name] for name in kernels if name in calls}


def check_proof(proof: KernelProof, *, allow_float_fallback: bool) -> None:
    """Check that all promised linears ran on integer kernels, and warn of attention that did not.

    Raises:
        LoweringError: fewer did, and ``allow_float_fallback`` is not set.
    """
    if proof.promised and proof.simulated:
        logger.warning(
            "backend %r has no integer kernels for %d of %d quantized matmuls of attention; it simulates them in float",
            proof.backend,
            proof.simulated,
            proof.attention,
        )
    if proof.integer_gemms >= proof.promised or allow_float_fallback:
        return
    why = "; ".join(f"{name}: {reason}" for name, reason in proof.float_layers[:3])
    raise LoweringError(
        f"backend {proof.backend!r} ran {proof.integer_gemms} of {proof.promised} quantized linears on integer "
        f"kernels{f' ({why})' if why else ''}; pass allow_float_fallback=True to accept that, or use another backend"
    )


def _listed(kernels: dict[str, int]) -> str:
    return ", ".join(f"{name} x{count}" for name, count in kernels.items())
