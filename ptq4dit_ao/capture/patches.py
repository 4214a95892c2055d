"""Patches for diffusers transformers that ``torch.export`` cannot capture unchanged.

These models read mask values or the batch size into Python, by loops over the samples, lists as long as the batch, or
branches on tensors. While :func:`exportable` is active, such methods are replaced by equivalent ones that use tensor
operations only. Where the original packs the valid tokens of each sample to the front, the replacement leaves them in
place and masks the padding instead, which is equivalent because attention does not depend on the order of its keys.
Padding positions may then have other values than in the original, but no valid token reads them.

The patches assume masks that are a prefix of ones, which tokenizers with padding on the right give.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptq4dit_ao.capture.number_patches import NUMBER_PATCHES
from ptq4dit_ao.capture.size_patches import SIZE_PATCHES, Attributes, result, tie

_MISSING = object()


@contextmanager
def exportable(model: nn.Module) -> Iterator[None]:
    """Replace, while active, the methods in ``model`` that ``torch.export`` cannot capture.

    Only the instances in ``model`` are changed, never their classes. Afterwards they are restored.
    """
    saved: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for module in list(model.modules()):
            kind = type(module)
            patch = PATCHES.get(kind.__name__)
            if patch is None or not kind.__module__.startswith("diffusers."):
                continue
            attributes = vars(module)
            for name, value in patch(module).items():
                saved.append((attributes, name, attributes.get(name, _MISSING)))
                attributes[name] = value
        yield
    finally:
        for attributes, name, value in reversed(saved):
            if value is _MISSING:
                attributes.pop(name, None)
            else:
                attributes[name] = value


def _lumina2(model: Any) -> Attributes:
    """Patch of Lumina 2, which joins the caption and the patches of each sample without the caption's padding.

    The original reads the captions' lengths into Python and moves the padding to the end. Here the padding stays
    between caption and patches. Every token keeps its rotary position; the patches' ones begin with the caption's
    length.
    """

    def forward(
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        batch, channels, height, width = hidden_states.shape
        p = model.config.patch_size
        rows, columns = height // p, width // p
        text_tokens, patches = encoder_attention_mask.shape[1], rows * columns

        temb, text = model.time_caption_embed(hidden_states, timestep, encoder_hidden_states)
        x = hidden_states.view(batch, channels, rows, p, columns, p).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        x = model.x_embedder(x)

        place = torch.arange(text_tokens, device=x.device)
        length = encoder_attention_mask.sum(dim=1, keepdim=True)
        valid = place < length
        place = torch.where(valid, place, 0)  # the rotary table may be too short for positions of padding
        text_ids = torch.stack([place, torch.zeros_like(place), torch.zeros_like(place)], dim=-1)
        row = torch.arange(rows, device=x.device).repeat_interleave(columns).expand(batch, -1)
        column = torch.arange(columns, device=x.device).repeat(rows).expand(batch, -1)
        image_ids = torch.stack([length.expand(-1, patches), row, column], dim=-1)
        rotary = model.rope_embedder._get_freqs_cis(torch.cat([text_ids, image_ids], dim=1))

        for layer in model.context_refiner:
            text = layer(text, encoder_attention_mask, rotary[:, :text_tokens])
        for layer in model.noise_refiner:
            x = layer(x, None, rotary[:, text_tokens:], temb)
        x = torch.cat([text, x], dim=1)
        mask = torch.cat([valid, valid.new_ones(batch, patches)], dim=1)
        for layer in model.layers:
            x = layer(x, mask, rotary, temb)
        x = model.norm_out(x, temb)[:, text_tokens:]
        x = x.reshape(batch, rows, columns, p, p, model.out_channels).permute(0, 5, 1, 3, 2, 4)
        return result(model, x.flatten(4, 5).flatten(2, 3), return_dict)

    return {"forward": forward}


def _lumina_patch_embed(module: Any) -> Attributes:
    """Patch of Lumina-Next, whose list with the image size of each sample fixes the batch.

    All sizes are equal and the model reads only the first one, so the list here has one entry.
    """

    def forward(x: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor, list[tuple[int, int]], Tensor]:
        batch, channels, height, width = x.shape
        p = module.patch_size
        rows, columns = height // p, width // p
        patches = x.view(batch, channels, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5).flatten(3)
        tokens = module.proj(patches).flatten(1, 2)
        mask = torch.ones(tokens.shape[:2], dtype=torch.int32, device=x.device)
        return tokens, mask, [(height, width)], freqs_cis.to(x.device)[:rows, :columns].flatten(0, 1).unsqueeze(0)

    return {"forward": forward}


def _chroma_time_embed(module: Any) -> Attributes:
    """Patch of Chroma, which makes its zero guidance from a list of the batch's length and so fixes the batch."""

    def forward(timestep: Tensor) -> Tensor:
        time = module.time_proj(timestep).to(timestep.dtype)
        guidance = module.guidance_proj(torch.zeros_like(timestep)).to(timestep.dtype)
        places = module.mod_proj.to(device=time.device, dtype=time.dtype)
        condition = torch.cat([time, guidance], dim=1).unsqueeze(1).repeat(1, places.shape[0], 1)
        return torch.cat([condition, places.repeat(timestep.shape[0], 1, 1)], dim=-1)

    return {"forward": forward}


def _omnigen_rope(module: Any) -> Attributes:
    """Patch of OmniGen, which branches on the largest position and writes the frequencies to a buffer at each call.

    Both sets of factors are constants of the model. Here ``where`` selects one, and the buffer is not written.
    """

    def forward(hidden_states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        def constant(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=hidden_states.device)

        is_long = torch.max(position_ids) + 1 > module.original_max_position_embeddings
        factors = torch.where(is_long, constant(module.long_factor), constant(module.short_factor))
        exponents = torch.arange(0, module.dim, 2, dtype=torch.int64, device=hidden_states.device).float() / module.dim
        frequencies = 1.0 / (factors * module.base**exponents)
        # The original also uses the first sample's positions for all samples.
        angles = position_ids[0, :, None].float() * frequencies
        angles = torch.cat([angles, angles], dim=-1)
        scale = module.max_position_embeddings / module.original_max_position_embeddings
        if scale > 1.0:
            scale = math.sqrt(1 + math.log(scale) / math.log(module.original_max_position_embeddings))
        else:
            scale = 1.0
        return angles.cos() * scale, angles.sin() * scale

    return {"forward": forward}


def _hidream_experts(module: Any) -> Attributes:
    """Patch of HiDream's experts, which count in NumPy the tokens that are routed to each expert.

    Here each expert computes every token, and its output has weight 0 for tokens that are not routed to it.
    """

    def moe_infer(x: Tensor, flat_expert_indices: Tensor, flat_expert_weights: Tensor) -> Tensor:
        indices = flat_expert_indices.view(-1, module.num_activated_experts)
        weights = flat_expert_weights.view(-1, module.num_activated_experts)
        total = torch.zeros_like(x)
        for i, expert in enumerate(module.experts):
            weight = torch.where(indices == i, weights, 0).sum(dim=1, keepdim=True)
            total = total + expert(x) * weight
        return total

    return {"moe_infer": moe_infer}


class _Grid(NamedTuple):
    """Numbers of rows and columns of an image's patches, equal for all samples."""

    rows: int
    columns: int


def _hidream(model: Any) -> Attributes:
    """Patch of HiDream, which reads the size of each image from a tensor and unpatchifies the samples one by one.

    The sizes that ``patchify`` returns are those of ``hidden_states``, so all samples can be unpatchified together.
    The original method still handles sizes that the caller gives.
    """
    patchify, unpatchify = model.patchify, model.unpatchify

    def patchify_(hidden_states: Tensor) -> tuple[Any, ...]:
        tokens, masks, _, ids = patchify(hidden_states)
        p = model.config.patch_size
        return tokens, masks, _Grid(hidden_states.shape[2] // p, hidden_states.shape[3] // p), ids

    def unpatchify_(x: Tensor, img_sizes: Any, is_training: bool) -> Tensor:
        if not isinstance(img_sizes, _Grid) or (is_training and not model.config.force_inference_output):
            return unpatchify(x, img_sizes, is_training)  # in training, the original only transposes
        rows, columns = img_sizes
        p = model.config.patch_size
        x = x[:, : rows * columns].reshape(x.shape[0], rows, columns, p, p, -1).permute(0, 5, 1, 3, 2, 4)
        return x.flatten(4, 5).flatten(2, 3)

    return {"patchify": patchify_, "unpatchify": unpatchify_}


def _mochi_attention(attention: Any) -> Attributes:
    """Patch of Mochi's attention, which loops over the samples, each with its patches and valid text tokens.

    Here one attention covers all samples, with the padding masked. As in the original, the output of padding is 0.
    """
    if type(attention.processor).__name__ != "MochiAttnProcessor2_0":
        return {}

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        even, odd = x[..., 0::2].float(), x[..., 1::2].float()
        return torch.stack([(even * cos - odd * sin).to(x.dtype), (even * sin + odd * cos).to(x.dtype)], -1).flatten(-2)

    def processor(
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        def heads(x: Tensor, linear: nn.Module, norm: nn.Module | None = None) -> Tensor:
            x = linear(x).unflatten(2, (attn.heads, -1))
            return x if norm is None else norm(x)

        query = heads(hidden_states, attn.to_q, attn.norm_q)
        key = heads(hidden_states, attn.to_k, attn.norm_k)
        if image_rotary_emb is not None:
            query, key = rotate(query, *image_rotary_emb), rotate(key, *image_rotary_emb)
        text = encoder_hidden_states
        query = torch.cat([query, heads(text, attn.add_q_proj, attn.norm_added_q)], dim=1)
        key = torch.cat([key, heads(text, attn.add_k_proj, attn.norm_added_k)], dim=1)
        value = torch.cat([heads(hidden_states, attn.to_v), heads(text, attn.add_v_proj)], dim=1)

        patches = hidden_states.shape[1]
        valid = F.pad(attention_mask.bool(), (patches, 0), value=True)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=valid[:, None, None, :])
        out = torch.where(valid[:, :, None], out.transpose(1, 2).flatten(2, 3), 0)

        image, text = out[:, :patches], out[:, patches:]
        image = attn.to_out[1](attn.to_out[0](image))
        return image, attn.to_add_out(text) if hasattr(attn, "to_add_out") else text

    return {"processor": processor}


def _hunyuan_video15(model: Any) -> Attributes:
    """Patch of HunyuanVideo 1.5, which branches on a blank image and packs the valid tokens of each sample.

    Here image, glyphs and text stay in place, with padding and a blank image masked. They have no rotary positions.
    """

    def forward(
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        timestep_r: Tensor | None = None,
        encoder_hidden_states_2: Tensor | None = None,
        encoder_attention_mask_2: Tensor | None = None,
        image_embeds: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        assert encoder_attention_mask_2 is not None and image_embeds is not None  # required by the original as well
        rotary = model.rope(hidden_states)
        temb = model.time_embed(timestep, timestep_r=timestep_r)
        x = model.x_embedder(hidden_states)
        kinds = model.cond_type_embed(torch.arange(3, device=x.device))
        text = model.context_embedder(encoder_hidden_states, timestep, encoder_attention_mask) + kinds[0]
        glyphs = model.context_embedder_2(encoder_hidden_states_2) + kinds[1]
        image = model.image_embedder(image_embeds) + kinds[2]
        context = torch.cat([image, glyphs, text], dim=1)
        has_image = (image_embeds != 0).any().expand(image.shape[:2])
        mask = torch.cat([has_image, encoder_attention_mask_2.bool(), encoder_attention_mask.bool()], dim=1)
        for block in model.transformer_blocks:
            x, context = block(x, context, temb, mask, rotary)
        return result(model, _video(model, model.proj_out(model.norm_out(x, temb)), hidden_states), return_dict)

    return {"forward": forward}


def _framepack(model: Any) -> Attributes:
    """Patch of HunyuanVideo Framepack, which fills the mask sample by sample and drops the padding of a single sample.

    Here the mask is a comparison of positions with lengths, and a single sample's padding is masked as in any batch.
    """

    def forward(
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        pooled_projections: Tensor,
        image_embeds: Tensor,
        indices_latents: Tensor,
        guidance: Tensor | None = None,
        latents_clean: Tensor | None = None,
        indices_latents_clean: Tensor | None = None,
        latents_history_2x: Tensor | None = None,
        indices_latents_history_2x: Tensor | None = None,
        latents_history_4x: Tensor | None = None,
        indices_latents_history_4x: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        height, width = hidden_states.shape[-2:]
        for earlier in (latents_clean, latents_history_2x, latents_history_4x):
            if earlier is not None:  # their positions are made for the height and width of the new frames
                torch._check(earlier.shape[-2] == height)
                torch._check(earlier.shape[-1] == width)
        p = model.config.patch_size
        for size in (height, width):  # else padded latents and padded positions may have other lengths
            torch._check(size % p == 0)
        x = model.x_embedder(hidden_states)
        tokens = x.shape[1]
        history = model.clean_x_embedder(latents_clean, latents_history_2x, latents_history_4x)
        frames = [indices_latents, indices_latents_clean, indices_latents_history_2x, indices_latents_history_4x]
        rotary = [model.rope(frame_indices=i, height=height, width=width, device=x.device) for i in frames]
        x, rotary = model._pack_history_states(x, *history, *rotary, height // p, width // p)

        temb, _ = model.time_text_embed(timestep, pooled_projections, guidance)
        text = model.context_embedder(encoder_hidden_states, timestep, encoder_attention_mask)
        image = model.image_projection(image_embeds)
        context = torch.cat([image, text], dim=1)
        length = x.shape[1] + image.shape[1] + encoder_attention_mask.sum(dim=1, keepdim=True)
        mask = torch.arange(x.shape[1] + context.shape[1], device=x.device) < length
        for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
            x, context = block(x, context, temb, mask[:, None, None, :], rotary)
        x = model.proj_out(model.norm_out(x[:, -tokens:], temb))
        return result(model, _video(model, x, hidden_states), return_dict)

    return {"forward": forward}


def _video(model: Any, x: Tensor, latents: Tensor) -> Tensor:
    """HunyuanVideo's tokens ``x`` unpatchified to a video of the size of ``latents``."""
    batch, _, frames, height, width = latents.shape
    p_t, p = model.config.patch_size_t, model.config.patch_size
    x = x.reshape(batch, frames // p_t, height // p, width // p, -1, p_t, p, p).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def _wan_animate(model: Any) -> Attributes:
    """Patch of Wan-Animate, which encodes faces in chunks to save memory; the number of chunks depends on the batch.

    Faces are encoded independently, so here one chunk that is larger than any batch takes them all. The numbers of
    frames of pose and face follow from that of the video.
    """
    original = model.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        arguments = inspect.signature(original).bind(*args, **kwargs).arguments
        frames = arguments["hidden_states"].shape[2]
        for name, count in (("pose_hidden_states", frames - 1), ("face_pixel_values", 4 * frames - 7)):
            if (x := arguments.get(name)) is not None:
                tie(x.shape[2], count)
        return original(**arguments | {"motion_encode_batch_size": 1 << 31})

    return {"forward": forward}


PATCHES: dict[str, Callable[[Any], Attributes]] = {
    "ChromaCombinedTimestepTextProjEmbeddings": _chroma_time_embed,
    "HiDreamImageTransformer2DModel": _hidream,
    "HunyuanVideo15Transformer3DModel": _hunyuan_video15,
    "HunyuanVideoFramepackTransformer3DModel": _framepack,
    "Lumina2Transformer2DModel": _lumina2,
    "LuminaPatchEmbed": _lumina_patch_embed,
    "MOEFeedForwardSwiGLU": _hidream_experts,
    "MochiAttention": _mochi_attention,
    "OmniGenSuScaledRotaryEmbedding": _omnigen_rope,
    "WanAnimateTransformer3DModel": _wan_animate,
    **NUMBER_PATCHES,
    **SIZE_PATCHES,
}
"""Patches by class name; a patch returns the attributes that an instance of the class gets."""
