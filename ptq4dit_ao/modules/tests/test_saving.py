"""Quantized modules on disk: read by diffusers, packed, whole or not at all, with a card, and nothing unsafe."""

from __future__ import annotations

import errno
import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torchao.quantization import Int8Tensor

from ptq4dit_ao import as_fast_module, to_module
from ptq4dit_ao.core import sqnr_db
from ptq4dit_ao.errors import ArgumentError, ArtifactError
from ptq4dit_ao.modules import saving
from ptq4dit_ao.modules.diffusers_quantizer import PTQ4DiTConfig
from ptq4dit_ao.modules.form import integer_weights
from ptq4dit_ao.modules.tests.test_form import case, outputs
from ptq4dit_ao.testing.zoo import FAMILIES

SD3 = diffusers.SD3Transformer2DModel


@functools.cache
def module(bits: int = 8, method: str | None = None) -> Any:
    """A tiny quantized SD3. Not to be changed."""
    model, quantized = case("sd3", bits)
    return to_module(quantized, model, method=method, verify=False)  # type: ignore[arg-type]


@torch.no_grad()
def run(model: Any) -> torch.Tensor:
    return outputs(model(**FAMILIES["sd3"].inputs(2, seed=3)))


def read(folder: Path, **options: Any) -> Any:
    return SD3.from_pretrained(folder, **options)


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(("bits", "method"), [(8, None), (4, "torchao")])
@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_diffusers_reads_torchaos_format_and_computes_the_same(tmp_path, bits, method, shard):
    saved = module(bits, method)
    saved.save_pretrained(tmp_path / "m", max_shard_size=shard)
    assert config(tmp_path / "m")["quantization_config"]["quant_method"] == "torchao"
    assert (len(list((tmp_path / "m").glob("*.safetensors"))) > 1) == (shard == "20KB")
    loaded = read(tmp_path / "m", torch_dtype=torch.float32)
    kinds = {type(x.weight) for x in loaded.modules() if isinstance(x, torch.nn.Linear)}
    assert Int8Tensor in kinds and len(kinds) <= 2
    assert sqnr_db(run(saved), run(loaded)) > 45
    again = read(tmp_path / "m", torch_dtype=torch.float32)
    assert torch.equal(run(loaded), run(again))
    assert torch.equal(run(as_fast_module(again)), run(saved))
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(run(read(tmp_path / "again", torch_dtype=torch.float32)), run(loaded))
    assert again.hf_quantizer.record == saved.hf_quantizer.record
    assert sqnr_db(run(saved), run(again.dequantize())) > 10


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_the_own_format_comes_back_bit_equal_and_knows_its_quantization(tmp_path, bits, shard):
    saved = module(bits, "ptq4dit")
    saved.save_pretrained(tmp_path / "m", max_shard_size=shard)
    loaded = read(tmp_path / "m")
    assert torch.equal(run(loaded), run(saved))
    record = loaded.hf_quantizer.record
    assert record == saved.hf_quantizer.record and record.recipe["weights"]["bits"] == bits
    assert {s["name"] for s in record.report["sites"]} and not any(p.requires_grad for p in loaded.parameters())
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(run(read(tmp_path / "again")), run(saved))


def test_four_bits_take_half_a_byte_on_disk(tmp_path):
    module(4).save_pretrained(tmp_path / "m")
    assert config(tmp_path / "m")["quantization_config"]["quant_method"] == "ptq4dit"
    tensors = load_file(tmp_path / "m" / "diffusion_pytorch_model.safetensors")
    for name, weight in integer_weights(module(4)).items():
        stored = sum(tensors[f"{name}.weight.{part}"].nbytes for part in ("integers", "scale", "input", "pre_scale"))
        least = weight.numel() // 2 if weight.bits == 4 else weight.numel()
        assert stored == least + 4 * (len(weight) + 2 + weight.shape[1])


def test_in_bfloat16_only_the_other_layers_are(tmp_path):
    module(8, "ptq4dit").save_pretrained(tmp_path / "m")
    loaded = read(tmp_path / "m", torch_dtype=torch.bfloat16)
    weights = integer_weights(loaded).values()
    assert {w.dtype for w in weights} == {torch.bfloat16} and {w.scale.dtype for w in weights} == {torch.float32}
    with torch.no_grad():
        y = outputs(loaded(**FAMILIES["sd3"].inputs(2, seed=3, dtype=torch.bfloat16)))
    assert y.dtype == torch.bfloat16 and sqnr_db(run(module()), y.float()) > 10


# -- the card and the hub ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "words"), [(8, "no other package is needed"), (4, "import ptq4dit_ao  # registers")])
def test_the_card_says_what_it_is_and_how_to_load_it(tmp_path, bits, words):
    module(bits).save_pretrained(tmp_path / "m")
    card = ModelCard.load(tmp_path / "m" / "README.md", ignore_metadata_errors=False)
    assert card.data.library_name == "diffusers" and {8: "w8a8", 4: "w4-8a8"}[bits] in card.data.tags
    for part in (
        words,
        "SD3Transformer2DModel.from_pretrained(FOLDER",
        "| Quantized linears | ",
        "of float32",
        "bits: ",
    ):
        assert part in card.text


class Hub:
    """A stand-in for the hub's client: what was uploaded, by repository."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}

    def create_repo(self, repo_id: str, **_: Any) -> Any:
        self.repositories.setdefault(repo_id, {})
        return type("Repository", (), {"repo_id": repo_id})

    def upload_folder(self, *, repo_id: str, folder_path: str, **_: Any) -> str:
        files = {p.relative_to(folder_path).as_posix(): p for p in Path(folder_path).rglob("*") if p.is_file()}
        self.repositories[repo_id] |= {name: path.read_bytes() for name, path in files.items()}
        return repo_id


@pytest.fixture
def hub(monkeypatch):
    from diffusers.utils import hub_utils

    stand_in = Hub()
    monkeypatch.setattr(hub_utils, "create_repo", stand_in.create_repo)
    monkeypatch.setattr(hub_utils, "upload_folder", stand_in.upload_folder)

    def card(*_: Any, **__: Any) -> ModelCard:
        return ModelCard("---\nlibrary_name: diffusers\n---\nsomething else")

    monkeypatch.setattr(hub_utils, "load_or_create_model_card", card)
    return stand_in


@pytest.mark.parametrize("how", ["push_to_hub", "save_pretrained"])
def test_it_is_pushed_to_a_hub_with_its_own_card(hub, tmp_path, how):
    if how == "push_to_hub":
        module(4).push_to_hub("me/sd3-w4a8")
    else:
        module(4).save_pretrained(tmp_path / "sd3-w4a8", push_to_hub=True, repo_id="me/sd3-w4a8")
    files = hub.repositories["me/sd3-w4a8"]
    assert set(files) == {"README.md", "config.json", "diffusion_pytorch_model.safetensors"}
    assert b"PTQ4DiT" in files["README.md"] and b"something else" not in files["README.md"]
    for name, content in files.items():
        (tmp_path / "back").mkdir(exist_ok=True)
        (tmp_path / "back" / name).write_bytes(content)
    assert torch.equal(run(read(tmp_path / "back")), run(module(4)))


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["weights", "the end"])
def test_a_failed_save_leaves_the_earlier_one(tmp_path, monkeypatch, at):
    module(8).save_pretrained(tmp_path / "m", max_shard_size="20KB")
    (tmp_path / "m" / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if at == "weights":
            patch.setattr("safetensors.torch.save_file", full)
        else:
            patch.setattr(saving, "_carry_over", full)
        with pytest.raises(ArtifactError, match=r"No space left.*make room.*What was there is unchanged"):
            module(4).save_pretrained(tmp_path / "m")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    module(4).save_pretrained(tmp_path / "m")  # one file in place of many
    assert len(list((tmp_path / "m").glob("*.safetensors*"))) == 1
    assert (tmp_path / "m" / "notes.txt").read_text() == "mine"


def test_another_variant_stays(tmp_path):
    module(8, "ptq4dit").save_pretrained(tmp_path / "m")
    module(8, "ptq4dit").save_pretrained(tmp_path / "m", variant="int8", max_shard_size="20KB")
    assert torch.equal(run(read(tmp_path / "m")), run(read(tmp_path / "m", variant="int8")))


def test_a_dequantized_module_is_saved_as_a_float_one(tmp_path):
    model, quantized = case("sd3")
    again = to_module(quantized, model, verify=False)
    again.dequantize()
    again.save_pretrained(tmp_path / "m")
    assert "quantization_config" not in config(tmp_path / "m") and not (tmp_path / "m" / "README.md").exists()
    assert torch.equal(run(read(tmp_path / "m")), run(again)) and sqnr_db(run(model), run(again)) > 25


def test_a_file_a_pickle_and_an_adapter_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match="is a file; give a folder"):
        module().save_pretrained(tmp_path / "file")
    with pytest.raises(ArgumentError, match="saved as safetensors only"):
        module().save_pretrained(tmp_path / "m", safe_serialization=False)
    assert not (tmp_path / "m").exists()


def test_quantizing_while_loading_is_refused_with_the_way(tmp_path):
    FAMILIES["sd3"].model().save_pretrained(tmp_path / "float")
    with pytest.raises(ArgumentError, match="PTQ4DiT needs calibration samples.*collect_from_pipeline.*to_module"):
        read(tmp_path / "float", quantization_config=PTQ4DiTConfig())


def edit_config(folder: Path, change: Any) -> None:
    data = config(folder)
    change(data["quantization_config"])
    (folder / "config.json").write_text(json.dumps(data))


def drop(folder: Path, ending: str) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    name = next(name for name in tensors if name.endswith(ending))
    del tensors[name]
    save_file(tensors, path, metadata)


LAYER = "transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: edit_config(f, lambda c: c.update(version=9)), "has version 9, which this version of ptq4dit-ao"),
        (lambda f: edit_config(f, lambda c: c.update(extra=1)), "has the key 'extra', which this version"),
        (lambda f: edit_config(f, lambda c: c["linears"].update({LAYER: "w9a8"})), "has 'w9a8' for .*to_q"),
        (lambda f: edit_config(f, lambda c: c["linears"].update({"no.such": "w8a8"})), "lacks 'no\.such\.weight\.\w+'"),
        (
            lambda f: edit_config(f, lambda c: c["linears"].update({LAYER: "w8a8 3d balanced bias"})),
            "do not fit a weight",
        ),
        (lambda f: edit_config(f, lambda c: c.update(dtype="load")), "has the dtype 'load'; it is damaged"),
        (lambda f: edit_config(f, lambda c: c.update(linears=["w8a8"])), "has linears that are no dict"),
        (lambda f: drop(f, "weight.scale"), r"lacks '.*\.weight\.scale'; copy or save the module again"),
    ],
)
def test_damage_is_named(tmp_path, damage, message):
    module(4).save_pretrained(tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(ArtifactError, match=message):
        read(tmp_path / "m")


@pytest.mark.parametrize(
    "script",
    [
        "import ptq4dit_ao, sys; assert 'torch' not in sys.modules; import diffusers",
        pytest.param("import diffusers.quantizers.auto; import ptq4dit_ao", marks=pytest.mark.slow),
    ],
)
def test_the_format_is_registered_whichever_is_imported_first(tmp_path, script):
    module(4).save_pretrained(tmp_path / "m")
    code = (
        f"{script}\nfrom diffusers import SD3Transformer2DModel as M\n"
        f"m = M.from_pretrained({str(tmp_path / 'm')!r})\n"
        "print(type(m.transformer_blocks[0].attn.to_q.weight).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "StaticInt8Weight", done.stderr
