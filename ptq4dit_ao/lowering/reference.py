"""``reference``: run the quantize/dequantize graph unchanged in float, an exact simulation of integer arithmetic."""

from __future__ import annotations

from ptq4dit_ao.lowering.backend import Backend, register

register(
    Backend(
        name="reference",
        summary="quantize/dequantize nodes run eagerly in float: a simulation, on any machine",
        integer=False,
        rank=3,
        build=lambda request: request.graph,
    )
)
