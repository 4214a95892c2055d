"""Tiny image and audio transformers of diffusers, and Facebook's DiT.

Before each builder is a function that makes the arguments that its pipeline passes: integer or fractional timesteps,
masks, pooled embeddings, guidance.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Generator, Tensor, nn

from ptq4dit_ao.testing.facebook_dit import DiT
from ptq4dit_ao.testing.zoo.draw import int_timesteps, mask, noise, timesteps
from ptq4dit_ao.testing.zoo.family import Inputs, family

TEXT, TEXT_WIDTH = 7, 24
"""Number of tokens of a prompt, and the width of their embeddings."""
GRID = 4
"""Number of image tokens along each side."""
TOKENS = GRID * GRID


def _diffusers() -> ModuleType:
    import diffusers  # a slow import, and an optional dependency

    return diffusers


def text(g: Generator, batch: int, width: int = TEXT_WIDTH) -> Tensor:
    """Random embeddings of a prompt, (batch, TEXT, width)."""
    return noise(g, batch, TEXT, width)


def fractions(g: Generator, batch: int) -> Tensor:
    """Random times of a flow in (0, 1), (batch,)."""
    return timesteps(g, batch, 0.02, 0.98)


def guidance(g: Generator, batch: int) -> Tensor:
    """Random guidance scales of a distilled model, (batch,)."""
    return timesteps(g, batch, 1.0, 6.0)


def grid_ids(axes: int, *, first: int = 1) -> Tensor:
    """Positions of image tokens, (TOKENS, axes): row and column at axes ``first`` and ``first + 1``, 0 elsewhere."""
    ids = torch.zeros(GRID, GRID, axes)
    ids[..., first] = torch.arange(GRID)[:, None]
    ids[..., first + 1] = torch.arange(GRID)
    return ids.reshape(TOKENS, axes)


def text_ids(axes: int, *at: int) -> Tensor:
    """Positions of words, (TEXT, axes): the word's index at the axes ``at``, 0 elsewhere."""
    ids = torch.zeros(TEXT, axes)
    ids[:, at] = torch.arange(TEXT, dtype=ids.dtype)[:, None]
    return ids


def per_sample(ids: Tensor, batch: int) -> Tensor:
    """The same ids for each sample, with the batch as first axis."""
    return ids.repeat(batch, *[1] * ids.ndim)


def pixels(g: Generator, batch: int, count: int, *, most: int = 1024) -> Tensor:
    """Random lengths in pixels, (batch, count), multiples of 16, which bfloat16 can represent."""
    return 16.0 * torch.randint(0, most // 16, (batch, count), generator=g)


def size_conditions(g: Generator, batch: int) -> Inputs:
    """SDXL's micro-conditions: size before the crop, target size, and position of the crop."""
    return {
        "original_size": 256 + pixels(g, batch, 2),
        "target_size": 256 + pixels(g, batch, 2),
        "crop_coords": pixels(g, batch, 2, most=128),
    }


# Class-conditional


def _dit_inputs(batch: int, g: Generator) -> Inputs:
    return {
        "hidden_states": noise(g, batch, 4, 8, 8),
        "timestep": int_timesteps(g, batch),
        "class_labels": torch.randint(0, 1000, (batch,), generator=g),
    }


@family("dit", "image", _dit_inputs)
def _dit() -> nn.Module:
    return _diffusers().DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8
    )


def _facebook_dit_inputs(batch: int, g: Generator) -> Inputs:
    x, t, y = _dit_inputs(batch, g).values()
    return {"x": x, "t": t, "y": y}


@family("facebook_dit", "image", _facebook_dit_inputs, note="the repository's own checkpoints, qkv in one linear")
def _facebook_dit() -> nn.Module:
    return DiT(input_size=8, hidden_size=32, depth=2, num_heads=4)


# PixArt and Sana


def _pixart_inputs(batch: int, g: Generator) -> Inputs:
    return {
        "hidden_states": noise(g, batch, 4, 8, 8),
        "encoder_hidden_states": text(g, batch),
        "encoder_attention_mask": mask(g, batch, TEXT),
        "timestep": int_timesteps(g, batch),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _pixart_alpha_1024_inputs(batch: int, g: Generator) -> Inputs:
    sizes = {
        "resolution": 512 + pixels(g, batch, 2),
        "aspect_ratio": timesteps(g, batch, 0.5, 2.0)[:, None],
    }
    return {**_pixart_inputs(batch, g), "added_cond_kwargs": sizes}


def _pixart(**config: object) -> nn.Module:
    return _diffusers().PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=12,  # size conditions need a width that is divisible by 3
        num_layers=2,
        cross_attention_dim=48,
        sample_size=8,
        caption_channels=TEXT_WIDTH,
        **config,
    )


@family("pixart_alpha", "image", _pixart_inputs)
def _pixart_alpha() -> nn.Module:
    return _pixart(use_additional_conditions=False)


@family("pixart_alpha_1024", "image", _pixart_alpha_1024_inputs, note="conditions on the size")
def _pixart_alpha_1024() -> nn.Module:
    return _pixart(use_additional_conditions=True, interpolation_scale=2)


@family("pixart_sigma", "image", _pixart_inputs)
def _pixart_sigma() -> nn.Module:
    return _pixart(use_additional_conditions=False, interpolation_scale=2)


def _sana_inputs(batch: int, g: Generator) -> Inputs:
    return {
        "hidden_states": noise(g, batch, 8, GRID, GRID),
        "encoder_hidden_states": text(g, batch),
        "encoder_attention_mask": mask(g, batch, TEXT),
        "timestep": timesteps(g, batch),
    }


def _sana_sprint_inputs(batch: int, g: Generator) -> Inputs:
    return {**_sana_inputs(batch, g), "timestep": fractions(g, batch), "guidance": guidance(g, batch)}


def _sana_of(**config: object) -> nn.Module:
    return _diffusers().SanaTransformer2DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=8,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=4,
        cross_attention_head_dim=16,
        cross_attention_dim=64,
        caption_channels=TEXT_WIDTH,
        sample_size=GRID,
        **config,
    )


@family("sana", "image", _sana_inputs, note="linear attention, convolutional feed-forward")
def _sana() -> nn.Module:
    return _sana_of()


@family("sana_sprint", "image", _sana_sprint_inputs, note="Sana with qk norm and guidance embedding")
def _sana_sprint() -> nn.Module:
    return _sana_of(guidance_embeds=True, qk_norm="rms_norm_across_heads")


# MM-DiT


def _sd3_inputs(batch: int, g: Generator) -> Inputs:
    return {
        "hidden_states": noise(g, batch, 4, 8, 8),
        "encoder_hidden_states": text(g, batch),
        "pooled_projections": noise(g, batch, 16),
        "timestep": timesteps(g, batch),
    }


def _sd3_of(layers: int, **config: object) -> nn.Module:
    return _diffusers().SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
        **config,
    )


@family("sd3", "image", _sd3_inputs)
def _sd3() -> nn.Module:
    return _sd3_of(3)  # the last block does not update the text


@family("sd35", "image", _sd3_inputs, note="SD3.5 medium: some blocks attend twice")
def _sd35() -> nn.Module:
    return _sd3_of(4, dual_attention_layers=(0, 1), qk_norm="rms_norm")


def _flux_inputs(batch: int, g: Generator) -> Inputs:
    return {
        "hidden_states": noise(g, batch, TOKENS, 16),
        "encoder_hidden_states": text(g, batch),
        "pooled_projections": noise(g, batch, 16),
        "timestep": fractions(g, batch),
        "guidance": guidance(g, batch),
        "img_ids": grid_ids(3),
        "txt_ids": torch.zeros(TEXT, 3),
    }


@family("flux", "image", _flux_inputs)
def _flux() -> nn.Module:
    return _diffusers().FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )


def _flux2_inputs(batch: int, g: Generator) -> Inputs:
    return {
        "hidden_states": noise(g, batch, TOKENS, 16),
        "encoder_hidden_states": text(g, batch),
        "timestep": fractions(g, batch),
        "guidance": guidance(g, batch),
        "img_ids": per_sample(grid_ids(4), batch),
        "txt_ids": per_sample(text_ids(4, 3), batch),
    }


@family("flux2", "image", _flux2_inputs, note="one modulation for all blocks, qkv and feed-forward in one linear")
def _flux2() -> nn.Module:
    return _diffusers().Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
    )


def _auraflow_inputs(batch: int, g: Generator) -> Inputs:
    return {
        "hidden_states": noise(g, batch, 4, 8, 8),
        "encoder_hidden_states": text(g, batch),
        "timestep": fractions(g, batch),
    }


@family("auraflow", "image", _auraflow_inputs, note="register tokens")
def _auraflow() -> nn.Module:
    return _diffusers().AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=32,
        pos_embed_max_size=64,
    )


def _hunyuan_dit_inputs(batch: int, g: Generator) -> Inputs:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    return {
        "hidden_states": noise(g, batch, 4, 8, 8),
        "timestep": timesteps(g, batch),
        "encoder_hidden_states": text(g, batch),
        "text_embedding_mask": mask(g, batch, TEXT),
        "encoder_hidden_states_t5": noise(g, batch, 8, 16),
        "text_embedding_mask_t5": mask(g, batch, 8),
        "image_meta_size": pixels(g, batch, 6),
        "style": torch.zeros(batch, dtype=torch.long),
        "image_rotary_emb": get_2d_rotary_pos_embed(16, ((0, 0), (GRID, GRID)), (GRID, GRID), output_type="pt"),
    }


@family("hunyuan_dit", "image", _hunyuan_dit_inputs, note="long skip connections")
def _hunyuan_dit() -> nn.Module:
    return _diffusers().HunyuanDiT2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=64,
        num_layers=6,  # the last two have a skip connection
        cross_attention_dim=TEXT_WIDTH,
        cross_attention_dim_t5=16,
        pooled_projection_dim=16,
        text_len=TEXT,
        text_len_t5=8,
    )


def _cogview_inputs(batch: int, g: Generator) -> Inputs:
    return {
        "hidden_states": noise(g, batch, 4, 8, 8),
        "encoder_hidden_states": text(g, batch),
        "timestep": int_timesteps(g, batch),
        **size_conditions(g, batch),
    }


def _cogview(name: str, **config: object) -> nn.Module:
    return getattr(_diffusers(), name)(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        text_embed_dim=TEXT_WIDTH,
        time_embed_dim=32,
        condition_dim=8,
        pos_embed_max_size=8,
        sample_size=8,
        **config,
    )


@family("cogview3plus", "image", _cogview_inputs)
def _cogview3plus() -> nn.Module:
    return _cogview("CogView3PlusTransformer2DModel")


@family("cogview4", "image", _cogview_inputs)
def _cogview4() -> nn.Module:
    return _cogview("CogView4Transformer2DModel", rope_axes_dim=(8, 8))


def _qwenimage_inputs(batch: int, g: Generator) -> Inputs:
    return {
        "hidden_states": noise(g, batch, TOKENS, 16),
        "encoder_hidden_states": text(g, batch),
        "encoder_hidden_states_mask": mask(g, batch, TEXT),
        "timestep": fractions(g, batch),
        "img_shapes": [[(1, GRID, GRID)]],  # only the first sample's is read; one each would fix the batch on export
    }


@family("qwenimage", "image", _qwenimage_inputs)
def _qwenimage() -> nn.Module:
    return _diffusers().QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 6, 6),
    )


def _z_image_inputs(batch: int, g: Generator) -> Inputs:
    return {
        "x": list(noise(g, batch, 4, 1, 8, 8)),
        "t": fractions(g, batch),
        "cap_feats": list(text(g, batch)),
    }


@family("z_image", "image", _z_image_inputs, dynamic_batch=False, note="samples come in lists, which fix the batch")
def _z_image() -> nn.Module:
    return _diffusers().ZImageTransformer2DModel(
        in_channels=4,
        dim=64,
        n_layers=2,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=TEXT_WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[64, 8, 8],
    )


# The transformers inside a UNet


def _unet_block_inputs(batch: int, g: Generator) -> Inputs:
    return {"hidden_states": noise(g, batch, 32, GRID, GRID), "encoder_hidden_states": text(g, batch)}


def _unet_block(**config: object) -> nn.Module:
    return _diffusers().Transformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=32,
        num_layers=2,
        norm_num_groups=8,
        cross_attention_dim=TEXT_WIDTH,
        **config,
    )


@family("sd1", "image", _unet_block_inputs, note="a transformer of the UNet, 1x1 convolutions around it")
def _sd1() -> nn.Module:
    return _unet_block()


@family("sdxl", "image", _unet_block_inputs, note="a transformer of the UNet, linears around it")
def _sdxl() -> nn.Module:
    return _unet_block(use_linear_projection=True)


# Descendants of Flux


def _plain_flux_inputs(batch: int, g: Generator) -> Inputs:
    return {
        "hidden_states": noise(g, batch, TOKENS, 16),
        "encoder_hidden_states": text(g, batch),
        "timestep": fractions(g, batch),
        "img_ids": grid_ids(3),
        "txt_ids": text_ids(3, 1, 2),
    }


def _flux_like(name: str, **config: object) -> nn.Module:
    return getattr(_diffusers(), name)(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 6, 6),
        **config,
    )


@family("longcat_image", "image", _plain_flux_inputs)
def _longcat_image() -> nn.Module:
    return _flux_like("LongCatImageTransformer2DModel")


@family("ovis_image", "image", _plain_flux_inputs)
def _ovis_image() -> nn.Module:
    return _flux_like("OvisImageTransformer2DModel", out_channels=16)


def _bria_inputs(batch: int, g: Generator) -> Inputs:
    return {**_plain_flux_inputs(batch, g), "timestep": timesteps(g, batch), "txt_ids": torch.zeros(TEXT, 3)}


@family("bria", "image", _bria_inputs)
def _bria() -> nn.Module:
    return _flux_like("BriaTransformer2DModel")


def _bria_fibo_inputs(batch: int, g: Generator) -> Inputs:
    words = torch.cat([mask(g, batch, TEXT).bool(), torch.ones(batch, TOKENS, dtype=torch.bool)], dim=1)
    return {
        **_bria_inputs(batch, g),
        "text_encoder_layers": [text(g, batch, TEXT_WIDTH // 2) for _ in range(4)],
        "joint_attention_kwargs": {"attention_mask": words[:, None, None]},
    }


@family("bria_fibo", "image", _bria_fibo_inputs, note="each block takes its own layer of the text encoder")
def _bria_fibo() -> nn.Module:
    return _flux_like("BriaFiboTransformer2DModel", text_encoder_dim=TEXT_WIDTH // 2)


def _bria_fibo2_inputs(batch: int, g: Generator) -> Inputs:
    return {
        "hidden_states": noise(g, batch, 4, 8, 8),
        "timestep": fractions(g, batch),
        "encoder_hidden_states": noise(g, batch, 3, TEXT, TEXT_WIDTH),
    }  # no mask: its sums are read on the host, which export cannot follow


@family(
    "bria_fibo2",
    "image",
    _bria_fibo2_inputs,
    dynamic_batch=False,
    note="makes a list as long as the batch, which fixes it; gist tokens, prompts without padding",
)
def _bria_fibo2() -> nn.Module:
    return _diffusers().BriaFibo2Transformer2DModel(
        in_channels=4,
        dim=64,
        n_layers=4,
        n_heads=4,
        cap_feat_dim=TEXT_WIDTH,
        injection_layer_ids=(1, 3),
        min_num_gist_tokens=4,
        max_num_gist_tokens=8,
        gist_step=4,
        gist_min_text_len=4,
        gist_max_text_len=8,
        axes_dims=(4, 6, 6),
        axes_lens=(32, 8, 8),
    )


def _flux3_inputs(batch: int, g: Generator) -> Inputs:
    return {
        "hidden_states": noise(g, batch, TOKENS, 16),
        "encoder_hidden_states": text(g, batch),
        "timestep": fractions(g, batch),
        "img_ids": grid_ids(4),
        "txt_ids": text_ids(4, 3),
        "image_cond_hidden_states": noise(g, batch, TOKENS, 16),
        "image_cond_ids": grid_ids(4) + torch.tensor([10.0, 0, 0, 0]),
    }


@family("flux3", "image", _flux3_inputs, note="with an image to edit, which has blocks of its own")
def _flux3() -> nn.Module:
    return _diffusers().Flux3Transformer2DModel(
        in_channels=16,
        cond_in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        timestep_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
    )


# Others


def _hunyuan_image_inputs(batch: int, g: Generator) -> Inputs:
    return {
        "hidden_states": noise(g, batch, 8, GRID, GRID),
        "timestep": timesteps(g, batch),
        "encoder_hidden_states": text(g, batch),
        "encoder_attention_mask": mask(g, batch, TEXT),
    }


@family("hunyuan_image", "image", _hunyuan_image_inputs, note="without glyph text, whose mask decides shapes")
def _hunyuan_image() -> nn.Module:
    return _diffusers().HunyuanImageTransformer2DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        text_embed_dim=TEXT_WIDTH,
        rope_axes_dim=(8, 8),
    )


def _prx_inputs(batch: int, g: Generator) -> Inputs:
    return {
        "hidden_states": noise(g, batch, 4, 8, 8),
        "timestep": fractions(g, batch),
        "encoder_hidden_states": text(g, batch),
        "attention_mask": mask(g, batch, TEXT).bool(),
    }


@family("prx", "image", _prx_inputs)
def _prx() -> nn.Module:
    return _diffusers().PRXTransformer2DModel(
        in_channels=4, context_in_dim=TEXT_WIDTH, hidden_size=64, num_heads=4, depth=2, axes_dim=[8, 8]
    )


def _krea2_inputs(batch: int, g: Generator) -> Inputs:
    return {
        "hidden_states": noise(g, batch, TOKENS, 16),
        "encoder_hidden_states": noise(g, batch, TEXT, 5, TEXT_WIDTH),
        "timestep": fractions(g, batch),
        "position_ids": torch.cat([torch.zeros(TEXT, 3), grid_ids(3)]),
        "encoder_attention_mask": mask(g, batch, TEXT).bool(),
    }


@family("krea2", "image", _krea2_inputs, note="attends over the layers of the text encoder")
def _krea2() -> nn.Module:
    return _diffusers().Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        timestep_embed_dim=32,
        text_hidden_dim=TEXT_WIDTH,
        num_text_layers=5,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=48,
        axes_dims_rope=(4, 6, 6),
    )


def _glm_image_inputs(batch: int, g: Generator) -> Inputs:
    sizes = size_conditions(g, batch)
    return {
        "hidden_states": noise(g, batch, 4, 8, 8),
        "encoder_hidden_states": text(g, batch),
        "prior_token_id": torch.randint(0, 64, (batch, TOKENS), generator=g),
        "prior_token_drop": torch.zeros(batch, TOKENS, dtype=torch.bool),
        "timestep": timesteps(g, batch),
        "target_size": sizes["target_size"],
        "crop_coords": sizes["crop_coords"],
    }


@family("glm_image", "image", _glm_image_inputs)
def _glm_image() -> nn.Module:
    return _diffusers().GlmImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        text_embed_dim=TEXT_WIDTH,
        time_embed_dim=32,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=64,
    )


def _ernie_image_inputs(batch: int, g: Generator) -> Inputs:
    return {
        "hidden_states": noise(g, batch, 8, GRID, GRID),
        "timestep": timesteps(g, batch),
        "text_bth": text(g, batch),
        "text_lens": mask(g, batch, TEXT).sum(1),
    }


@family("ernie_image", "image", _ernie_image_inputs, note="tokens come first, the batch second")
def _ernie_image() -> nn.Module:
    return _diffusers().ErnieImageTransformer2DModel(
        hidden_size=64,
        num_attention_heads=4,
        num_layers=2,
        ffn_hidden_size=96,
        in_channels=8,
        out_channels=8,
        text_in_dim=TEXT_WIDTH,
        rope_axes_dim=(4, 6, 6),
    )


def _ideogram4_inputs(batch: int, g: Generator) -> Inputs:
    words = mask(g, batch, TEXT).flip(1)  # padding on the left
    image = torch.ones(batch, TOKENS, dtype=torch.long)
    positions = (words.cumsum(1) - 1).clamp(min=0)[..., None].expand(-1, -1, 3)
    grid = (grid_ids(3).long() + 65536).expand(batch, -1, -1)
    return {
        "hidden_states": torch.cat([torch.zeros(batch, TEXT, 16), noise(g, batch, TOKENS, 16)], dim=1),
        "timestep": fractions(g, batch),
        "encoder_hidden_states": noise(g, batch, TEXT + TOKENS, TEXT_WIDTH),
        "position_ids": torch.cat([positions, grid], dim=1),
        "segment_ids": torch.cat([2 * words - 1, image], dim=1),  # 1, and -1 for padding
        "indicator": torch.cat([3 * words, 2 * image], dim=1),  # the codes of a word and of an image token
    }


@family("ideogram4", "image", _ideogram4_inputs, note="text and image packed into one sequence")
def _ideogram4() -> nn.Module:
    return _diffusers().Ideogram4Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        intermediate_size=96,
        adaln_dim=32,
        llm_features_dim=TEXT_WIDTH,
        mrope_section=(4, 2, 2),
    )


def _prior_inputs(batch: int, g: Generator) -> Inputs:
    return {
        "hidden_states": noise(g, batch, TEXT_WIDTH),
        "timestep": int_timesteps(g, batch),
        "proj_embedding": noise(g, batch, TEXT_WIDTH),
        "encoder_hidden_states": text(g, batch),
        "attention_mask": mask(g, batch, TEXT).bool(),
    }


@family("prior", "image", _prior_inputs, note="denoises one CLIP embedding, not an image")
def _prior() -> nn.Module:
    return _diffusers().PriorTransformer(
        num_attention_heads=4, attention_head_dim=8, num_layers=2, embedding_dim=TEXT_WIDTH, num_embeddings=TEXT
    )


def _nucleusmoe_image_inputs(batch: int, g: Generator) -> Inputs:
    inputs = _qwenimage_inputs(batch, g)
    return {**inputs, "encoder_hidden_states_mask": inputs["encoder_hidden_states_mask"].bool()}


@family("nucleusmoe_image", "image", _nucleusmoe_image_inputs, note="mixture of experts, their weights in one tensor")
def _nucleusmoe_image() -> nn.Module:
    return _diffusers().NucleusMoEImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=6,  # the first three and the last have no experts
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 6, 6),
        num_experts=4,
        moe_intermediate_dim=32,
        capacity_factors=2.0,
    )


def _joyimage_inputs(batch: int, g: Generator) -> Inputs:
    return {
        "hidden_states": noise(g, batch, 2, 4, 1, 8, 8),
        "timestep": timesteps(g, batch),
        "encoder_hidden_states": text(g, batch),
    }


@family("joyimage", "image", _joyimage_inputs, note="the image to edit and the one to draw")
def _joyimage() -> nn.Module:
    return _diffusers().JoyImageEditTransformer3DModel(
        in_channels=4,
        hidden_size=64,
        num_attention_heads=4,
        text_dim=TEXT_WIDTH,
        num_layers=2,
        rope_dim_list=[4, 6, 6],
    )


def _qwenimage21_inputs(batch: int, g: Generator) -> Inputs:
    slots = torch.arange(TEXT + TOKENS // 4) >= TEXT  # one slot for four image tokens
    return {
        **_nucleusmoe_image_inputs(batch, g),
        "img_mask": slots.expand(batch, -1).clone(),
    }


@family(
    "qwenimage21",
    "image",
    _qwenimage21_inputs,
    note="text and images in one sequence, with attention by blocks; one mask in the exported graph",
)
def _qwenimage21() -> nn.Module:
    return _diffusers().QwenImage21Transformer2DModel(
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        context_in_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 6, 6),
    )


@family("dreamlite", "image", _unet_block_inputs, note="a transformer of the UNet with few key and value heads")
def _dreamlite() -> nn.Module:
    from diffusers.models.attention_processor import Attention
    from diffusers.models.unets.unet_dreamlite import DreamLiteAttnProcessor2_0

    model = _diffusers().DreamLiteTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=32,
        num_layers=2,
        norm_num_groups=8,
        cross_attention_dim=TEXT_WIDTH,
        use_linear_projection=True,
        qk_norm="rms_norm",
        num_kv_heads=2,
        ff_mult=3,
    )
    for module in model.modules():
        if isinstance(module, Attention):  # the UNet does this too; the default processor cannot share heads
            module.set_processor(DreamLiteAttnProcessor2_0())  # type: ignore[arg-type]
    return model


# Audio


def _stable_audio_inputs(batch: int, g: Generator) -> Inputs:
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    return {
        "hidden_states": noise(g, batch, 8, TOKENS),
        "timestep": fractions(g, batch),
        "encoder_hidden_states": text(g, batch),
        "global_hidden_states": noise(g, batch, 1, 16),
        "rotary_embedding": get_1d_rotary_pos_embed(8, TOKENS + 1, use_real=True, repeat_interleave_real=False),
    }


@family("stable_audio", "audio", _stable_audio_inputs, note="grouped-query cross attention")
def _stable_audio() -> nn.Module:
    return _diffusers().StableAudioDiTModel(
        sample_size=TOKENS,
        in_channels=8,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        out_channels=8,
        cross_attention_dim=32,
        time_proj_dim=32,
        global_states_input_dim=16,
        cross_attention_input_dim=TEXT_WIDTH,
    )


def _stable_audio3_inputs(batch: int, g: Generator) -> Inputs:
    return {
        "hidden_states": noise(g, batch, 8, TOKENS),
        "timestep": fractions(g, batch),
        "encoder_hidden_states": text(g, batch),
        "global_hidden_states": noise(g, batch, 16),
        "encoder_attention_mask": mask(g, batch, TEXT),
        "local_add_cond": noise(g, batch, 9, TOKENS),
    }


@family("stable_audio3", "audio", _stable_audio3_inputs, note="as inpainting calls it; differential attention")
def _stable_audio3() -> nn.Module:
    return _diffusers().StableAudio3DiTModel(
        io_channels=8,
        embed_dim=64,
        depth=2,
        num_heads=2,
        cond_token_dim=TEXT_WIDTH,
        global_cond_dim=16,
        local_add_cond_dim=9,
        timestep_features_dim=32,
        num_memory_tokens=4,
    )


def _ace_step_inputs(batch: int, g: Generator) -> Inputs:
    t = fractions(g, batch)
    return {
        "hidden_states": noise(g, batch, 2 * TOKENS, 8),
        "timestep": t,
        "timestep_r": t.clone(),
        "encoder_hidden_states": text(g, batch),
        "context_latents": noise(g, batch, 2 * TOKENS, 16),
    }


@family("ace_step", "audio", _ace_step_inputs, note="every other block attends in a window")
def _ace_step() -> nn.Module:
    return _diffusers().AceStepTransformer1DModel(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        in_channels=24,
        audio_acoustic_hidden_dim=8,
        sliding_window=4,
        encoder_hidden_size=TEXT_WIDTH,
    )


def _longcat_audio_inputs(batch: int, g: Generator) -> Inputs:
    return {
        "hidden_states": noise(g, batch, TOKENS, 8),
        "encoder_hidden_states": text(g, batch),
        "encoder_attention_mask": mask(g, batch, TEXT).bool(),
        "timestep": fractions(g, batch),
        "attention_mask": mask(g, batch, TOKENS, least=8).bool(),
        "latent_cond": noise(g, batch, TOKENS, 8),
    }


@family("longcat_audio", "audio", _longcat_audio_inputs, note="convolutions over the text")
def _longcat_audio() -> nn.Module:
    return _diffusers().LongCatAudioDiTTransformer(
        dit_dim=64, dit_depth=2, dit_heads=4, dit_text_dim=TEXT_WIDTH, latent_dim=8
    )
