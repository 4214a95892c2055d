"""Model card of a quantized module: how it was quantized, how exact it is, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torchao.utils import TorchAOBaseTensor

from ptq4dit_ao.modules.form import dtype_of, integer_weights
from ptq4dit_ao.modules.weight import StaticInt8Weight
from ptq4dit_ao.recipe.yaml_text import write_yaml

STOCK = """\
```python
import torch
from diffusers import {kind}

model = {kind}.from_pretrained(FOLDER, torch_dtype=torch.{dtype})
```

diffusers and torchao read it; no other package is needed. Give `torch_dtype`, because diffusers would take bfloat16.
With `ptq4dit_ao.as_fast_module(model)` it computes the same with faster kernels on x86.
"""

OWN = """\
```python
import ptq4dit_ao  # registers the format with diffusers
from diffusers import {kind}

model = {kind}.from_pretrained(FOLDER)
```

Install `ptq4dit-ao` for it. Two weights of 4 bits share a byte, and are unpacked to 8 bits when they are loaded.
"""


def model_card(module: nn.Module, recipe: Mapping[str, Any], report: Mapping[str, Any], stored_bytes: int) -> str:
    """The card as Markdown with a YAML header.

    Args:
        module: the module of diffusers.
        recipe: its recipe.
        report: its report.
        stored_bytes: size of its weights on disk.
    """
    diffusers_module: Any = module
    config, method = diffusers_module.config, diffusers_module.hf_quantizer.quantization_config.quant_method.value
    weights = list(integer_weights(module).values())
    bits, x_bits = (_range({getattr(weight, name) for weight in weights}) for name in ("bits", "x_bits"))
    header: dict[str, Any] = {"library_name": "diffusers", "tags": ["ptq4dit", "quantized", f"w{bits}a{x_bits}"]}
    base = str(config.get("_name_or_path") or "")
    if base.count("/") == 1 and not base.startswith((".", "/")):
        header |= {"base_model": base, "base_model_relation": "quantized"}
    text = (STOCK if method == "torchao" else OWN).format(kind=type(module).__name__, dtype=_dtype(module))
    return "\n".join(
        [
            _header(header),
            f"# {type(module).__name__}, W{bits}A{x_bits}\n",
            f"Post-training quantization by PTQ4DiT: {recipe.get('description') or 'integer weights and activations'}.",
            "Integers, scales and ranges are static; each linear balances and quantizes its own input.\n",
            _table(module, report, weights, stored_bytes),
            f"\n## Load it\n\n{text}",
            f"## Recipe\n\n```yaml\n{write_yaml(recipe)}```\n",
        ]
    )


def _table(module: nn.Module, report: Mapping[str, Any], weights: list[StaticInt8Weight], stored: int) -> str:
    elements = sum(parameter.numel() for parameter in module.parameters())
    linears = sum(isinstance(child, nn.Linear) for child in module.modules())
    rows = {
        "Quantized linears": f"{len(weights)} of {linears}",
        "Parameters": f"{elements:,}",
        "Weights on disk": f"{stored / 2**20:.1f} MiB, {stored / max(1, 4 * elements):.3f} of float32",
    }
    evaluation = report.get("evaluation")
    if evaluation:
        where = "samples of its calibration" if evaluation["on_calibration_samples"] else "other samples"
        rows["Signal to noise of the output"] = f"{evaluation['sqnr_db']:.1f} dB against the float model, on {where}"
    for name, version in report.get("versions", {}).items():
        rows[name] = str(version)
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def stored_bytes(folder: Path) -> int:
    """Bytes of the weights that are saved in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _range(values: set[int]) -> str:
    return "-".join(map(str, sorted({min(values), max(values)}))) if values else "?"


def _dtype(module: nn.Module) -> str:
    return str(dtype_of(module)).removeprefix("torch.")


PIPELINE = {"library_name": "diffusers", "tags": ["ptq4dit", "quantized"]}
"""Header of a pipeline's card."""


@dataclass(frozen=True, kw_only=True)
class ComponentEntry:
    """One saved module of a pipeline."""

    quantized: int
    """Number of quantized linears."""
    linears: int
    stored: int
    """Bytes of its weights on disk."""
    ratio: float
    """Their part of the bytes of its parameters in float32."""
    error: str
    """SQNR of its output in dB, as text."""


def component_entries(pipeline: Any, folder: Path) -> dict[str, ComponentEntry]:
    """The modules of a pipeline that is saved in ``folder``, by name."""
    entries = {}
    for name, module in pipeline.components.items():
        if isinstance(module, nn.Module):
            linears = [child for child in module.modules() if isinstance(child, nn.Linear)]
            stored = stored_bytes(folder / name)
            record = getattr(getattr(module, "hf_quantizer", None), "record", None)
            evaluation = None if record is None else record.report.get("evaluation")
            entries[name] = ComponentEntry(
                quantized=sum(isinstance(linear.weight, TorchAOBaseTensor) for linear in linears),
                linears=len(linears),
                stored=stored,
                ratio=stored / max(1, 4 * sum(parameter.numel() for parameter in module.parameters())),
                error=f"{evaluation['sqnr_db']:.1f}" if evaluation else "-",
            )
    return entries


def pipeline_card(pipeline: Any, folder: Path) -> str:
    """The card of a pipeline with quantized components, as it is saved in ``folder``."""
    rows = [
        f"| {name} | {x.quantized} of {x.linears} | {x.stored / 2**20:.1f} MiB | {x.ratio:.3f} | {x.error} |"
        for name, x in component_entries(pipeline, folder).items()
    ]
    own = any((folder / name / "config.json").is_file() and _is_own(folder / name) for name in pipeline.components)
    first = "import ptq4dit_ao  # registers the format with diffusers\n" if own else ""
    dtype = _dtype(next(module for module in pipeline.components.values() if isinstance(module, nn.Module)))
    return "\n".join(
        [
            _header(PIPELINE),
            f"# {type(pipeline).__name__} with quantized components\n",
            "| component | quantized linears | weights on disk | of float32 | SQNR, dB |",
            "|---|---|---|---|---|",
            *rows,
            "\nA quantized transformer has a card of its own in its folder, with its recipe and its error.",
            f"\n## Load it\n\n```python\n{first}import torch\nfrom diffusers import DiffusionPipeline\n\n"
            f"pipe = DiffusionPipeline.from_pretrained(FOLDER, torch_dtype=torch.{dtype})\n```\n",
        ]
    )


def is_pipeline_card(path: Path) -> bool:
    """Whether a file is a card that :func:`pipeline_card` has made."""
    return path.is_file() and path.read_text(encoding="utf-8", errors="replace").startswith(_header(PIPELINE))


def _header(data: Mapping[str, object]) -> str:
    return f"---\n{write_yaml(data)}---"


def _is_own(folder: Path) -> bool:
    config = json.loads((folder / "config.json").read_text()).get("quantization_config") or {}
    return bool(config.get("quant_method") == "ptq4dit")
