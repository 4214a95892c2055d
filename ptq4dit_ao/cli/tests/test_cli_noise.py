"""What a user of the command line does not see of other libraries, and what is not hidden."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from ptq4dit_ao.cli.noise import ENVIRONMENT, silence

LOADING = "loading torch and torchao, which takes some seconds\n"
LINES = {
    "torchao": "Failed to load /a b/torchao/_C_mxfp8.cpython-310-x86_64-linux-gnu.so: Could not load this library",
    "torchao.kernel.intmm": "Warning: Detected no triton, on systems without Triton certain kernels will not work",
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects. This may affect",
    "diffusers.models.modeling_utils": "There are modules in DiT that should be kept in float32: []. Casting directly",
    "torch.utils._pytree": "<enum 'KernelPreference'> is an Enum subclass and is now natively supported by",
    "torch.onnx._internal.exporter._registration": "torchvision is not installed. Skipping torchvision::nms",
}
NOISE = ("profiler_st", "Failed to load", "triton", "Enum subclass", "torchvision", "Deprecat", "FutureWarning")
MODELS = """
import logging, warnings

from models_for_the_noise import pixels as quiet


def pixels():
    warnings.warn("deprecated: weights of 2021")
    warnings.warn("the old way", FutureWarning)
    logging.getLogger("torch.mine").warning("a line of the model")
    return quiet()
"""
QUIET = """
from diffusers import DiTTransformer2DModel

from ptq4dit_ao.evaluation.bench.random_dit import randomize_


def pixels():
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=1, num_layers=1, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10,
    )
    return randomize_(model, seed=0)
"""
RECIPE = """
version: 1
extends: digits_w8a8
model: models_for_the_noise:pixels
calibration: {timesteps: 2, samples: 2, steps: 2}
evaluation: {timesteps: 2, samples: 2}
"""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    """A folder with a recipe, a model of it, and one that warns; ``q`` is the model, quantized."""
    folder = tmp_path_factory.mktemp("noise")
    (folder / "models_for_the_noise.py").write_text(QUIET)
    (folder / "models_that_warn.py").write_text(MODELS)
    (folder / "tiny.yaml").write_text(RECIPE)
    code, _, err = command(folder, "quantize tiny.yaml --output q")
    assert (code, err) == (0, LOADING)
    return folder


def command(folder: Path, line: str) -> tuple[int, str, str]:
    """A command line in a process of its own, as a user sees it: no filter of this process counts."""
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONWARNINGS" and k not in ENVIRONMENT}
    environment = {**inherited, "PYTHONPATH": str(folder), "COLUMNS": "80", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "ptq4dit_ao", *line.split()], cwd=folder, env=environment, capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("line", ["inspect q --backend fbgemm"])
def test_only_what_is_loaded_is_said(workshop, line):
    code, out, err = command(workshop, line)
    assert (code, err) == (0, LOADING)
    assert not [noise for noise in NOISE if noise in out]
    assert not [row for row in out.splitlines() if row[:1] in set("┏┃┡│└") and len(row) > 80]


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    [
        "backends",
        "sample q --backend fbgemm --steps 2 --per-class 1",
        "sample q --backend openvino --steps 2 --per-class 1",
        "sample q --backend onnx --steps 2 --per-class 1",
        "export q --backend onnx --output m.onnx",
        "export q --backend openvino --output m.xml",
        "evaluate q --samples 4 --steps 2 --backend reference fbgemm --features digits",
        "bench --width dit-s --blocks 1 --backends fbgemm --rounds 1 --no-bf16",
        "table --methods minmax --bits w8a8 --steps 2 --samples 4 --calibration-images 2 --output t --features digits",
    ],
)
def test_no_command_lets_other_libraries_speak(workshop, line):
    test_only_what_is_loaded_is_said(workshop, line)


def test_verbose_shows_them(workshop):
    code, _, err = command(workshop, "inspect q --backend fbgemm -v")
    assert code == 0 and all(noise in err for noise in ("profiler_start", "profiler_stop"))
    assert "Enum subclass" in err or "Failed to load" in err  # of these versions of torch and torchao


def test_what_a_model_says_is_shown(workshop):
    code, _, err = command(workshop, "quantize tiny.yaml --model models_that_warn:pixels --output warned")
    assert code == 0
    for line in ("deprecated: weights of 2021", "the old way", "a line of the model"):
        assert err.count(line) >= 1
    assert not [noise for noise in NOISE[:-1] if noise in err]


def test_each_line_is_silenced_by_its_source_and_its_text(caplog):
    silence()
    for name, line in LINES.items():
        logging.getLogger(name).warning("%s", line)
        logging.getLogger(name).warning("another line")
        logging.getLogger("mine").warning("%s", line)
    shown = [(record.name, record.getMessage()) for record in caplog.records]
    assert shown == [pair for name, line in LINES.items() for pair in ((name, "another line"), ("mine", line))]


@pytest.mark.parametrize(
    ("category", "text", "module", "shown"),
    [
        (FutureWarning, "`isinstance(treespec, LeafSpec)` is deprecated", "copyreg", False),
        (FutureWarning, "anything", "torch.export.something", False),
        (DeprecationWarning, "`torch.jit.script_method` is deprecated", "torch.jit._script", False),
        (UserWarning, "torch.quantize_per_tensor is deprecated", "ptq4dit_ao.lowering.fbgemm", False),
        (UserWarning, "To copy construct from a tensor, it is", "torch._inductor.mkldnn_lowerings", False),
        (UserWarning, "Int8Tensor does not implement _stable_hash_for_caching.", "torch._functorch._x.cache", False),
        (UserWarning, "the model's mask is empty", "torch.nn.functional", True),
        (UserWarning, "To copy construct from a tensor, it is", "mine", True),
        (UserWarning, "torch.quantize_per_tensor is deprecated", "mine", True),
        (FutureWarning, "anything", "torch_of_mine", True),
        (FutureWarning, "the configuration of this scheduler is outdated", "diffusers.utils", True),
        (RuntimeWarning, "overflow", "torch.export", True),
    ],
)
def test_warnings_are_silenced_by_category_module_and_text(category, text, module, shown):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        silence()
        warnings.warn_explicit(text, category, "file.py", 1, module=module)
    assert bool(seen) is shown


def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv("KINETO_LOG_LEVEL", "1")
    silence()
    assert os.environ["KINETO_LOG_LEVEL"] == "1"
