"""Tiny transformers that ``torch.export`` can capture only with :mod:`ptq4dit_ao.capture.patches`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, nn

from ptq4dit_ao.testing.zoo.draw import int_timesteps, mask, noise, timesteps
from ptq4dit_ao.testing.zoo.family import Inputs, family

TEXT_TOKENS = 8
TEXT_DIM = 24


def _make(name: str, **config: Any) -> nn.Module:
    """An instance of the diffusers class ``name``; diffusers is imported here because the import takes seconds."""
    import diffusers

    model: nn.Module = getattr(diffusers, name)(**config)
    return model


# --- Images ----------------------------------------------------------------------------------------------------------


def lumina2_inputs(batch: int, g: Generator) -> Inputs:
    """Random arguments of :func:`lumina2`."""
    return {
        "hidden_states": noise(g, batch, 4, 8, 12),
        "timestep": timesteps(g, batch, 0.02, 0.98),  # 0 is pure noise, 1 the image
        "encoder_hidden_states": noise(g, batch, TEXT_TOKENS, TEXT_DIM),
        "encoder_attention_mask": mask(g, batch, TEXT_TOKENS),
    }


@family("lumina2", "image", lumina2_inputs, note="packs the caption's valid tokens; masked instead for the export")
def lumina2() -> nn.Module:
    """A tiny Lumina 2."""
    return _make(
        "Lumina2Transformer2DModel",
        sample_size=16,
        in_channels=4,
        hidden_size=48,
        num_layers=2,
        num_refiner_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(40, 24, 24),
        cap_feat_dim=TEXT_DIM,
    )


def lumina_next_inputs(batch: int, g: Generator) -> Inputs:
    """Random arguments of :func:`lumina_next`."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    return {
        "hidden_states": noise(g, batch, 4, 8, 12),
        "timestep": timesteps(g, batch, 0.02, 0.98),
        "encoder_hidden_states": noise(g, batch, TEXT_TOKENS, TEXT_DIM),
        "encoder_mask": mask(g, batch, TEXT_TOKENS),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(12, 24, 24),  # complex; the model takes a slice of it
        "cross_attention_kwargs": {},
    }


@family("lumina_next", "image", lumina_next_inputs, note="self and cross attention in parallel, complex rotation")
def lumina_next() -> nn.Module:
    """A tiny Lumina-Next."""
    return _make(
        "LuminaNextDiT2DModel",
        sample_size=16,
        in_channels=4,
        hidden_size=48,
        num_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        cross_attention_dim=TEXT_DIM,
    )


def chroma_inputs(batch: int, g: Generator) -> Inputs:
    """Random arguments of :func:`chroma`."""
    height, width = 4, 6
    ids = torch.zeros(height, width, 3)
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)
    # The pipeline passes a floating-point mask that includes all of the image's tokens.
    words = torch.cat([mask(g, batch, TEXT_TOKENS), torch.ones(batch, height * width, dtype=torch.long)], 1).float()
    return {
        "hidden_states": noise(g, batch, height * width, 16),
        "encoder_hidden_states": noise(g, batch, TEXT_TOKENS, TEXT_DIM),
        "timestep": timesteps(g, batch, 0.02, 0.98),
        "img_ids": ids.view(-1, 3),
        "txt_ids": torch.zeros(TEXT_TOKENS, 3),
        "attention_mask": words,
    }


@family("chroma", "image", chroma_inputs, note="all modulations from one small network")
def chroma() -> nn.Module:
    """A tiny Chroma."""
    return _make(
        "ChromaTransformer2DModel",
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=12,
        num_attention_heads=4,
        joint_attention_dim=TEXT_DIM,
        axes_dims_rope=(4, 4, 4),
        approximator_num_channels=16,
        approximator_hidden_dim=40,
        approximator_layers=2,
    )


def omnigen_inputs(batch: int, g: Generator) -> Inputs:
    """Random arguments of :func:`omnigen`."""
    text, image = TEXT_TOKENS, 4 * 6
    words = mask(g, batch, text).flip(1)  # padding on the left
    padding = text - words.sum(1)
    tokens = torch.arange(text + 1 + image)
    # Text and time attend to what precedes them, the image to everything but padding, and padding to everything.
    causal = tokens[:, None] >= tokens
    sees = (causal | (tokens >= text + 1)[:, None]) & (tokens >= padding[:, None])[:, None, :]
    return {
        "hidden_states": noise(g, batch, 4, 8, 12),
        "timestep": timesteps(g, batch, 0.02, 0.98),
        "input_ids": torch.randint(1, 32, (batch, text), generator=g) * words,
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": (sees | (tokens < padding[:, None])[:, :, None]).float(),
        "position_ids": (tokens - padding[:, None]).clamp(min=0),
    }


@family("omnigen", "image", omnigen_inputs, note="a language model that denoises; text to image")
def omnigen() -> nn.Module:
    """A tiny OmniGen."""
    return _make(
        "OmniGenTransformer2DModel",
        in_channels=4,
        hidden_size=48,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=80,
        num_layers=2,
        pad_token_id=0,
        vocab_size=32,
        max_position_embeddings=256,
        original_max_position_embeddings=64,
        rope_scaling={"short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5]},
        pos_embed_max_size=12,
        time_step_dim=32,
    )


def hidream_inputs(batch: int, g: Generator) -> Inputs:
    """Random arguments of :func:`hidream`."""
    return {
        "hidden_states": noise(g, batch, 4, 8, 8),
        "timesteps": timesteps(g, batch),
        "encoder_hidden_states_t5": noise(g, batch, TEXT_TOKENS, TEXT_DIM),
        # The pipeline stacks the language model's layers in one tensor. In a list, the batch is the first axis.
        "encoder_hidden_states_llama3": [noise(g, batch, TEXT_TOKENS, 20) for _ in range(4)],
        "pooled_embeds": noise(g, batch, 18),
    }


@family("hidream", "image", hidream_inputs, note="experts; each runs on all tokens in the exported graph")
def hidream() -> nn.Module:
    """A tiny HiDream."""
    return _make(
        "HiDreamImageTransformer2DModel",
        patch_size=2,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=12,
        num_attention_heads=4,
        caption_channels=[TEXT_DIM, 20],
        text_emb_dim=18,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(4, 4, 4),
        max_resolution=(12, 12),
        llama_layers=[0, 1, 2, 3],
    )


# --- Videos ----------------------------------------------------------------------------------------------------------


def mochi_inputs(batch: int, g: Generator) -> Inputs:
    """Random arguments of :func:`mochi`."""
    return {
        "hidden_states": noise(g, batch, 4, 4, 6, 8),
        "encoder_hidden_states": noise(g, batch, TEXT_TOKENS, TEXT_DIM),
        "timestep": timesteps(g, batch),
        "encoder_attention_mask": mask(g, batch, TEXT_TOKENS).bool(),
    }


@family("mochi", "video", mochi_inputs, note="packs the valid text tokens in each block; masked for the export")
def mochi() -> nn.Module:
    """A tiny Mochi."""
    return _make(
        "MochiTransformer3DModel",
        num_attention_heads=4,
        attention_head_dim=12,
        num_layers=3,  # the last block does not update the text
        pooled_projection_dim=32,
        in_channels=4,
        text_embed_dim=TEXT_DIM,
        time_embed_dim=32,
        max_sequence_length=TEXT_TOKENS,
    )


def cosmos_inputs(batch: int, g: Generator) -> Inputs:
    """Random arguments of :func:`cosmos`."""
    return {
        "hidden_states": noise(g, batch, 4, 4, 8, 8),
        "timestep": timesteps(g, batch),
        "encoder_hidden_states": noise(g, batch, TEXT_TOKENS, TEXT_DIM),
        "fps": 30,
    }


@family("cosmos", "video", cosmos_inputs, note="Cosmos 1, text to world")
def cosmos() -> nn.Module:
    """A tiny Cosmos 1, text to world."""
    return _make(
        "CosmosTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=12,
        num_layers=2,
        mlp_ratio=2.0,
        text_embed_dim=TEXT_DIM,
        adaln_lora_dim=8,
        max_size=(8, 16, 16),
        concat_padding_mask=False,  # resizing the mask would need torchvision
    )


def hunyuan_video15_inputs(batch: int, g: Generator) -> Inputs:
    """Random arguments of :func:`hunyuan_video15`."""
    return {
        # The channels are noise, the given frame's latents, and a mask of the given frames.
        "hidden_states": noise(g, batch, 9, 4, 4, 6),
        "timestep": timesteps(g, batch),
        "encoder_hidden_states": noise(g, batch, TEXT_TOKENS, TEXT_DIM),
        "encoder_attention_mask": mask(g, batch, TEXT_TOKENS).float(),
        "encoder_hidden_states_2": noise(g, batch, 7, 20),
        "encoder_attention_mask_2": mask(g, batch, 7, least=0).float(),  # glyphs of quoted text, often without any
        "image_embeds": noise(g, batch, 5, 18),
    }


@family("hunyuan_video15", "video", hunyuan_video15_inputs, note="packs image, glyph and text tokens; image to video")
def hunyuan_video15() -> nn.Module:
    """A tiny HunyuanVideo 1.5, image to video."""
    model: Any = _make(
        "HunyuanVideo15Transformer3DModel",
        in_channels=9,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=12,
        num_layers=2,
        num_refiner_layers=2,
        mlp_ratio=2.0,
        text_embed_dim=TEXT_DIM,
        text_embed_2_dim=20,
        image_embed_dim=18,
        rope_axes_dim=(4, 4, 4),
    )
    # The original has a fixed width, which would make it nine tenths of this model's parameters.
    model.context_embedder_2 = type(model.context_embedder_2)(20, 64, 48)
    return model


def framepack_inputs(batch: int, g: Generator) -> Inputs:
    """Random arguments of :func:`hunyuan_video_framepack`."""
    # The new frames come last. Of the past, the first and the latest frame have full resolution, older ones less.
    first, past_4x, past_2x, past, new = torch.arange(1 + 8 + 4 + 4 + 4).split([1, 8, 4, 4, 4])
    return {
        "hidden_states": noise(g, batch, 4, 4, 8, 8),
        "timestep": timesteps(g, batch),
        "encoder_hidden_states": noise(g, batch, TEXT_TOKENS, TEXT_DIM),
        "encoder_attention_mask": mask(g, batch, TEXT_TOKENS),
        "pooled_projections": noise(g, batch, 18),
        "image_embeds": noise(g, batch, 5, 20),
        "indices_latents": new,
        "guidance": torch.full((batch,), 6000.0),
        "latents_clean": noise(g, batch, 4, 5, 8, 8),
        "indices_latents_clean": torch.cat([first, past]),
        "latents_history_2x": noise(g, batch, 4, 4, 8, 8),
        "indices_latents_history_2x": past_2x,
        "latents_history_4x": noise(g, batch, 4, 8, 8, 8),
        "indices_latents_history_4x": past_4x,
    }


@family("hunyuan_video_framepack", "video", framepack_inputs, note="extends a video; earlier frames in coarser patches")
def hunyuan_video_framepack() -> nn.Module:
    """A tiny HunyuanVideo Framepack."""
    return _make(
        "HunyuanVideoFramepackTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=12,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=2,
        mlp_ratio=2.0,
        text_embed_dim=TEXT_DIM,
        pooled_projection_dim=18,
        rope_axes_dim=(4, 4, 4),
        has_image_proj=True,
        image_proj_dim=20,
        has_clean_x_embedder=True,
    )


def wan_animate_inputs(batch: int, g: Generator) -> Inputs:
    """Random arguments of :func:`wan_animate`."""
    return {
        # The channels are noise, the reference's latents and a mask of 4. The first of 4 frames is the reference.
        "hidden_states": noise(g, batch, 12, 4, 8, 8),
        "timestep": int_timesteps(g, batch),
        # The attention splits off the image tokens by assuming 512 text tokens after them.
        "encoder_hidden_states": noise(g, batch, 512, TEXT_DIM),
        "encoder_hidden_states_image": noise(g, batch, 5, 18),
        "pose_hidden_states": noise(g, batch, 4, 3, 8, 8),
        "face_pixel_values": noise(g, batch, 3, 9, 16, 16).clamp(-1, 1),  # 4 pixel frames for each latent frame
    }


@family("wan_animate", "video", wan_animate_inputs, note="moves a character as a pose and a face video show")
def wan_animate() -> nn.Module:
    """A tiny Wan-Animate."""
    return _make(
        "WanAnimateTransformer3DModel",
        num_attention_heads=4,
        attention_head_dim=12,
        in_channels=12,
        latent_channels=4,
        out_channels=4,
        text_dim=TEXT_DIM,
        freq_dim=32,
        ffn_dim=96,
        num_layers=2,
        image_dim=18,
        added_kv_proj_dim=48,
        rope_max_seq_len=32,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
        motion_encoder_size=16,
        motion_style_dim=16,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=4,
        inject_face_latents_blocks=1,
    )
