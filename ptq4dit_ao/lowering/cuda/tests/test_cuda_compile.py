"""The kernels compile to integer tensor-core instructions, which Triton can tell without a GPU."""

from __future__ import annotations

import os
import re

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton interprets here", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from ptq4dit_ao.lowering.cuda import kernels  # noqa: E402

pytestmark = pytest.mark.cuda

POINTERS = {
    "x_ptr": "*i8", "weight_ptr": "*i8", "scale_ptr": "*fp32", "bias_ptr": "*fp32", "correction_ptr": "*i32",
    "out_ptr": "*bf16", "steps_ptr": "*u8", "table_ptr": "*i8",
}  # fmt: skip
AMPERE, HOPPER = 80, 90
INT8_PRODUCTS = {AMPERE: r"mma\.sync\.\S*\.s32\.s8\.s8\.s32", HOPPER: r"(wgmma\.mma_async|mma)\.sync\.\S*\.s32\.s8\.s8"}


@pytest.mark.parametrize("tile", kernels.TILES, ids=lambda tile: "x".join(map(str, tile[:3])))
@pytest.mark.parametrize("capability", [AMPERE, HOPPER])
@pytest.mark.parametrize("kernel", ["int8_linear_kernel", "int4_linear_kernel", "expanded_linear_kernel"])
def test_it_multiplies_on_integer_tensor_cores(kernel, capability, tile):
    function = getattr(kernels, kernel).fn
    m, n, k, warps, stages = tile
    constants = {"HAS_BIAS": True, "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}
    place = {name: i for i, name in enumerate(function.arg_names)}
    signature = {name: "constexpr" if name in constants else POINTERS.get(name, "i32") for name in place}
    aligned = [name for name in place if name in POINTERS or name in ("N", "K", "half", "group")]
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(place[name],): value for name, value in constants.items()},
        attrs={(place[name],): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert re.search(INT8_PRODUCTS[capability], compiled.asm["ptx"])
    assert len(compiled.asm["cubin"]) > 0
