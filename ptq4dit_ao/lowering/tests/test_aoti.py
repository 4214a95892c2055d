"""AOTInductor packages: what is written, what is refused, and the same numbers from Python and C++."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ptq4dit_ao.core.metrics import sqnr_db
from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.lowering import export_to, lower
from ptq4dit_ao.lowering.onednn_verbose import count_onednn_gemms
from ptq4dit_ao.lowering.x86_inductor import lacks

DOCS = Path(__file__).parents[3] / "docs" / "aoti.md"
LINEARS = 14

pytestmark = [pytest.mark.x86, pytest.mark.skipif(lacks() is not None, reason=str(lacks()))]


def batch_of(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.arange(rows * 256).reshape(rows, 4, 8, 8).sin()
    return x, torch.arange(rows) * 70, torch.arange(rows) % 10


@pytest.fixture(scope="module")
def package(quantized, tmp_path_factory) -> Path:
    return export_to(quantized(), "aoti", tmp_path_factory.mktemp("aoti") / "model")


def test_a_package_is_one_file_that_torch_loads_by_itself(quantized, package):
    assert package.name == "model.pt2" and list(package.parent.iterdir()) == [package]
    loaded = torch._inductor.aoti_load_package(str(package))
    for rows in (4, 1, 7):
        assert sqnr_db(quantized()(*batch_of(rows)), loaded(*batch_of(rows))) > 60
    assert count_onednn_gemms(loaded, batch_of(3)) == {"onednn::matmul(u8, s8)": LINEARS}


def test_inputs_of_another_layout_are_not_misread(quantized):
    lowered = lower(quantized(), "aoti")
    x, t, y = batch_of(3)
    across = x.transpose(0, 3).contiguous().transpose(0, 3)
    assert not across.is_contiguous() and torch.equal(lowered(across, t, y), lowered(x, t, y))
    with pytest.raises(ArgumentError, match=r"input 1 is torch.int64 \(1,\); .* compiled for torch.int64 \(3,\)"):
        lowered(x, t[:1], y)


def test_the_float_part_in_bfloat16(quantized, tiny_samples):
    converted = quantized()
    lowered = lower(converted, "aoti", float_dtype=torch.bfloat16)
    assert lowered.proof.integer_gemms == LINEARS
    output = lowered(*tiny_samples[0])
    assert output.dtype == torch.float32 and 30 < sqnr_db(converted(*tiny_samples[0]), output) < 60


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the command line is that of g++ on Linux")
def test_the_documented_program_computes_in_cpp_what_the_package_does_in_python(package, tmp_path):
    (source,) = re.findall(r"```cpp\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)
    (tmp_path / "sample.cpp").write_text(source)
    torch_folder = Path(torch.__file__).parent
    (command,) = re.findall(r"^\$ (g\+\+ .*)$", DOCS.read_text(), flags=re.MULTILINE)
    subprocess.run(f"TORCH={torch_folder}; {command}", shell=True, cwd=tmp_path, check=True)
    written = subprocess.run([tmp_path / "sample", package], stdout=subprocess.PIPE, check=True).stdout
    expected = torch._inductor.aoti_load_package(str(package))(*batch_of(3))
    assert torch.equal(torch.from_numpy(np.frombuffer(written, np.float32).copy()).view_as(expected), expected)


def test_quantized_attention_is_simulated_and_the_linears_before_it_stay_integer(quantized, caplog):
    converted = quantized(attention_bits=8)
    lowered = lower(converted, "aoti")
    assert lowered.proof.integer_gemms >= LINEARS
    assert str(lowered.proof).endswith("; attention: 4 matmuls simulated in float")
    assert "'aoti' has no integer kernels for 4 of 4 quantized matmuls of attention" in caplog.text
    for rows in (2, 5):
        assert sqnr_db(converted(*batch_of(rows)), lowered(*batch_of(rows))) > 40
