"""A model that was quantized at one size draws at others in a pipeline that gives sizes as numbers."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ptq4dit_ao.calibration import collect_from_pipeline
from ptq4dit_ao.capture.signature import tensors_like
from ptq4dit_ao.recipe import Balance, Recipe
from ptq4dit_ao.testing.zoo import FAMILIES
from ptq4dit_ao.workflow import apply_recipe, as_diffusers_transformer, load_quantized


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ltx_pipeline(model: nn.Module) -> Any:
    vae = diffusers.AutoencoderKLLTXVideo(
        block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), layers_per_block=(1, 1), latent_channels=8
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipeline = diffusers.LTXPipeline(scheduler, vae, None, None, model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def qwen_pipeline(model: nn.Module) -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipeline = diffusers.QwenImagePipeline(scheduler, None, None, None, model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def asked(kind: Any, rows: int, height: int, width: int) -> dict[str, Any]:
    call: dict[str, Any] = {"height": height, "width": width, "num_inference_steps": 2, "output_type": "latent"}
    channels = 20 if kind is ltx_pipeline else 24
    call |= {"prompt_embeds": noise(rows, 7, channels), "negative_prompt_embeds": noise(rows, 7, channels, seed=1)}
    mask = torch.ones(rows, 7, dtype=torch.int64)
    if kind is ltx_pipeline:
        return {**call, "prompt_attention_mask": mask, "negative_prompt_attention_mask": mask, "num_frames": 9}
    return {**call, "prompt_embeds_mask": mask, "negative_prompt_embeds_mask": mask, "true_cfg_scale": 3.0}


@pytest.mark.parametrize(("kind", "name"), [(ltx_pipeline, "ltx"), (qwen_pipeline, "qwenimage")])
def test_a_pipeline_draws_at_a_size_that_it_was_not_recorded_at(kind, name, tmp_path):
    pipeline = kind(FAMILIES[name].model())
    samples = collect_from_pipeline(pipeline, None, timesteps=2, steps=2, call=asked(kind, 2, 128, 96))
    assert samples.signature is not None and set(samples.signature.numbers) <= set(samples.shared)
    quantized = apply_recipe(pipeline.transformer, Recipe(balance=Balance(method="none")), samples)
    quantized.save(tmp_path / "model")
    module = as_diffusers_transformer(load_quantized(tmp_path / "model"), backend="reference")
    calls: list[tuple[dict[str, Any], Any]] = []

    def keep(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        calls.append((kwargs, output))

    module.register_forward_hook(keep, with_kwargs=True)
    pipeline.transformer = module
    for rows, height, width in ((1, 64, 192), (2, 96, 160)):
        pipeline(**asked(kind, rows, height, width), generator=torch.Generator().manual_seed(0))
        given, output = calls[-1]
        signature = quantized.captured.call
        original = FAMILIES[name].model()
        arguments = {name: x for name, x in given.items() if name != "return_dict"}
        tensors = tensors_like(signature, original, arguments)
        assert torch.equal(tree_leaves(output)[0], quantized.graph(*tensors))
        assert tree_leaves(output)[0].shape[0] in (rows, 2 * rows)
