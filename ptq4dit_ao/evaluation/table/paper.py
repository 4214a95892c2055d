"""Results that the paper reports (PTQ4DiT, arXiv 2405.16005, Tables 1 to 3), for tables of the paper's setting."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from ptq4dit_ao.evaluation.table.settings import TableSettings
from ptq4dit_ao.metrics import FeatureNetwork
from ptq4dit_ao.workflow.models import LoadedModel

METRICS = ("FID", "sFID", "IS", "precision")
"""Metrics that the paper reports."""
_DIT_XL_2 = {
    "num_layers": 28,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}


@dataclass(frozen=True, kw_only=True)
class PaperFigures:
    """Results that the paper reports for one resolution."""

    solver: str
    """Name of the paper's sampler."""
    rows: dict[tuple[int, str | None, str], tuple[float | None, ...]]
    """(steps, bits, method) -> values of ``METRICS``."""

    def of(self, steps: int, bits: str | None, method: str) -> tuple[float | None, ...] | None:
        """Values of one row; None if the paper has no such row."""
        return self.rows.get((steps, bits, method))


def paper_figures(
    model: LoadedModel, network: FeatureNetwork | None, has_reference: bool, settings: TableSettings
) -> PaperFigures | None:
    """Results of the paper, if the table has the paper's setting as far as that is known; otherwise None.

    The setting is a DiT-XL/2 for 1000 classes, loaded from a folder with its pipeline's VAE; Inception features and a
    reference set; and the paper's sampler, number of images, guidance, learning steps and layers.
    """
    config = getattr(model.transformer, "config", {})
    if type(model.transformer).__name__ != "DiTTransformer2DModel" or model.folder is None:
        return None
    if getattr(model.pipeline, "vae", None) is None or any(config.get(key) != n for key, n in _DIT_XL_2.items()):
        return None
    if network is None or not network.is_inception or not has_reference:
        return None
    data = _data()
    if settings.sampler != data["solver"].lower() or settings.layers != "paper" or settings.adaround_steps:
        return None
    for setting in data["settings"]:
        asked = (config.get("sample_size"), settings.samples, settings.guidance)
        if asked == (setting["latent_size"], setting["images"], setting["guidance"]):
            rows = {(steps, bits, name): tuple(values) for steps, bits, name, *values in setting["rows"]}
            return PaperFigures(solver=data["solver"], rows=rows)
    return None


def _data() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(files(__package__).joinpath("paper.json").read_text(encoding="utf-8"))
    return data
