"""Image-to-image, video-to-video and two experts: they draw with a quantized transformer, or it refuses the call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from ptq4dit_ao import apply_recipe, as_diffusers_transformer, collect_from_pipeline
from ptq4dit_ao.core import sqnr_db
from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.recipe import Balance, Recipe
from ptq4dit_ao.testing.zoo import FAMILIES

PLAIN = Recipe(balance=Balance(method="none"))
FLOW = diffusers.FlowMatchEulerDiscreteScheduler
STEPS = 5


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text(width: int, *, negative: bool = True) -> dict[str, Tensor]:
    return {"prompt_embeds": noise(1, 7, width)} | (
        {"negative_prompt_embeds": noise(1, 7, width, seed=1)} if negative else {}
    )


def image_vae(channels: int = 4) -> nn.Module:
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        latent_channels=channels,
        norm_num_groups=4,
        shift_factor=0.1,
    )


def wan_vae() -> nn.Module:
    return diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1] * 4, num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )


def qwen_vae() -> nn.Module:
    return diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1] * 4, num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )


def ltx_vae() -> nn.Module:
    widths = (8,) * 4
    return diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=widths,
        decoder_block_out_channels=widths,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
    )


def unipc() -> Any:
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A pipeline of a family, and what it is called with."""

    family: str
    pipeline: Callable[[Any], Any]
    call: dict[str, Any]

    @functools.cached_property
    def float_pipeline(self) -> Any:
        return self.with_transformer(FAMILIES[self.family].model())

    def with_transformer(self, transformer: Any) -> Any:
        pipeline = self.pipeline(transformer)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @functools.cached_property
    def quantized(self) -> Any:
        samples = collect_from_pipeline(self.float_pipeline, None, timesteps=2, steps=STEPS, call=self.call)
        return as_diffusers_transformer(
            apply_recipe(self.float_pipeline.transformer, PLAIN, samples), backend="reference"
        )

    def draw(self, pipeline: Any) -> Tensor:
        """Equal noise for every pipeline."""
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)
        latents = pipeline(**self.call, num_inference_steps=STEPS, output_type="latent", generator=generator)[0]
        return torch.as_tensor(latents)

    def loss_db(self, transformer: Any) -> float:
        """What drawing with another transformer changes; the parts that are random otherwise are kept."""
        pipeline, original = self.float_pipeline, self.float_pipeline.transformer
        expected = self.draw(pipeline)
        try:
            pipeline.transformer = transformer
            return sqnr_db(expected, self.draw(pipeline))
        finally:
            pipeline.transformer = original


SIZE = {"height": 64, "width": 64}
PICTURE = noise(1, 3, 64, 64).clamp(0, 1)
FRAMES = noise(1, 5, 3, 64, 64).clamp(0, 1)
HALF = torch.zeros(1, 1, 64, 64).index_fill(3, torch.arange(32), 1.0)
POOLED = {"pooled_prompt_embeds": noise(1, 16)}
SD3 = {**SIZE, **text(24), **POOLED, "negative_pooled_prompt_embeds": noise(1, 16, seed=1)}
FLUX = {**SIZE, **text(24, negative=False), **POOLED}
WAN = {**SIZE, **text(20)}
LTX = {**SIZE, **text(20), "num_frames": 9} | {
    name: torch.ones(1, 7, dtype=torch.int64) for name in ("prompt_attention_mask", "negative_prompt_attention_mask")
}
QWEN = {**SIZE, **text(24), "true_cfg_scale": 3.0} | {
    name: torch.ones(1, 7, dtype=torch.int64) for name in ("prompt_embeds_mask", "negative_prompt_embeds_mask")
}
FROM_IMAGE = {"image": PICTURE, "strength": 0.6}

SHIFTED = functools.partial(FLOW, use_dynamic_shifting=True)
VARIANTS = {
    "sd3": Variant(
        family="sd3", pipeline=lambda m: diffusers.StableDiffusion3Pipeline(m, FLOW(shift=3.0), *[None] * 7), call=SD3
    ),
    "sd3 image to image": Variant(
        family="sd3",
        pipeline=lambda m: diffusers.StableDiffusion3Img2ImgPipeline(m, FLOW(shift=3.0), image_vae(), *[None] * 6),
        call=SD3 | FROM_IMAGE,
    ),
    "flux": Variant(family="flux", pipeline=lambda m: diffusers.FluxPipeline(SHIFTED(), *[None] * 5, m), call=FLUX),
    "flux image to image": Variant(
        family="flux",
        pipeline=lambda m: diffusers.FluxImg2ImgPipeline(SHIFTED(), image_vae(), *[None] * 4, m),
        call=FLUX | FROM_IMAGE,
    ),
    "flux inpainting": Variant(
        family="flux",
        pipeline=lambda m: diffusers.FluxInpaintPipeline(SHIFTED(), image_vae(), *[None] * 4, m),
        call=FLUX | FROM_IMAGE | {"mask_image": HALF},
    ),
    "wan": Variant(
        family="wan",
        pipeline=lambda m: diffusers.WanPipeline(None, None, None, unipc(), m),
        call=WAN | {"num_frames": 5},
    ),
    "wan video to video": Variant(
        family="wan",
        pipeline=lambda m: diffusers.WanVideoToVideoPipeline(None, None, m, wan_vae(), unipc()),
        call=WAN | {"video": FRAMES, "strength": 0.6},
    ),
    "qwen": Variant(
        family="qwenimage",
        pipeline=lambda m: diffusers.QwenImagePipeline(SHIFTED(), None, None, None, m),
        call=QWEN,
    ),
    "qwen image to image": Variant(
        family="qwenimage",
        pipeline=lambda m: diffusers.QwenImageImg2ImgPipeline(SHIFTED(), qwen_vae(), None, None, m),
        call=QWEN | FROM_IMAGE,
    ),
    "ltx": Variant(
        family="ltx", pipeline=lambda m: diffusers.LTXPipeline(SHIFTED(), None, None, None, m), call=LTX
    ),
    "ltx image to video": Variant(
        family="ltx",
        pipeline=lambda m: diffusers.LTXImageToVideoPipeline(SHIFTED(), ltx_vae(), None, None, m),
        call=LTX | {"image": PICTURE},
    ),
    "ltx conditions": Variant(
        family="ltx",
        pipeline=lambda m: diffusers.LTXConditionPipeline(FLOW(), ltx_vae(), None, None, m),
        call=LTX | {"image": PICTURE},
    ),
}  # fmt: skip


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "name",
    [
        "sd3 image to image",
        slow("flux image to image"),
        slow("flux inpainting"),
        slow("wan video to video"),
        slow("ltx image to video"),
        slow("ltx conditions"),
    ],
)
def test_a_pipeline_draws_with_what_was_recorded_from_it(name):
    assert VARIANTS[name].loss_db(VARIANTS[name].quantized) > 20


@pytest.mark.parametrize(
    ("recorded", "name"),
    [
        ("sd3", "sd3 image to image"),
        slow("flux", "flux image to image"),
        slow("flux", "flux inpainting"),
        slow("qwen", "qwen image to image"),
        slow("wan", "wan video to video"),
    ],
)
def test_a_model_that_was_recorded_from_text_serves_a_pipeline_that_calls_it_so(recorded, name):
    assert VARIANTS[name].loss_db(VARIANTS[recorded].quantized) > 15


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ltx image to video", r"timestep has shape \(2, 8\), the graph was captured for \(2,\)"),
        (
            "ltx conditions",
            "argument 'num_frames' of LTXVideoTransformer3DModel is None, but the graph was captured with a size",
        ),
    ],
)
def test_a_pipeline_that_calls_its_transformer_otherwise_is_refused(name, message):
    """LTX has a time for each token, or positions in pixels, where it is given an image."""
    with pytest.raises(ArgumentError, match=message):
        VARIANTS[name].loss_db(VARIANTS["ltx"].quantized)


def test_skip_layer_guidance_is_refused_in_the_call_that_skips():
    skips = Variant(
        family="sd3",
        pipeline=VARIANTS["sd3"].pipeline,
        call={**SD3, "skip_guidance_layers": [0], "skip_layer_guidance_stop": 0.9},
    )
    with pytest.raises(
        ArgumentError, match=r"argument 'skip_layers' of SD3Transformer2DModel is \[0\], but the graph was"
    ):
        skips.loss_db(VARIANTS["sd3"].quantized)


@pytest.mark.slow
def test_both_experts_of_wan_are_quantized():
    call = WAN | {"num_frames": 5}
    pipeline = diffusers.WanPipeline(
        None, None, None, unipc(), *(FAMILIES["wan"].model(seed=seed) for seed in (0, 1)), boundary_ratio=0.5
    )
    pipeline.set_progress_bar_config(disable=True)
    run = functools.partial(pipeline, **call, num_inference_steps=STEPS, output_type="latent")
    expected = run(generator=torch.Generator().manual_seed(0))[0]
    for component in ("transformer", "transformer_2"):
        samples = collect_from_pipeline(pipeline, None, component=component, timesteps=2, steps=STEPS, call=call)
        model = apply_recipe(getattr(pipeline, component), PLAIN, samples)
        setattr(pipeline, component, as_diffusers_transformer(model, backend="reference"))
    assert sqnr_db(expected, run(generator=torch.Generator().manual_seed(0))[0]) > 15
