"""Tiny video transformers: 4 or 5 latent frames of 4x4 patches, 7 text tokens, heads of 12 or 16 channels.

Heads have 12 or 16 channels because the rotary embedding splits them among time, height and width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor, nn

from ptq4dit_ao.testing.zoo.draw import int_timesteps, mask, noise, timesteps
from ptq4dit_ao.testing.zoo.family import Inputs, family

TEXT_TOKENS = 7
TEXT_DIM = 20
POOLED_DIM = 18


def _make(name: str, **config: Any) -> nn.Module:
    """An instance of the diffusers class ``name``; diffusers is imported here because the import takes seconds."""
    import diffusers

    model: nn.Module = getattr(diffusers, name)(**config)
    return model


def _clip(g: Generator, batch: int, *, channels: int = 4, frames: int = 5) -> Tensor:
    """Random latents of a video, (batch, channels, frames, 8, 8)."""
    return noise(g, batch, channels, frames, 8, 8)


def _text(g: Generator, batch: int) -> Tensor:
    return noise(g, batch, TEXT_TOKENS, TEXT_DIM)


def _text_mask(g: Generator, batch: int) -> Tensor:
    return mask(g, batch, TEXT_TOKENS)


# --- Wan and its descendants -----------------------------------------------------------------------------------------

WAN: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": TEXT_DIM,
    "freq_dim": 32,
    "ffn_dim": 96,
    "num_layers": 2,
}
WAN_I2V = WAN | {"in_channels": 12, "image_dim": 24, "added_kv_proj_dim": 48}


def wan_inputs(batch: int, g: Generator) -> Inputs:
    """Random arguments of :func:`wan`."""
    return {
        "hidden_states": _clip(g, batch),
        "timestep": int_timesteps(g, batch),
        "encoder_hidden_states": _text(g, batch),
    }


@family("wan", "video", wan_inputs, note="2.1, text to video")
def wan() -> nn.Module:
    """A tiny Wan 2.1, text to video."""
    return _make("WanTransformer3DModel", **WAN)


def wan22_inputs(batch: int, g: Generator) -> Inputs:
    """Random arguments of :func:`wan22`."""
    # The first frame is given, so its 4x4 tokens, which come first, have timestep 0.
    later = int_timesteps(g, batch)[:, None].expand(batch, 4 * 16)
    return wan_inputs(batch, g) | {"timestep": torch.cat([torch.zeros(batch, 16, dtype=torch.long), later], 1)}


@family("wan22", "video", wan22_inputs, note="2.2 5B, a time for each token")
def wan22() -> nn.Module:
    """A tiny Wan 2.2 5B, with a time for each token."""
    return _make("WanTransformer3DModel", **WAN)


def wan_i2v_inputs(batch: int, g: Generator) -> Inputs:
    """Random arguments of :func:`wan_i2v`."""
    return {
        # The channels are noise, a mask of 4 and the latents of the given frame.
        "hidden_states": _clip(g, batch, channels=12),
        "timestep": int_timesteps(g, batch),
        # The attention splits off the image tokens by assuming 512 text tokens after them.
        "encoder_hidden_states": noise(g, batch, 512, TEXT_DIM),
        "encoder_hidden_states_image": noise(g, batch, 9, 24),
    }


@family("wan_i2v", "video", wan_i2v_inputs, note="2.1, image to video")
def wan_i2v() -> nn.Module:
    """A tiny Wan 2.1, image to video."""
    return _make("WanTransformer3DModel", **WAN_I2V)


def chronoedit_inputs(batch: int, g: Generator) -> Inputs:
    """Random arguments of :func:`chronoedit`."""
    # Two frames, the image before and after the edit; with any other number of frames the model is wan_i2v.
    return wan_i2v_inputs(batch, g) | {"hidden_states": _clip(g, batch, channels=12, frames=2)}


@family("chronoedit", "video", chronoedit_inputs, note="Wan's image to video on two frames far apart")
def chronoedit() -> nn.Module:
    """A tiny ChronoEdit."""
    return _make("ChronoEditTransformer3DModel", **WAN_I2V)


def wan_vace_inputs(batch: int, g: Generator) -> Inputs:
    """Random arguments of :func:`wan_vace`."""
    return wan_inputs(batch, g) | {
        "control_hidden_states": _clip(g, batch, channels=10),
        "control_hidden_states_scale": torch.ones(4),
    }


@family("wan_vace", "video", wan_vace_inputs, note="a control branch beside the blocks")
def wan_vace() -> nn.Module:
    """A tiny Wan VACE."""
    # Every control layer has a scale. Their number must differ from the example's batch, or it would be taken for it.
    return _make(
        "WanVACETransformer3DModel", **WAN | {"num_layers": 4, "vace_layers": [0, 1, 2, 3], "vace_in_channels": 10}
    )


@family("skyreels_v2", "video", wan_inputs)
def skyreels_v2() -> nn.Module:
    """A tiny SkyReels V2."""
    return _make("SkyReelsV2Transformer3DModel", **WAN)


def skyreels_v2_df_inputs(batch: int, g: Generator) -> Inputs:
    """Random arguments of :func:`skyreels_v2_df`."""
    return wan_inputs(batch, g) | {
        "timestep": int_timesteps(g, batch * 5).view(batch, 5),
        "enable_diffusion_forcing": True,
    }


@family("skyreels_v2_df", "video", skyreels_v2_df_inputs, note="diffusion forcing, a time for each frame")
def skyreels_v2_df() -> nn.Module:
    """A tiny SkyReels V2 for diffusion forcing."""
    return _make("SkyReelsV2Transformer3DModel", **WAN)


def anyflow_inputs(batch: int, g: Generator) -> Inputs:
    """Random arguments of :func:`anyflow`."""
    # The model steps from one time to an earlier one; all frames of a video share both.
    start, end = timesteps(g, batch, 500.0)[:, None], timesteps(g, batch, high=500.0)[:, None]
    return {
        "hidden_states": noise(g, batch, 5, 4, 8, 8),
        "timestep": start.repeat(1, 5),
        "r_timestep": end.repeat(1, 5),
        "encoder_hidden_states": _text(g, batch),
    }


@family("anyflow", "video", anyflow_inputs, note="Wan with two times, complex rotary")
def anyflow() -> nn.Module:
    """A tiny AnyFlow."""
    return _make("AnyFlowTransformer3DModel", **WAN)


def helios_inputs(batch: int, g: Generator) -> Inputs:
    """Random arguments of :func:`helios`."""
    # The history is coarser the older it is. One list of frame numbers serves the whole batch.
    lengths = {"long": 16, "mid": 4, "short": 4}
    *places, now = torch.arange(sum(lengths.values()) + 5)[None].split([*lengths.values(), 5], 1)
    inputs = {
        "hidden_states": _clip(g, batch),
        "timestep": int_timesteps(g, batch),
        "encoder_hidden_states": _text(g, batch),
        "indices_hidden_states": now,
    }
    for (name, length), place in zip(lengths.items(), places, strict=True):
        inputs[f"indices_latents_history_{name}"] = place
        inputs[f"latents_history_{name}"] = _clip(g, batch, frames=length)
    return inputs


@family("helios", "video", helios_inputs, note="Wan that continues a history at three scales")
def helios() -> nn.Module:
    """A tiny Helios."""
    return _make("HeliosTransformer3DModel", **WAN, rope_dim=(4, 4, 4))


# --- LTX -------------------------------------------------------------------------------------------------------------


def ltx_inputs(batch: int, g: Generator) -> Inputs:
    """Random arguments of :func:`ltx`."""
    return {
        "hidden_states": noise(g, batch, 4 * 16, 8),
        "encoder_hidden_states": _text(g, batch),
        "timestep": timesteps(g, batch),
        "encoder_attention_mask": _text_mask(g, batch),
        "num_frames": 4,
        "height": 4,
        "width": 4,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


@family("ltx", "video", ltx_inputs, note="latents packed to tokens")
def ltx() -> nn.Module:
    """A tiny LTX-Video."""
    return _make(
        "LTXVideoTransformer3DModel",
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=12,
        cross_attention_dim=48,
        num_layers=2,
        caption_channels=TEXT_DIM,
    )


def ltx2_inputs(batch: int, g: Generator, *, text_dim: int = TEXT_DIM, audio_text_dim: int = TEXT_DIM) -> Inputs:
    """Random arguments of :func:`ltx2`."""
    from diffusers.models.transformers.transformer_ltx2 import LTX2AudioVideoRotaryPosEmbed as Rope

    time, words, cpu = timesteps(g, batch), _text_mask(g, batch), torch.device("cpu")
    return {
        "hidden_states": noise(g, batch, 4 * 16, 8),
        "audio_hidden_states": noise(g, batch, 9, 6),
        "encoder_hidden_states": noise(g, batch, TEXT_TOKENS, text_dim),
        "audio_encoder_hidden_states": noise(g, batch, TEXT_TOKENS, audio_text_dim),
        "timestep": time,
        "sigma": time,
        "encoder_attention_mask": words,
        "audio_encoder_attention_mask": words,
        "num_frames": 4,
        "height": 4,
        "width": 4,
        "fps": 24.0,
        "audio_num_frames": 9,
        "video_coords": Rope(dim=48).prepare_video_coords(batch, 4, 4, 4, cpu, fps=24.0),
        "audio_coords": Rope(dim=48, scale_factors=(4,), modality="audio").prepare_audio_coords(batch, 9, cpu),
    }


LTX2: dict[str, Any] = {
    "in_channels": 8,
    "out_channels": 8,
    "num_attention_heads": 4,
    "attention_head_dim": 12,
    "cross_attention_dim": 48,
    "audio_in_channels": 6,
    "audio_out_channels": 6,
    "audio_num_attention_heads": 4,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 32,
    "num_layers": 2,
    "caption_channels": TEXT_DIM,
    "rope_type": "split",
}


@family("ltx2", "video", ltx2_inputs, note="with sound")
def ltx2() -> nn.Module:
    """A tiny LTX-2, with sound."""
    return _make("LTX2VideoTransformer3DModel", **LTX2)


def ltx23_inputs(batch: int, g: Generator) -> Inputs:
    """Random arguments of :func:`ltx23`."""
    # The connectors of this version put out as many channels as their streams have.
    return ltx2_inputs(batch, g, text_dim=48, audio_text_dim=32) | {"use_cross_timestep": True}


@family("ltx23", "video", ltx23_inputs, note="LTX-2.3: gated attention, text modulated too")
def ltx23() -> nn.Module:
    """A tiny LTX-2.3, with sound."""
    return _make(
        "LTX2VideoTransformer3DModel",
        **LTX2,
        gated_attn=True,
        cross_attn_mod=True,
        audio_gated_attn=True,
        audio_cross_attn_mod=True,
        use_prompt_embeddings=False,
        perturbed_attn=True,
    )


# --- CogVideoX -------------------------------------------------------------------------------------------------------

COGVIDEOX: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 24,
    "text_embed_dim": TEXT_DIM,
    "num_layers": 2,
    # For sizes other than those of the inputs, the model would rebuild its position table with writes to ``.data``.
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 17,  # video frames, which are 5 latent frames
    "max_text_seq_length": TEXT_TOKENS,
}


def cogvideox_inputs(batch: int, g: Generator) -> Inputs:
    """Random arguments of :func:`cogvideox`."""
    return {
        "hidden_states": noise(g, batch, 5, 4, 8, 8),
        "encoder_hidden_states": _text(g, batch),
        "timestep": int_timesteps(g, batch),
    }


@family("cogvideox", "video", cogvideox_inputs, note="1.0, 2B, sines and cosines for positions")
def cogvideox() -> nn.Module:
    """A tiny CogVideoX 1.0."""
    return _make("CogVideoXTransformer3DModel", **COGVIDEOX)


def cogvideox15_inputs(batch: int, g: Generator) -> Inputs:
    """Random arguments of :func:`cogvideox15`."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    return {
        "hidden_states": noise(g, batch, 8, 8, 8, 8),  # 4 channels of noise, 4 of the given image
        "encoder_hidden_states": _text(g, batch),
        "timestep": int_timesteps(g, batch),
        "ofs": torch.full((1,), 2.0),
        "image_rotary_emb": get_3d_rotary_pos_embed(16, None, (4, 4), 4, grid_type="slice", max_size=(4, 4)),
    }


@family("cogvideox15", "video", cogvideox15_inputs, note="1.5, image to video, patches of two frames, rotary")
def cogvideox15() -> nn.Module:
    """A tiny CogVideoX 1.5, image to video."""
    return _make(
        "CogVideoXTransformer3DModel",
        **COGVIDEOX | {"in_channels": 8},
        ofs_embed_dim=24,
        patch_size_t=2,
        patch_bias=False,
        use_rotary_positional_embeddings=True,
    )


def consisid_inputs(batch: int, g: Generator) -> Inputs:
    """Random arguments of :func:`consisid`."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    return {
        "hidden_states": noise(g, batch, 5, 8, 8, 8),
        "encoder_hidden_states": _text(g, batch),
        "timestep": int_timesteps(g, batch),
        "image_rotary_emb": get_3d_rotary_pos_embed(16, ((0, 0), (4, 4)), (4, 4), 5),
        "id_cond": noise(g, batch, 22),
        "id_vit_hidden": [noise(g, batch, 9, 24) for _ in range(2)],
    }


@family("consisid", "video", consisid_inputs, note="CogVideoX that attends to a face")
def consisid() -> nn.Module:
    """A tiny ConsisID."""
    return _make(
        "ConsisIDTransformer3DModel",
        # The face's tokens have 2/3 as many channels as the video's (32 and 48).
        **COGVIDEOX | {"in_channels": 8, "num_attention_heads": 3, "num_layers": 4},
        use_rotary_positional_embeddings=True,
        is_train_face=True,
        cross_attn_dim_head=16,
        cross_attn_num_heads=2,
        LFE_id_dim=22,
        LFE_vit_dim=24,
        LFE_depth=4,
        LFE_dim_head=8,
        LFE_num_heads=4,
        LFE_num_querie=6,
        LFE_output_dim=32,
        LFE_num_scale=2,
    )


# --- Others with one stream and cross-attention ----------------------------------------------------------------------


def latte_inputs(batch: int, g: Generator) -> Inputs:
    """Random arguments of :func:`latte`."""
    return {
        "hidden_states": _clip(g, batch),
        "timestep": int_timesteps(g, batch),
        "encoder_hidden_states": _text(g, batch),
    }


@family("latte", "video", latte_inputs, note="spatial and temporal blocks in turn")
def latte() -> nn.Module:
    """A tiny Latte."""
    return _make(
        "LatteTransformer3DModel",
        num_attention_heads=4,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=48,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=TEXT_DIM,
        video_length=5,
    )


def allegro_inputs(batch: int, g: Generator) -> Inputs:
    """Random arguments of :func:`allegro`."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    *tables, t, h, w = get_3d_rotary_pos_embed_allegro(12, ((0, 0), (4, 4)), (4, 4), 5, (2.2, 2.0, 2.0))  # type: ignore[misc]
    places = torch.cartesian_prod(t.long(), h.long(), w.long()).T[:, None]
    return {
        "hidden_states": _clip(g, batch),
        "encoder_hidden_states": _text(g, batch),
        "timestep": timesteps(g, batch),
        "encoder_attention_mask": _text_mask(g, batch),
        "image_rotary_emb": (tuple(tables), tuple(places.contiguous())),
    }


@family("allegro", "video", allegro_inputs)
def allegro() -> nn.Module:
    """A tiny Allegro."""
    return _make(
        "AllegroTransformer3DModel",
        num_attention_heads=4,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=48,
        sample_height=8,
        sample_width=8,
        sample_frames=5,
        caption_channels=TEXT_DIM,
    )


def sana_video_inputs(batch: int, g: Generator) -> Inputs:
    """Random arguments of :func:`sana_video`."""
    return {
        "hidden_states": _clip(g, batch),
        "encoder_hidden_states": _text(g, batch),
        "timestep": timesteps(g, batch),
        "encoder_attention_mask": _text_mask(g, batch),
    }


@family("sana_video", "video", sana_video_inputs, note="linear attention, convolutions in the feed-forward")
def sana_video() -> nn.Module:
    """A tiny Sana-Video."""
    return _make(
        "SanaVideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=4,
        cross_attention_head_dim=12,
        cross_attention_dim=48,
        caption_channels=TEXT_DIM,
    )


# --- HunyuanVideo and Motif-Video ------------------------------------------------------------------------------------

HUNYUAN: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 4,
    "attention_head_dim": 12,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 2,
    "text_embed_dim": TEXT_DIM,
    "pooled_projection_dim": POOLED_DIM,
    "rope_axes_dim": (4, 4, 4),
}


def hunyuan_video_i2v_inputs(batch: int, g: Generator) -> Inputs:
    """Random arguments of :func:`hunyuan_video_i2v`."""
    return {
        "hidden_states": _clip(g, batch),
        "timestep": timesteps(g, batch),
        "encoder_hidden_states": _text(g, batch),
        "encoder_attention_mask": _text_mask(g, batch),
        "pooled_projections": noise(g, batch, POOLED_DIM),
    }


def hunyuan_video_inputs(batch: int, g: Generator) -> Inputs:
    """Random arguments of :func:`hunyuan_video`."""
    return hunyuan_video_i2v_inputs(batch, g) | {"guidance": torch.full((batch,), 4000.0)}  # 1000 times the scale


@family("hunyuan_video", "video", hunyuan_video_inputs, note="with guidance")
def hunyuan_video() -> nn.Module:
    """A tiny HunyuanVideo, text to video."""
    return _make("HunyuanVideoTransformer3DModel", **HUNYUAN)


@family("hunyuan_video_i2v", "video", hunyuan_video_i2v_inputs, note="the first frame's tokens modulated apart")
def hunyuan_video_i2v() -> nn.Module:
    """A tiny HunyuanVideo, image to video."""
    return _make(
        "HunyuanVideoTransformer3DModel", **HUNYUAN, guidance_embeds=False, image_condition_type="token_replace"
    )


def motif_video_inputs(batch: int, g: Generator) -> Inputs:
    """Random arguments of :func:`motif_video`."""
    return {
        "hidden_states": _clip(g, batch, channels=9),  # 4 channels of noise, 4 of a given frame, 1 of a mask
        "timestep": timesteps(g, batch),
        "encoder_hidden_states": _text(g, batch),
        "encoder_attention_mask": _text_mask(g, batch),
        "image_embeds": noise(g, batch, 9, 24),
    }


@family("motif_video", "video", motif_video_inputs, note="image to video, the last blocks a decoder")
def motif_video() -> nn.Module:
    """A tiny Motif-Video."""
    return _make(
        "MotifVideoTransformer3DModel",
        in_channels=9,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=12,
        num_layers=2,
        num_single_layers=4,
        num_decoder_layers=2,
        text_embed_dim=TEXT_DIM,
        image_embed_dim=24,
        rope_axes_dim=(4, 4, 4),
        enable_text_cross_attention_dual=True,
        enable_text_cross_attention_single=True,
    )


# --- Other models with a text stream ---------------------------------------------------------------------------------


def easyanimate_inputs(batch: int, g: Generator) -> Inputs:
    """Random arguments of :func:`easyanimate`."""
    return {
        "hidden_states": _clip(g, batch),
        "timestep": timesteps(g, batch),
        "encoder_hidden_states": _text(g, batch),
    }


@family("easyanimate", "video", easyanimate_inputs)
def easyanimate() -> nn.Module:
    """A tiny EasyAnimate."""
    return _make(
        "EasyAnimateTransformer3DModel",
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        sample_width=8,
        sample_height=8,
        num_layers=2,
        mmdit_layers=2,
        time_embed_dim=24,
        add_norm_text_encoder=True,
        text_embed_dim=TEXT_DIM,
    )


# --- Kandinsky -------------------------------------------------------------------------------------------------------

KANDINSKY: dict[str, Any] = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": TEXT_DIM,
    "in_text_dim2": POOLED_DIM,
    "time_dim": 24,
    "model_dim": 48,
    "ff_dim": 96,
    "num_text_blocks": 2,
    "num_visual_blocks": 2,
    "axes_dims": (4, 4, 4),
    "visual_cond": True,
}


def _kandinsky_inputs(batch: int, g: Generator) -> Inputs:
    return {
        "hidden_states": noise(g, batch, 5, 8, 8, 9),  # 4 channels of noise, 4 of a given frame, 1 of a mask
        "encoder_hidden_states": _text(g, batch),
        "pooled_projections": noise(g, batch, POOLED_DIM),
        "timestep": timesteps(g, batch),
        "visual_rope_pos": (torch.arange(5), torch.arange(4), torch.arange(4)),
    }


def kandinsky5_inputs(batch: int, g: Generator) -> Inputs:
    """Random arguments of :func:`kandinsky5`."""
    return _kandinsky_inputs(batch, g) | {
        "text_rope_pos": torch.arange(TEXT_TOKENS),
        "scale_factor": (1.0, 2.0, 2.0),
    }


@family("kandinsky5", "video", kandinsky5_inputs, note="rounds queries and keys to bfloat16; time in float32")
def kandinsky5() -> nn.Module:
    """A tiny Kandinsky 5."""
    return _make("Kandinsky5Transformer3DModel", **KANDINSKY)


def kandinsky6_inputs(batch: int, g: Generator) -> Inputs:
    """Random arguments of :func:`kandinsky6`."""
    return _kandinsky_inputs(batch, g) | {
        "audio_hidden_states": noise(g, batch, 9, 6),
        "encoder_attention_mask": _text_mask(g, batch).bool(),
    }


@family("kandinsky6", "video", kandinsky6_inputs, note="with sound")
def kandinsky6() -> nn.Module:
    """A tiny Kandinsky 6, with sound."""
    return _make(
        "Kandinsky6Transformer3DModel",
        **KANDINSKY,
        in_audio_dim=6,
        out_audio_dim=6,
        model_dim_a=36,
        ff_dim_a=72,
        text_token_padding=True,
        ca_rope=True,
        cross_gates=True,
        fix_modulation=True,
    )
