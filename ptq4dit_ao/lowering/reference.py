"""``reference``: the quantize/dequantize graph as it is, in float: a simulation, exact to the integer arithmetic."""

from __future__ import annotations

from ptq4dit_ao.lowering.lower import Backend, register

register(
    Backend(
        name="reference",
        summary="quantize/dequantize nodes run eagerly in float: a simulation, on any machine",
        integer=False,
        refuse=lambda linear: None,
        build=lambda graph, linears: graph,
    )
)
