"""Patches for diffusers transformers that compute with sizes in ways that fix them in an exported graph.

These models take any size, but their code branches on it, for example to read a stored table of positions at the
configured size and to compute the table at every other. The patches compute the same from symbolic sizes. Where no
size is free, the originals stay.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Attributes = dict[str, Any]
"""Attributes that a patched module instance gets; they take precedence over those of its class."""


def are_numbers(*sizes: object) -> bool:
    """Whether all sizes are numbers, that is, none is a symbol of the export."""
    return all(isinstance(size, int) for size in sizes)


def tie(one: Any, other: Any) -> None:
    """Require that two sizes are equal in every call, if they are in the example."""
    if example(one) == example(other):
        torch._check(one == other)


def example(size: Any) -> int:
    """The example of a size that may be a symbol of the export."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def original(module: nn.Module, name: str) -> Any:
    """A function, class or constant of the file that a module comes from."""
    return getattr(sys.modules[type(module).__module__], name)


def result(model: nn.Module, sample: Tensor | list[Tensor], return_dict: bool) -> Any:
    """The output of a diffusers transformer: a tuple of the sample, or samples, or a ``Transformer2DModelOutput``."""
    if not return_dict:
        return (sample,)
    return original(model, "Transformer2DModelOutput")(sample=sample)


def number(size: int, device: torch.device | None) -> Tensor:
    """A size, which may be a symbol, as a tensor of float64."""
    return torch.full((), size, dtype=torch.int64, device=device).double()


def linspace(start: Tensor, end: Tensor, steps: int) -> Tensor:
    """``torch.linspace`` of float32 values, with ends that are tensors of float64; equal to it but for rounding."""
    start, end = start.float(), end.float()
    place = torch.arange(steps, device=start.device)
    step = (end - start) / number(steps - 1, start.device).clamp_min(1).float()
    first = (place < steps // 2) | (place == 0)
    return torch.where(first, start + step * place, end - step * (steps - 1 - place))


def is_at(sizes: tuple[Any, ...], numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """A tensor of one bool: whether sizes, symbols among them, are equal to these numbers."""
    same = torch.ones((), dtype=torch.bool, device=device)
    for size, number in zip(sizes, numbers, strict=True):
        same = same & (torch.full((), size, dtype=torch.int64, device=device) == number)
    return same


def _is_recomputed(table: Tensor, computed: Callable[[torch.device], Tensor]) -> bool:
    """Whether a module's table is what it would compute at the table's size, rounded to the table's dtype.

    The values of a table on ``meta`` are not known; such a module gets those that it would compute.
    """
    device = torch.device("cpu")
    again = computed(device)
    return again.shape == table.shape and (table.is_meta or torch.equal(again.to(table.dtype), table.to(device)))


def patch_embed(module: Any) -> Attributes:
    """Patch of the patch embedding of DiT, PixArt, Latte and others, which has a table of positions for its own size.

    At other sizes the original computes the table. The stored one is the same, but has the dtype of the parameters.
    """
    if module.pos_embed_max_size is not None or module.pos_embed is None:
        return {}
    own, forward_ = (module.height, module.width), module.forward

    def positions(rows: int, columns: int, device: torch.device) -> Tensor:
        base, scale = module.base_size, module.interpolation_scale
        row = torch.arange(rows, device=device, dtype=torch.float32) / (number(rows, device) / base) / scale
        column = torch.arange(columns, device=device, dtype=torch.float32) / (number(columns, device) / base) / scale
        quarter = module.pos_embed.shape[-1] // 4
        frequencies = 1.0 / 10000 ** (torch.arange(quarter, device=device, dtype=torch.float64) / quarter)

        def waves(places: Tensor) -> Tensor:
            # A product of two axes and not torch.outer, which runtimes take for a matrix product.
            angles = places.reshape(-1, 1) * frequencies
            return torch.cat([angles.sin(), angles.cos()], dim=1).float()

        by_column, by_row = waves(column).unsqueeze(0), waves(row).unsqueeze(1)
        table = torch.cat([by_column.expand(rows, -1, -1), by_row.expand(-1, columns, -1)], dim=2)
        return table.flatten(0, 1).unsqueeze(0)

    if not _is_recomputed(module.pos_embed, lambda device: positions(*own, device)):
        return {}

    def forward(latent: Tensor) -> Tensor:
        rows, columns = latent.shape[-2] // module.patch_size, latent.shape[-1] // module.patch_size
        if are_numbers(rows, columns):
            return forward_(latent)  # type: ignore[no-any-return]
        x = module.proj(latent)
        if module.flatten:
            x = x.flatten(2).transpose(1, 2)
        if module.layer_norm:
            x = module.norm(x)
        table = positions(rows, columns, x.device)
        kind = module.pos_embed.dtype
        if kind != table.dtype:
            table = torch.where(is_at((rows, columns), own, x.device), table.to(kind).to(table.dtype), table)
        return (x + table).to(x.dtype)

    return {"forward": forward}


def dit(model: Any) -> Attributes:
    """Patch of DiT, which takes the root of the number of tokens for the height and the width of its output.

    Images are square, so the height is that of the input.
    """
    forward_ = model.forward

    def forward(
        hidden_states: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        height, width = hidden_states.shape[-2:]
        if are_numbers(height, width):
            return forward_(hidden_states, timestep, class_labels, cross_attention_kwargs, return_dict)
        torch._check(height == width)
        p = model.patch_size
        rows = height // p
        x = model.pos_embed(hidden_states)
        for block in model.transformer_blocks:
            x = block(x, timestep=timestep, cross_attention_kwargs=cross_attention_kwargs, class_labels=class_labels)
        condition = model.transformer_blocks[0].norm1.emb(timestep, class_labels, hidden_dtype=x.dtype)
        shift, scale = model.proj_out_1(F.silu(condition)).chunk(2, dim=1)
        x = model.proj_out_2(model.norm_out(x) * (1 + scale[:, None]) + shift[:, None])
        x = x.reshape(-1, rows, rows, p, p, model.out_channels).permute(0, 5, 1, 3, 2, 4)
        return result(model, x.flatten(4, 5).flatten(2, 3), return_dict)

    return {"forward": forward}


def cogvideox_patch_embed(embed: Any) -> Attributes:
    """Patch of CogVideoX, which has a table of positions for its own size and writes others into an empty table.

    Such writes cannot be traced. Here the table is a concatenation of zeros for the text and the patches' positions.
    Learned positions stay as they are.
    """
    own = (embed.sample_height, embed.sample_width, embed.sample_frames)

    def positions(height: int, width: int, frames: int, device: torch.device | None = None) -> Tensor:
        table = original(embed, "get_3d_sincos_pos_embed")(
            embed.embed_dim,
            (width // embed.patch_size, height // embed.patch_size),
            (frames - 1) // embed.temporal_compression_ratio + 1,
            embed.spatial_interpolation_scale,
            embed.temporal_interpolation_scale,
            device=device,
            output_type="pt",
        ).flatten(0, 1)
        return torch.cat([table.new_zeros(embed.max_text_seq_length, embed.embed_dim), table])[None]

    patched: Attributes = {"_get_positional_embeddings": positions}
    if not embed.use_positional_embeddings or embed.use_learned_positional_embeddings:
        return patched
    if embed.patch_size_t is not None or not _is_recomputed(
        embed.pos_embedding, lambda device: positions(*own, device)
    ):
        return patched
    forward_ = embed.forward

    def forward(text_embeds: Tensor, image_embeds: Tensor) -> Tensor:
        frames, _, height, width = image_embeds.shape[1:]
        if are_numbers(frames, height, width):
            return forward_(text_embeds, image_embeds)  # type: ignore[no-any-return]
        image = embed.proj(image_embeds.flatten(0, 1)).unflatten(0, (-1, frames))
        image = image.flatten(3).transpose(2, 3).flatten(1, 2)
        x = torch.cat([embed.text_proj(text_embeds), image], dim=1)
        frames = (frames - 1) * embed.temporal_compression_ratio + 1
        table, kind = positions(height, width, frames, x.device), embed.pos_embedding.dtype
        if kind not in (table.dtype, x.dtype):
            table = torch.where(is_at((height, width, frames), own, x.device), table.to(kind).to(table.dtype), table)
        return x + table.to(x.dtype)

    return {**patched, "forward": forward}


def cosmos_pos_embed(module: Any) -> Attributes:
    """Patch of Cosmos's position embedding, which normalises by the root of a ratio of element counts.

    NumPy takes the root, which a symbol has none of. The ratio is one by the number of channels at every size. The
    embedding depends on parameters only and is the same for all samples, so it is computed for one sample.
    """

    def forward(hidden_states: Tensor) -> Tensor:
        sizes = [size // patch for size, patch in zip(hidden_states.shape[2:], module.patch_size, strict=True)]
        time, row, column = (
            table[:size]
            for table, size in zip((module.pos_emb_t, module.pos_emb_h, module.pos_emb_w), sizes, strict=True)
        )
        x = (time[:, None, None] + row[:, None] + column).flatten(0, 2)[None]
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        norm = torch.add(module.eps, norm, alpha=math.sqrt(1 / x.shape[-1]))
        return (x / norm).type_as(hidden_states).expand(hidden_states.shape[0], -1, -1)

    return {"forward": forward}


def mochi_rope(rope: Any) -> Attributes:
    """Patch of Mochi's positions, which are spread evenly between ends that depend on the size."""
    original_ = rope._get_positions

    def centers(extent: int, scale: Tensor) -> Tensor:
        end = extent * scale / 2
        edges = linspace(-end, end, extent + 1)
        return (edges[:-1] + edges[1:]) / 2

    def positions(
        num_frames: int,
        height: int,
        width: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        if are_numbers(height, width) or dtype is not torch.float32:
            return original_(num_frames, height, width, device, dtype)  # type: ignore[no-any-return]
        scale = (rope.target_area / number(height * width, device)).sqrt()
        time = torch.arange(num_frames, device=device, dtype=dtype)
        places = torch.meshgrid(time, centers(height, scale), centers(width, scale), indexing="ij")
        return torch.stack(places, dim=-1).flatten(0, 2)

    return {"_get_positions": positions}


def easyanimate_rope(rope: Any) -> Attributes:
    """Patch of EasyAnimate's positions, for which the image is fitted into a grid of 60 x 90 by Python's rounding."""
    forward_ = rope.forward

    def forward(hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        frames, height, width = hidden_states.shape[2:]
        rows, columns = height // rope.patch_size, width // rope.patch_size
        if are_numbers(frames, rows, columns):
            return forward_(hidden_states)  # type: ignore[no-any-return]
        device, most = hidden_states.device, (60 // rope.patch_size, 90 // rope.patch_size)
        h, w = number(rows, device), number(columns, device)
        tall = h / w > most[0] / most[1]
        fitted = (
            torch.where(tall, most[0], (most[1] / w * h).round()),
            torch.where(tall, (most[0] / h * w).round(), most[1]),
        )

        def places(size: int, count: Tensor, extent: Tensor, whole: int) -> Tensor:
            start = ((whole - extent) / 2).round()
            return linspace(start, (start + extent) * (count - 1) / count, size)

        time = torch.arange(frames, device=device, dtype=torch.float32)
        row, column = places(rows, h, fitted[0], most[0]), places(columns, w, fitted[1], most[1])
        sizes, dims = (frames, rows, columns), (rope.rope_dim // 4, *[rope.rope_dim // 8 * 3] * 2)
        tables = [
            sys.modules[_EMBEDDINGS].get_1d_rotary_pos_embed(dim, x, use_real=True)
            for dim, x in zip(dims, (time, row, column), strict=True)
        ]

        def joined(which: int) -> Tensor:
            t, r, c = (table[which] for table in tables)
            spread = [t[:, None, None], r[None, :, None], c[None, None]]
            return torch.cat([x.expand(*sizes, -1) for x in spread], dim=-1).flatten(0, 2)

        return joined(0), joined(1)

    return {"forward": forward}


def joyimage(model: Any) -> Attributes:
    """Patch of JoyImage, which makes whole positions by ``linspace`` and reads the largest one into Python."""
    original_ = model.get_rotary_pos_embed

    def rotary(vis_rope_size: Sequence[Any], txt_rope_size: Any = None) -> tuple[Any, Any]:
        if are_numbers(*vis_rope_size, txt_rope_size or 0) or len(vis_rope_size) != 3:
            return original_(vis_rope_size, txt_rope_size)  # type: ignore[no-any-return]
        dims = model.rope_dim_list or [model.hidden_size // model.num_attention_heads // 3] * 3

        def tables(places: Sequence[Tensor]) -> tuple[Tensor, ...]:
            angles = []
            for dim, place in zip(dims, places, strict=True):
                frequencies = 1.0 / (model.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
                angles.append(torch.outer(place.flatten().float(), frequencies))
            return tuple(
                torch.cat([function(x).repeat_interleave(2, dim=1) for x in angles], dim=1)
                for function in (torch.cos, torch.sin)
            )

        grid = torch.meshgrid(*[torch.arange(size, dtype=torch.float32) for size in vis_rope_size], indexing="ij")
        image = tables(grid)
        if txt_rope_size is None:
            return image, None
        first = torch.sym_max(torch.sym_max(vis_rope_size[0], vis_rope_size[1]), vis_rope_size[2])
        return image, tables([torch.arange(txt_rope_size) + first] * 3)

    forward_ = model.forward

    @functools.wraps(forward_)
    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        for size, patch in zip(hidden_states.shape[-2:], model.patch_size[-2:], strict=True):
            torch._check(size % patch == 0)  # else the output's shape would be a quotient of sizes
        return forward_(hidden_states, *args, **kwargs)

    return {"get_rotary_pos_embed": rotary, "forward": forward}


class _NumbersAsTensors(TorchFunctionMode):
    """Makes tensors of symbols, where ``torch.as_tensor`` and ``torch.tensor`` would make constants."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.as_tensor, torch.tensor) and args and isinstance(args[0], torch.SymInt):
            options: dict[str, Any] = {"dtype": torch.int64} | (kwargs or {})
            return torch.full((), args[0], **options)  # type: ignore[call-overload]
        return func(*args, **(kwargs or {}))


def numbers_as_tensors(module: Any) -> Attributes:
    """Patch of models that make a tensor of the number of text tokens (QwenImage, NucleusMoE)."""
    forward_ = module.forward

    @functools.wraps(forward_)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with _NumbersAsTensors():
            return forward_(*args, **kwargs)

    return {"forward": forward}


def qwenimage21(model: Any) -> Attributes:
    """Patch of QwenImage 2.1, which reads into Python where the images are in the sequence of text and images.

    The original attends from each run of text, or image, to what precedes it. Here one mask says the same. How many
    tokens the images have, but not where they are, follows from ``img_shapes``.
    """
    forward_ = model.forward
    plain = all(type(block.attn.processor).__name__ == "QwenImage21AttnProcessor" for block in model.transformer_blocks)

    def rotary(shapes: Any, is_image: Tensor, rank: Tensor, ends: list[Any]) -> Tensor:
        """Angles of the tokens; ``rank`` is the number of image tokens before each, ``ends`` where images end."""
        device = rank.device
        place = (~is_image).long().cumsum(0) - (~is_image).long()
        rows, columns = [], []
        for (_, height, width), end in zip(shapes, ends, strict=True):
            place = place + (rank >= end) * torch.sym_max(height, width)
            token = torch.arange(height * width, device=device)
            rows.append(token // width - (height - height // 2))
            columns.append(token % width - (width - width // 2))
        inside = rank.clamp_max(ends[-1] - 1)
        places = [place, *(torch.where(is_image, torch.cat(x)[inside], place) for x in (rows, columns))]
        tables = [table.to(device) for table in model.pos_embed.freqs]
        return torch.cat([table[place] for table, place in zip(tables, places, strict=True)], dim=-1)

    @functools.wraps(forward_)
    def forward(
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        img_shapes: Any,
        img_mask: Tensor,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        kv_cache: Any = None,
        kv_cache_mode: str | None = None,
        return_dict: bool = True,
    ) -> Any:
        shapes = img_shapes[0]
        lengths = [height * width for _, height, width in shapes]
        ends = list(itertools.accumulate(lengths))
        text, slots, group = encoder_hidden_states.shape[1], img_mask.shape[1], original(model, "_IMG_TOKENS_PER_SLOT")
        torch._check(slots == text + lengths[-1] // group)
        torch._check(hidden_states.shape[1] == ends[-1])
        device, total = hidden_states.device, slots + (group - 1) * (ends[-1] // group)

        x, words = model.img_in(hidden_states), model.txt_in(encoder_hidden_states)
        token = torch.arange(total, device=device)
        slot = (token[:, None] >= torch.where(img_mask[0], group, 1).cumsum(0)).sum(1)
        is_image = img_mask[0][slot]
        rank = is_image.long().cumsum(0) - is_image.long()
        word = slot.clamp_max(text - 1)
        x = torch.where(is_image[:, None], x[:, rank.clamp_max(ends[-1] - 1)], words[:, word])
        image = torch.where(is_image, sum((rank >= end).long() for end in ends), -1)
        is_target = image == len(ends) - 1

        mask = (token[:, None] >= token) | ((image[:, None] == image) & is_image) | is_target[:, None]
        mask = mask[None, None]
        if encoder_hidden_states_mask is not None:
            torch._check(encoder_hidden_states_mask.shape[1] == text)
            mask = mask & (is_image | encoder_hidden_states_mask.bool()[:, word])[:, None, None]
        timestep = timestep.to(x.dtype)
        if model.config.causal_condition:
            timestep = torch.cat([timestep, timestep.new_zeros(1)])
        temb = model.time_text_embed(timestep, x)
        modulation, noisy = model.modulation(temb), is_target if model.config.causal_condition else None
        angles = rotary(shapes, is_image, rank, ends)
        for block in model.transformer_blocks:
            x = block(
                hidden_states=x,
                modulation=modulation,
                rotary_emb=angles,
                attention_mask=mask,
                target_token_mask=noisy,
            )
        return result(model, model.proj_out(model.norm_out(x, temb, noisy)), return_dict)

    return {"forward": forward} if plain else {}


def chronoedit_rope(rope: Any) -> Attributes:
    """Patch of ChronoEdit's positions: the second of two frames has a late position, the frames of a video their own.

    The original branches on the number of frames. Here ``where`` selects the positions.
    """
    forward_ = rope.forward

    def forward(hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        frames = hidden_states.shape[2]
        if are_numbers(frames) or rope.patch_size[0] != 1:
            return forward_(hidden_states)  # type: ignore[no-any-return]
        rows, columns = (
            size // patch for size, patch in zip(hidden_states.shape[3:], rope.patch_size[1:], strict=True)
        )
        third = rope.attention_head_dim // 3
        place = torch.arange(frames, device=hidden_states.device)
        late = place * (min(rope.temporal_skip_len, len(rope.freqs_cos)) - 1)
        place = torch.where(is_at((frames,), (2,), place.device), late, place)

        def spread(table: Tensor) -> Tensor:
            time, row, column = table.split([rope.attention_head_dim - 2 * third, third, third], dim=1)
            parts = [time[place][:, None, None], row[:rows][None, :, None], column[:columns][None, None]]
            return torch.cat([x.expand(frames, rows, columns, -1) for x in parts], dim=-1).flatten(0, 2)[None, :, None]

        return spread(rope.freqs_cos), spread(rope.freqs_sin)

    return {"forward": forward}


def bria_fibo2(model: Any) -> Attributes:
    """Patch of Bria Fibo 2, which makes lists as long as the batch of the prompts' lengths and numbers of gist tokens.

    Without a mask, all prompts are equally long, so one number stands for all. With one, the original stays.
    """
    forward_ = model.forward

    def forward(
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        context_latents: list[Tensor] | None = None,
        return_dict: bool = True,
    ) -> Any:
        batch, channels, height, width = hidden_states.shape
        if encoder_attention_mask is not None or context_latents or are_numbers(batch):
            return forward_(
                hidden_states, timestep, encoder_hidden_states, encoder_attention_mask, context_latents, return_dict
            )
        config, device = model.config, hidden_states.device
        p = config.patch_size
        rows, columns = height // p, width // p
        noisy = model.t_embedder(timestep * config.t_scale)
        clean = model.t_embedder(torch.zeros_like(timestep))
        levels = {"adaln_noisy": noisy, "adaln_clean": clean}

        grid = model.create_coordinate_grid((1, rows, columns), (config.max_num_gist_tokens + 1, 0, 0), device)
        rotary = model.rope_embedder(grid.flatten(0, 2))[None]
        x = model.x_embedder(model._patchify(hidden_states))
        for block in model.noise_refiner:
            x = block(x, None, rotary, adaln_input=noisy, noise_mask=None, **levels)

        (gists,) = original(model, "compute_gist_count")(
            [int(encoder_hidden_states.shape[2])],
            min_gist=config.min_num_gist_tokens,
            max_gist=config.max_num_gist_tokens,
            gist_step=config.gist_step,
            min_text_len=config.gist_min_text_len,
            max_text_len=config.gist_max_text_len,
        )
        gist = model.perceiver(encoder_hidden_states[:, 0], gists, None, None)
        ids = model.create_coordinate_grid((gists, 1, 1), (1, 0, 0), device).flatten(0, 2)
        x = torch.cat([gist, x], dim=1)
        rotary = torch.cat([model.rope_embedder(ids)[None], rotary], dim=1)
        is_noisy = (torch.arange(x.shape[1], device=device) >= gists).long().expand(batch, -1)
        bundles = {layer: i + 1 for i, layer in enumerate(config.injection_layer_ids)}
        for layer, block in enumerate(model.layers):
            text = encoder_hidden_states[:, bundles[layer]] if layer in bundles else None
            x = block(x, None, rotary, noise_mask=is_noisy, encoder_hidden_states=text, **levels)
        x = model.final_layer(x[:, gists:], c=noisy)
        x = x.reshape(batch, rows, columns, channels, p, p).permute(0, 3, 1, 4, 2, 5)
        return result(model, x.flatten(4, 5).flatten(2, 3), return_dict)

    return {"forward": forward}


def helios(model: Any) -> Attributes:
    """Patch of Helios, whose frames of the past are as many as their indices, and all of one height and width.

    The export would see that only in the number of all tokens.
    """
    forward_ = model.forward

    @functools.wraps(forward_)
    def forward(*args: Any, **kwargs: Any) -> Any:
        arguments = inspect.signature(forward_).bind(*args, **kwargs).arguments
        first = arguments.get("latents_history_short")
        for part in ("short", "mid", "long"):
            latents, indices = (arguments.get(f"{what}latents_history_{part}") for what in ("", "indices_"))
            if latents is None or indices is None or first is None:
                continue
            tie(latents.shape[2], indices.shape[-1])
            for axis, patch in ((-2, model.config.patch_size[-2]), (-1, model.config.patch_size[-1])):
                tie(latents.shape[axis], first.shape[axis])
                tie(latents.shape[axis] % patch, 0)
        return forward_(*args, **kwargs)

    return {"forward": forward}


def kandinsky6_rope(rope: Any) -> Attributes:
    """Patch of Kandinsky 6's positions, which make an ``int`` of the length of each axis."""

    def forward(
        pos: tuple[Tensor, Tensor, Tensor], scale_factor: tuple[float, float, float] = (1.0, 1.0, 1.0)
    ) -> Tensor:
        tables = (rope.angles_0, rope.angles_1, rope.angles_2)
        time, row, column = (
            table[place] / scale for table, place, scale in zip(tables, pos, scale_factor, strict=True)
        )
        sizes = [place.shape[0] for place in pos]
        parts = [time[:, None, None], row[None, :, None], column[None, None]]
        angles = torch.cat([x.expand(*sizes, -1) for x in parts], dim=-1)
        cos, sin = torch.cos(angles), torch.sin(angles)
        return torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2)).unsqueeze(-4)

    return {"forward": forward}


def kandinsky6(model: Any) -> Attributes:
    """Patch of Kandinsky 6, in which whole patches and as many positions as patches would show only in products."""
    forward_ = model.forward

    @functools.wraps(forward_)
    def forward(*args: Any, **kwargs: Any) -> Any:
        arguments = inspect.signature(forward_).bind(*args, **kwargs).arguments
        places = arguments.get("visual_rope_pos") or [None] * 3
        for size, patch, place in zip(arguments["hidden_states"].shape[1:4], model.patch_size, places, strict=True):
            torch._check(size % patch == 0)
            if place is not None:
                torch._check(place.shape[0] == size // patch)
        return forward_(*args, **kwargs)

    return {"forward": forward}


def z_image(model: Any) -> Attributes:
    """Patch of Z-Image, whose samples come in lists, for images of one size and captions of one length.

    With captions of several lengths the original runs, and fixes all sizes: it takes ``len`` of tensors. Both sequences
    are padded with a learned token to a multiple of 32. The caption's positions (1 + i, 0, 0) go on through its
    padding; those of the image's padding are (0, 0, 0).
    """
    forward_ = model.forward
    multiple = original(model, "SEQ_MULTI_OF")

    def padded(x: Tensor, token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sequences (N, T, C) with padding, the places in them, and whether each has a token of the sequence."""
        place = torch.arange((x.shape[1] + multiple - 1) // multiple * multiple, device=x.device)
        real = place < x.shape[1]
        return torch.where(real[:, None], x[:, place.clamp_max(x.shape[1] - 1)], token), place, real

    def rotary(batch: int, *ids: Tensor) -> Tensor:
        return model.rope_embedder(torch.stack(ids, dim=-1)).expand(batch, -1, -1)  # type: ignore[no-any-return]

    @functools.wraps(forward_)
    def forward(
        x: Any,
        t: Tensor,
        cap_feats: Any,
        return_dict: bool = True,
        controlnet_block_samples: Any = None,
        siglip_feats: Any = None,
        image_noise_mask: Any = None,
        patch_size: int = 2,
        f_patch_size: int = 1,
        joint_attention_kwargs: Any = None,
    ) -> Any:
        others = [controlnet_block_samples, siglip_feats, image_noise_mask, joint_attention_kwargs]
        listed = all(isinstance(sample, Tensor) for sample in (*x, *cap_feats))
        shapes = [[tuple(map(example, sample.shape)) for sample in samples] for samples in (x, cap_feats) if listed]
        alike = listed and all(len(set(own)) == 1 for own in shapes)
        free = alike and not are_numbers(*x[0].shape, *cap_feats[0].shape)
        if not free or any(value is not None for value in others):
            return forward_(x, t, cap_feats, return_dict, *others[:3], patch_size, f_patch_size, others[3])
        images, texts = torch.stack(list(x)), torch.stack(list(cap_feats))
        batch, channels, frames, height, width = images.shape
        pf, p = f_patch_size, patch_size
        for size, patch in ((frames, pf), (height, p), (width, p)):
            torch._check(size % patch == 0)
        depth, rows, columns = frames // pf, height // p, width // p
        key = f"{p}-{pf}"
        condition = model.t_embedder(t * model.t_scale).type_as(images)

        text, place, _ = padded(model.cap_embedder(texts), model.cap_pad_token)
        for size, length in zip(
            (place.shape[0] + depth + 1, rows, columns), model.rope_embedder.axes_lens, strict=True
        ):
            torch._check(size <= length)
        zero = torch.zeros_like(place)
        text_rotary = rotary(batch, place + 1, zero, zero)
        first = place.shape[0] + 1

        patches = images.view(batch, channels, depth, pf, rows, p, columns, p).permute(0, 2, 4, 6, 3, 5, 7, 1)
        image, place, real = padded(model.all_x_embedder[key](patches.flatten(4).flatten(1, 3)), model.x_pad_token)
        ids = (first + place // (rows * columns), place // columns % rows, place % columns)
        image_rotary = rotary(batch, *(torch.where(real, one, 0) for one in ids))

        for layer in model.noise_refiner:
            image = layer(image, None, image_rotary, condition)
        for layer in model.context_refiner:
            text = layer(text, None, text_rotary)
        both, both_rotary = torch.cat([image, text], dim=1), torch.cat([image_rotary, text_rotary], dim=1)
        for layer in model.layers:
            both = layer(both, None, both_rotary, condition)
        both = model.all_final_layer[key](both, c=condition)[:, : depth * rows * columns]
        both = both.reshape(batch, depth, rows, columns, pf, p, p, model.out_channels).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return result(model, list(both.flatten(6).flatten(4, 5).flatten(2, 3).unbind()), return_dict)

    return {"forward": forward}


_EMBEDDINGS = "diffusers.models.embeddings"

SIZE_PATCHES: dict[str, Callable[[Any], Attributes]] = {
    "BriaFibo2Transformer2DModel": bria_fibo2,
    "ChronoEditRotaryPosEmbed": chronoedit_rope,
    "CogVideoXPatchEmbed": cogvideox_patch_embed,
    "CosmosLearnablePositionalEmbed": cosmos_pos_embed,
    "DiTTransformer2DModel": dit,
    "EasyAnimateRotaryPosEmbed": easyanimate_rope,
    "HeliosTransformer3DModel": helios,
    "JoyImageEditTransformer3DModel": joyimage,
    "Kandinsky6RoPE3D": kandinsky6_rope,
    "Kandinsky6Transformer3DModel": kandinsky6,
    "MochiRoPE": mochi_rope,
    "NucleusMoEImageTransformer2DModel": numbers_as_tensors,
    "PatchEmbed": patch_embed,
    "QwenImage21Transformer2DModel": qwenimage21,
    "QwenImageTransformer2DModel": numbers_as_tensors,
    "ZImageTransformer2DModel": z_image,
}
"""Patches by class name; a patch returns the attributes that an instance of the class gets."""
