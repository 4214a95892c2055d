"""``aoti``: ahead-of-time compilation as in ``x86_inductor``, to a file that Python and C++ load without a compiler.

Without freezing, AOTInductor matches no int8 pattern and silently packages a float program (pytorch/ao#4566). The proof
detects that, because it counts the primitives that oneDNN reports.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch._inductor import config as inductor_config

from ptq4dit_ao.lowering.backend import Backend, Request, Runnable, register
from ptq4dit_ao.lowering.machine import saturates
from ptq4dit_ao.lowering.onednn_verbose import count_onednn_gemms
from ptq4dit_ao.lowering.program import as_program, check_inputs, inputs_of
from ptq4dit_ao.lowering.x86_inductor import INT8, SETTINGS, lacks, prepare

SUFFIX = ".pt2"


def build(request: Request) -> Runnable:
    """Compile to a temporary file and load it."""
    with tempfile.TemporaryDirectory() as folder:
        return write(request, Path(folder) / f"model{SUFFIX}")


def write(request: Request, path: Path) -> Runnable:
    """Write the package and load it."""
    prepare(request)
    program = as_program(request.graph, request.example_inputs)
    # Inductor writes its intermediate files here. By default they would be a copy of the weights in its cache.
    remains = str(path.with_name("inductor"))
    with torch.no_grad(), inductor_config.patch({**SETTINGS, "aot_inductor.output_path": remains}):
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    package = torch._inductor.aoti_load_package(str(path))
    expected = inputs_of(program)

    def run(*inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        check_inputs(inputs, expected)
        return package(*(x.contiguous() for x in inputs))

    return run


register(
    Backend(
        name="aoti",
        summary="AOTInductor package: compiled once, loaded from Python or C++ without a compiler",
        integer=True,
        carries=INT8,
        refuse=saturates,
        lacks=lacks,
        build=build,
        count=count_onednn_gemms,
        write=write,
        compiles=True,
        prunes=True,
        suffix=SUFFIX,
    )
)
