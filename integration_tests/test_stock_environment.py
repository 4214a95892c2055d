"""An environment with torch, torchao and diffusers alone reads what this package has saved, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ptq4dit_ao import Recipe, quantize_pipeline
from ptq4dit_ao.recipe import Balance, Calibration
from ptq4dit_ao.testing.pipelines import tiny_sd3_pipeline

PACKAGES = ("torch", "torchao", "diffusers", "transformers", "accelerate", "safetensors", "numpy")
"""diffusers loads quantized models by accelerate, and a pipeline's text encoders by transformers."""

READER = """
import importlib.util, sys
import torch
from diffusers import DiffusionPipeline, SD3Transformer2DModel
from safetensors.torch import load_file, save_file

alone, folder, inputs, output = sys.argv[1:]
assert (importlib.util.find_spec("ptq4dit_ao") is None) == (alone == "alone")
torch.set_num_threads(1)
model = SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer", torch_dtype=torch.float32)
with torch.no_grad():
    y = model(**load_file(inputs), return_dict=False)[0]
pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
image = pipe("a red fox", height=32, width=32, num_inference_steps=4, guidance_scale=3.0, output_type="pt",
             generator=torch.Generator().manual_seed(0)).images
kind = type(model.transformer_blocks[0].attn.to_q.weight).__name__
save_file({"y": y.contiguous(), "image": image.contiguous()}, output, {"kind": kind})
"""


def read(python: str | Path, how: str, folder: Path, where: Path) -> dict[str, torch.Tensor]:
    (where / "reader.py").write_text(READER)
    command = [str(python), "reader.py", how, str(folder), "inputs.safetensors", f"{how}.safetensors"]
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(where / f"{how}.safetensors")


@pytest.mark.slow
def test_a_saved_pipeline_is_read_by_diffusers_alone(tmp_path):
    recipe = Recipe(
        layers="paper",
        balance=Balance(sites="all"),
        calibration=Calibration(timesteps=2, steps=4, guidance=3.0, batch_size=2),
    )
    recipes: dict[str, Any] = {"transformer": recipe, "text_encoder_3": "int8_weight_only"}
    pipeline, call = tiny_sd3_pipeline(), {"height": 32, "width": 32}
    quantize_pipeline(pipeline, recipes, ["a lighthouse", "two foxes"], call=call, output=tmp_path / "q")
    config, g = pipeline.transformer.config, torch.Generator().manual_seed(1)
    inputs = {
        "hidden_states": torch.randn(2, 4, 16, 16, generator=g),
        "encoder_hidden_states": torch.randn(2, 9, config.joint_attention_dim, generator=g),
        "pooled_projections": torch.randn(2, config.pooled_projection_dim, generator=g),
        "timestep": torch.tensor([900.0, 100.0]),
    }
    save_file(inputs, tmp_path / "inputs.safetensors")
    here = read(sys.executable, "here", tmp_path / "q", tmp_path)

    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    wanted = [f"{name}=={version(name)}" for name in PACKAGES]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True, env=environment)
    alone = read(python, "alone", tmp_path / "q", tmp_path)
    assert torch.equal(alone["y"], here["y"]) and torch.equal(alone["image"], here["image"])
    assert alone["image"].isfinite().all() and alone["image"].std() > 0
