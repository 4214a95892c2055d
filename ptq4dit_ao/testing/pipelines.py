"""Whole pipelines of diffusers with tiny random models: text encoders, tokenizers, transformers and VAE."""

from __future__ import annotations

import importlib
import json
import string
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ptq4dit_ao.evaluation.bench.random_dit import randomize_

LETTERS = string.ascii_lowercase + string.digits + ",."
WIDTH = 24
"""Width of the text encoders."""


def tiny_sd3_pipeline(seed: int = 0) -> Any:
    """Stable Diffusion 3 with its three text encoders, for images of 64 pixels."""
    from transformers import CLIPTextModelWithProjection

    diffusers = _diffusers(seed)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=32, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=2 * WIDTH, pooled_projection_dim=2 * WIDTH, out_channels=4,
        qk_norm="rms_norm",
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        sample_size=32, in_channels=3, out_channels=3, block_out_channels=(4,), layers_per_block=1, latent_channels=4,
        norm_num_groups=1, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609, scaling_factor=1.5035,
    )  # fmt: skip
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=_drawn(transformer, seed),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae.eval(),
        text_encoder=CLIPTextModelWithProjection(_clip_config()).eval(),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(_clip_config()).eval(),
        tokenizer_2=_clip_tokenizer(),
        text_encoder_3=_t5(2 * WIDTH),
        tokenizer_3=_t5_tokenizer(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_wan_pipeline(seed: int = 0) -> Any:
    """Wan 2.2 with both of its experts, for videos of 16 pixels."""
    diffusers = _diffusers(seed)
    experts = [
        _drawn(
            diffusers.WanTransformer3DModel(
                patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
                text_dim=WIDTH, freq_dim=32, ffn_dim=48, num_layers=2, cross_attn_norm=True,
                qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
            ),
            seed + number,
        )
        for number in (0, 1)
    ]  # fmt: skip
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    pipeline = diffusers.WanPipeline(
        transformer=experts[0],
        transformer_2=experts[1],
        vae=vae.eval(),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
        ),
        text_encoder=_t5(WIDTH, umt5=True),
        tokenizer=_t5_tokenizer(),
        boundary_ratio=0.875,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _diffusers(seed: int) -> Any:
    """diffusers, with torch's generator set."""
    torch.manual_seed(seed)
    return importlib.import_module("diffusers")


def _drawn(model: nn.Module, seed: int) -> nn.Module:
    return randomize_(model, seed).eval().requires_grad_(False)


def _t5(width: int, *, umt5: bool = False) -> Any:
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    sizes: dict[str, Any] = {"d_model": width, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
    return (UMT5EncoderModel(UMT5Config(**sizes)) if umt5 else T5EncoderModel(T5Config(**sizes))).eval()


def _clip_config() -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=128, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        projection_dim=WIDTH, max_position_embeddings=77, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip


def _clip_tokenizer() -> Any:
    """A tokenizer of single letters."""
    from transformers import CLIPTokenizer

    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocabulary.write_text(json.dumps({word: index for index, word in enumerate(words)}))
        merges.write_text("#version: 0.2\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def _t5_tokenizer() -> Any:
    """A tokenizer of single letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import T5TokenizerFast  # type: ignore[attr-defined]

    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((letter, -3.0) for letter in LETTERS)]
    tokenizer = Tokenizer(models.Unigram(words, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0, model_max_length=77)
