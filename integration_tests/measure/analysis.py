"""Time to find the balance sites of full-size models, and its growth with depth, on the meta device.

    python integration_tests/measure/analysis.py

The configurations are those of the published checkpoints. No weights are needed, and none are allocated.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import diffusers
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from ptq4dit_ao import export_transformer, find_sites
from ptq4dit_ao.graph.names import linears


def dit_xl_2(depth: int = 28) -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=depth, sample_size=32,
        patch_size=2, norm_type="ada_norm_zero", num_embeds_ada_norm=1000,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.empty(2, 4, 32, 32),
        "timestep": torch.empty(2, dtype=torch.long),
        "class_labels": torch.empty(2, dtype=torch.long),
    }


def pixart_sigma(depth: int = 28) -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=depth,
        cross_attention_dim=1152, sample_size=128, patch_size=2, caption_channels=4096, use_additional_conditions=False,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.empty(2, 4, 128, 128),
        "encoder_hidden_states": torch.empty(2, 300, 4096),
        "timestep": torch.empty(2, dtype=torch.long),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "encoder_attention_mask": torch.empty(2, 300),
    }


def sd35_medium(depth: int = 24) -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.SD3Transformer2DModel(
        sample_size=128, patch_size=2, in_channels=16, num_layers=depth, attention_head_dim=64, num_attention_heads=24,
        joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048, out_channels=16,
        pos_embed_max_size=384, dual_attention_layers=tuple(range(min(13, depth))), qk_norm="rms_norm",
    )  # fmt: skip
    return model, {
        "hidden_states": torch.empty(2, 16, 128, 128),
        "encoder_hidden_states": torch.empty(2, 333, 4096),
        "pooled_projections": torch.empty(2, 2048),
        "timestep": torch.empty(2),
    }


def flux_dev(depth: int = 19) -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=depth, num_single_layers=2 * depth, attention_head_dim=128,
        num_attention_heads=24, joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.empty(2, 4096, 64),
        "encoder_hidden_states": torch.empty(2, 512, 4096),
        "pooled_projections": torch.empty(2, 768),
        "timestep": torch.empty(2),
        "img_ids": torch.empty(4096, 3),
        "txt_ids": torch.empty(512, 3),
        "guidance": torch.empty(2),
    }


MODELS = {
    "DiT-XL/2": (dit_xl_2, (7, 14, 28)),
    "PixArt-Sigma": (pixart_sigma, (7, 14, 28)),
    "SD3.5-medium": (sd35_medium, (6, 12, 24)),
    "Flux-dev": (flux_dev, (5, 10, 19)),
}


def measure(build: Any, depth: int) -> dict[str, object]:
    """Seconds to capture and to analyse a model of ``depth`` blocks."""
    with torch.device("meta"):
        model, inputs = build(depth)
        model.eval().requires_grad_(False)
        start = time.perf_counter()
        graph = export_transformer(model, inputs)
        captured = time.perf_counter()
        sites = find_sites(graph)
        found = time.perf_counter()
    return {
        "depth": depth,
        "parameters": sum(p.numel() for p in model.parameters()),
        "nodes": len(graph.graph.nodes),
        "linears": len(linears(graph)),
        "sites": dict(Counter(site.kind for site in sites)),
        "export_s": round(captured - start, 2),
        "analysis_s": round(found - captured, 2),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("analysis.json"))
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    console = Console()
    table = Table("model", "blocks", "parameters", "nodes", "linears", "sites", "export s", "analysis s", "peak RSS MB")
    figures: dict[str, list[dict[str, object]]] = {}
    jobs = [(name, depth) for name in args.models for depth in MODELS[name][1]]
    for name, depth in track(jobs, "models", console=console):
        row = measure(MODELS[name][0], depth)
        figures.setdefault(name, []).append(row)
        sites = ", ".join(f"{count} {kind}" for kind, count in dict(row["sites"]).items())  # type: ignore[call-overload]
        size = f"{int(str(row['parameters'])) / 1e6:.0f} M"
        shown = (row["nodes"], row["linears"], sites, row["export_s"], row["analysis_s"], row["peak_rss_mb"])
        table.add_row(name, str(depth), size, *map(str, shown))
    console.print(table)
    about = {"torch": torch.__version__, "diffusers": diffusers.__version__, "machine": platform.processor()}
    args.json.write_text(json.dumps({"models": figures, **about}, indent=1) + "\n")


if __name__ == "__main__":
    main()
