"""Time of one linear by the form of its input: ``python integration_tests/measure/weight_only.py``.

At DiT-XL/2 width: adaLN's modulation (2 rows) and linears of tokens (256 and 1024 rows), eager, in interleaved rounds.
The forms are float, integer weights with a static input, with tokens quantized at run time, and with a float input.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from ptq4dit_ao.core.qparams import FLOAT_BITS
from ptq4dit_ao.metrics import measure_latency
from ptq4dit_ao.modules.weight import StaticInt8Weight

SIZES = ((2, 1152, 6912), (256, 1152, 4608), (1024, 1152, 1152))


@torch.no_grad()
def main() -> None:
    print("| dtype | rows | C_in, C_out | form | ms | of float |\n|---|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        for rows, c_in, c_out in SIZES:
            x = torch.randn(rows, c_in, dtype=dtype)
            integers = torch.randint(-127, 128, (c_out, c_in), dtype=torch.int8)
            weights = {"float": torch.randn(c_out, c_in, dtype=dtype)}
            for form, x_bits in (("static", 8), ("token", 8), ("weight-only", FLOAT_BITS)):
                weights[form] = StaticInt8Weight.of(
                    integers,
                    torch.full((c_out,), 0.01),
                    1 / 128 if form == "token" else 0.03,
                    128,
                    bits=8,
                    x_bits=x_bits,
                    x_ndim=2,
                    dtype=dtype,
                    dynamic=form == "token",
                )
            runs = {form: lambda x, weight=weight: functional.linear(x, weight) for form, weight in weights.items()}
            found = measure_latency(runs, (x,), rounds=40, warmup=3)
            for form, latency in found.items():
                ratio = latency.median_ms / found["float"].median_ms
                name = str(dtype).removeprefix("torch.")
                print(f"| {name} | {rows} | {c_in}, {c_out} | {form} | {latency.median_ms:.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
