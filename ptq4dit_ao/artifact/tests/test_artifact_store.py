from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

from ptq4dit_ao import artifact
from ptq4dit_ao._formats import json_digest
from ptq4dit_ao.artifact import ArtifactSize, read_artifact, store, write_artifact
from ptq4dit_ao.artifact.manifest import check_digest
from ptq4dit_ao.artifact.tests import models
from ptq4dit_ao.errors import ArtifactError

METADATA = {"recipe": {"weights": 4, "alpha": 0.5, "name": "größe"}, "report": [None, True, "x"]}
SIGNATURE = [{"name": "hidden_states", "dtype": "float32", "shape": ["batch", 4, 8, 8]}]
FILES = {"manifest.json", "graph.json", "weights.safetensors"}


@pytest.fixture
def saved(small: GraphModule, tmp_path: Path) -> Path:
    write_artifact(tmp_path / "model", small, METADATA, SIGNATURE)
    return tmp_path / "model"


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a document, as an author would who also puts its digest right."""
    doc = json.loads(path.read_text())
    signed = doc.pop("sha256", None) is not None
    change(doc)
    if signed:
        doc["sha256"] = json_digest(doc)
    path.write_text(json.dumps(doc))


@pytest.mark.parametrize("variant", ["float", "int8", "int4"])
def test_a_dit_comes_back_with_all_that_was_said_about_it(
    dits: dict[str, GraphModule], variant: str, tmp_path: Path
) -> None:
    size = write_artifact(tmp_path / "new" / "model", dits[variant], METADATA, SIGNATURE)
    model = read_artifact(str(tmp_path / "new" / "model"))
    assert model.metadata == METADATA
    assert model.input_signature == SIGNATURE
    assert model.sizes == size
    for batch in (2, 3):
        args = models.dit_args(batch)
        assert torch.equal(model.graph_module(*args), dits[variant](*args))


def test_int4_is_smaller_than_int8_is_smaller_than_float(dits: dict[str, GraphModule], tmp_path: Path) -> None:
    sizes = {name: write_artifact(tmp_path / name, gm, {}, []).weights_bytes for name, gm in dits.items()}
    assert sizes["int4"] < sizes["int8"] < sizes["float"] / 2


def test_the_folder_holds_three_files_of_the_stated_sizes(saved: Path, small: GraphModule) -> None:
    size = write_artifact(saved, small, METADATA, SIGNATURE)
    assert {path.name for path in saved.iterdir()} == FILES
    assert size.total_bytes == sum(path.stat().st_size for path in saved.iterdir())
    assert size == ArtifactSize(
        manifest_bytes=(saved / "manifest.json").stat().st_size,
        graph_bytes=(saved / "graph.json").stat().st_size,
        weights_bytes=(saved / "weights.safetensors").stat().st_size,
    )


def test_the_manifest_names_format_and_versions(saved: Path) -> None:
    doc = json.loads((saved / "manifest.json").read_text())
    assert (doc["format"], doc["format_version"]) == ("ptq4dit-ao", 5)
    assert doc["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert doc["versions"].keys() == {"ptq4dit-ao", "torch", "torchao"}


def test_files_are_as_readable_as_the_umask_says(small: GraphModule, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_artifact(tmp_path / "model", small, {}, [])
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()} == {0o644}
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o755


def test_the_same_model_gives_the_same_bytes(saved: Path, small: GraphModule) -> None:
    before = snapshot(saved)
    write_artifact(saved, small, METADATA, SIGNATURE)
    assert snapshot(saved) == before


def test_a_model_that_was_read_can_replace_itself(saved: Path) -> None:
    model = read_artifact(saved)
    args, kwargs = models.small_args()
    expected = model.graph_module(*args, **kwargs)["x"]
    before = snapshot(saved)
    write_artifact(saved, model.graph_module, model.metadata, model.input_signature)
    assert snapshot(saved) == before
    assert torch.equal(model.graph_module(*args, **kwargs)["x"], expected)


def test_the_device_can_be_chosen(dits: dict[str, GraphModule], tmp_path: Path) -> None:
    write_artifact(tmp_path / "model", dits["int4"], {}, [])
    gm = read_artifact(tmp_path / "model", device="meta").graph_module
    assert gm(*(arg.to("meta") for arg in models.dit_args(2))).device.type == "meta"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"a": [{"b": torch.ones(1)}]}, r"metadata.a\[0\].b is tensor.*, a Tensor, which JSON cannot hold; pass None"),
        ({"a": float("nan")}, r"metadata.a is nan, a float, which JSON cannot hold"),
        ({"a": {1: 2}}, r"metadata.a is \{1: 2\}, a dict, which JSON cannot hold"),
    ],
)
def test_metadata_that_json_cannot_hold_is_refused(
    small: GraphModule, metadata: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match=message):
        write_artifact(tmp_path / "model", small, metadata, [])
    assert not list(tmp_path.iterdir())


def test_a_signature_that_json_cannot_hold_is_refused(small: GraphModule, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"input_signature\[0\].dtype is torch.int8, a dtype, which JSON cannot"):
        write_artifact(tmp_path / "model", small, {}, [{"dtype": torch.int8}])


# Folders that may not be replaced


def test_a_folder_with_other_files_is_refused_and_left_alone(small: GraphModule, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(
        ArtifactError, match=r"exists and is not a saved .* model \(it holds 'thesis.tex'\); save to ano"
    ):
        write_artifact(tmp_path, small, {}, [])
    assert snapshot(tmp_path) == {"thesis.tex": b"years of work"}


def test_a_file_beside_ours_is_not_deleted(saved: Path, small: GraphModule) -> None:
    (saved / "samples.png").write_bytes(b"x")
    with pytest.raises(ArtifactError, match=r"it holds 'samples.png'"):
        write_artifact(saved, small, {}, [])
    assert {path.name for path in saved.iterdir()} == {*FILES, "samples.png"}


def test_what_a_kill_left_beside_ours_does_not_hinder(saved: Path, small: GraphModule) -> None:
    (saved / ".report.json.tmp-0a1b2c3d").write_bytes(b"half")
    write_artifact(saved, small, {}, [])
    assert {path.name for path in saved.iterdir()} == set(FILES)


@pytest.mark.parametrize("manifest", ["{}", "not JSON", '{"format": "onnx"}'])
def test_a_manifest_of_something_else_is_refused(saved: Path, small: GraphModule, manifest: str) -> None:
    (saved / "manifest.json").write_text(manifest)
    with pytest.raises(ArtifactError, match=r"is not a saved ptq4dit-ao model \(its manifest.json is not ours\)"):
        write_artifact(saved, small, {}, [])


def test_a_file_in_place_of_the_folder_is_refused(small: GraphModule, tmp_path: Path) -> None:
    (tmp_path / "model").write_text("x")
    with pytest.raises(ArtifactError, match=r"model exists and is not a saved .* \(it holds 'model'\)"):
        write_artifact(tmp_path / "model", small, {}, [])
    assert (tmp_path / "model").read_text() == "x"


def test_an_empty_folder_a_newer_version_and_a_link_are_replaced(saved: Path, small: GraphModule) -> None:
    (saved.parent / "empty").mkdir()
    write_artifact(saved.parent / "empty", small, {"a": 1}, [])
    edit(saved / "manifest.json", lambda doc: doc.update(format_version=6))
    (saved.parent / "link").symlink_to(saved)
    write_artifact(saved.parent / "link", small, {"a": 2}, [])
    assert (saved.parent / "link").is_symlink()
    assert read_artifact(saved.parent / "empty").metadata == {"a": 1}
    assert read_artifact(saved).metadata == {"a": 2}


# Failures while writing


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, r"no room to save the model as .*model \(No space left.*: it takes \d+ bytes, and \d+ are free"),
        (errno.EDQUOT, r"no room to save the model as .*make room, or save to another disk. Nothing was changed"),
        (errno.EACCES, r"cannot write .*model: Permission denied.*; choose a folder that you may write to"),
    ],
)
@pytest.mark.parametrize("nth", [1, 2])
def test_a_failing_write_changes_nothing(
    saved: Path, small: GraphModule, monkeypatch: pytest.MonkeyPatch, code: int, message: str, nth: int
) -> None:
    before = snapshot(saved)
    write, calls = Path.write_bytes, []

    def fail_at_nth(path: Path, data: bytes) -> int:
        calls.append(path)
        if len(calls) == nth:
            write(path, data[: len(data) // 2])
            raise OSError(code, os.strerror(code), str(path))
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", fail_at_nth)
    with pytest.raises(ArtifactError, match=message):
        write_artifact(saved, small, {"new": True}, [])
    monkeypatch.undo()
    assert snapshot(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_the_needed_bytes_are_those_of_the_files(
    small: GraphModule, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    size = write_artifact(tmp_path / "a", small, {}, [])
    monkeypatch.setattr(store, "save_tensors", _raise(OSError(errno.ENOSPC, "full")))
    with pytest.raises(ArtifactError, match="no room") as caught:
        write_artifact(tmp_path / "b", small, {}, [])
    needed = int(str(caught.value).split("it takes ")[1].split()[0])
    assert size.total_bytes / 2 < needed <= size.total_bytes


def test_an_interrupt_changes_nothing(saved: Path, small: GraphModule, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot(saved)
    monkeypatch.setattr(store, "save_tensors", _raise(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        write_artifact(saved, small, {"new": True}, [])
    assert snapshot(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


# Reading strictly


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(ArtifactError, match=rf"model has no {name}; the folder is not a complete ptq4dit-ao model"):
        read_artifact(saved)


def test_a_place_that_cannot_be_looked_at_is_an_artifact_error(
    saved: Path, small: GraphModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "iterdir", _raise(PermissionError(errno.EACCES, "Permission denied")))
    with pytest.raises(
        ArtifactError, match=r"cannot write .*: Permission denied.*; choose a folder that you may write"
    ):
        write_artifact(saved, small, {}, [])


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"there is no folder .*nowhere; check the path, or save the model there"):
        read_artifact(tmp_path / "deep" / "nowhere")


def test_a_changed_digit_in_the_manifest_is_found(saved: Path) -> None:
    path = saved / "manifest.json"
    path.write_text(path.read_text().replace('"alpha": 0.5', '"alpha": 0.4'))
    with pytest.raises(ArtifactError, match=r"manifest.json was altered: its sha256 is not its own; copy or save"):
        read_artifact(saved)


@pytest.mark.parametrize("name", ["graph.json", "weights.safetensors"])
def test_a_flipped_bit_is_found(saved: Path, name: str) -> None:
    data = bytearray((saved / name).read_bytes())
    data[-3] ^= 1
    (saved / name).write_bytes(data)
    with pytest.raises(ArtifactError, match=rf"{name} was altered: its sha256 is not the manifest's; copy or save"):
        read_artifact(saved)


@pytest.mark.parametrize("name", ["graph.json", "weights.safetensors"])
def test_a_short_file_is_found(saved: Path, name: str) -> None:
    size = (saved / name).stat().st_size
    os.truncate(saved / name, size - 1)
    with pytest.raises(
        ArtifactError, match=rf"{name} has {size - 1} bytes, the manifest says {size}; the copy is inco"
    ):
        read_artifact(saved)


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "version": (lambda d: d.update(format_version=6), r"has format_version 6, this version reads 3, 4, 5; install"),
    "former": (
        lambda d: d.update(format_version=2),
        r"has format_version 2, this version reads 3, 4, 5; .* quantize the",
    ),
    "true": (lambda d: d.update(format_version=True), r"has format_version True, this version reads 3, 4, 5"),
    "no version": (lambda d: d.pop("format_version"), r"has format_version None, this version reads 3, 4, 5"),
    "format": (lambda d: d.update(format="onnx"), r"is of format 'onnx', not 'ptq4dit-ao'; point to a model saved"),
    "unknown": (lambda d: d.update(hook="x"), r"manifest.json has the unknown 'hook'; it is damaged or of a newer"),
    "lacking": (lambda d: d.pop("tensors"), r"manifest.json lacks 'tensors'"),
    "tensors": (lambda d: d.update(tensors=[]), r"manifest.json: tensors is a list; copy or save"),
    "metadata": (lambda d: d.update(metadata=None), r"manifest.json: metadata is a NoneType"),
    "signature": (lambda d: d.update(input_signature={}), r"manifest.json: input_signature is a dict"),
    "entry": (lambda d: d["tensors"]["offset"].pop("dtype"), r"entry of tensor 'offset' lacks 'dtype'"),
    "tensor": (lambda d: d["tensors"].pop("tied.bias"), r"weights.safetensors has the unknown tied.bias"),
    "more": (lambda d: d["tensors"].update(a=d["tensors"]["tied.bias"]), r"weights.safetensors lacks a"),
    "zeros": (lambda d: d["tensors"].pop("offset"), r"graph.json: the weights lack offset, other than the graph reads"),
    "shape": (lambda d: d["tensors"]["tied.bias"].update(shape=[2, 2]), r"'tied.bias' .* the manifest says .*\(2, 2\)"),
    "dtype": (lambda d: d["tensors"]["tied.bias"].update(dtype="int32"), r"'tied.bias' .* the manifest says .*int32"),
    "files": (lambda d: d["files"].update({"../x": {}}), r"manifest.json: files has the unknown '../x'"),
    "digest": (lambda d: d["files"]["graph.json"].pop("sha256"), r"digest of .*graph.json lacks 'sha256'"),
}


@pytest.mark.parametrize("damage", MANIFESTS)
def test_a_damaged_manifest_is_refused(saved: Path, damage: str) -> None:
    change, message = MANIFESTS[damage]
    edit(saved / "manifest.json", change)
    with pytest.raises(ArtifactError, match=message):
        read_artifact(saved)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"manifest.json is not readable JSON \(.*\); copy or save the model again"),
        ("[]", r"manifest.json holds a JSON list, not an object"),
        ('{"a": 1, "a": 2}', r"manifest.json is not readable JSON \(key 'a' occurs twice\)"),
        ('{"a": NaN}', r"manifest.json is not readable JSON \(NaN is not JSON\)"),
        ("[" * 100_000, r"manifest.json is not readable JSON"),
        (b"\xff\xfe\x00", r"manifest.json is not readable JSON"),
    ],
    ids=["cut", "list", "twice", "nan", "deep", "binary"],
)
def test_a_manifest_that_is_not_json_is_refused(saved: Path, text: str | bytes, message: str) -> None:
    (saved / "manifest.json").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ArtifactError, match=message):
        read_artifact(saved)


def test_a_graph_with_a_matching_digest_is_still_checked(saved: Path) -> None:
    """A digest guards against accidents; the allow list guards against authors."""
    edit(saved / "graph.json", lambda doc: doc["nodes"][-2].update(op="call_function", target="os.system"))
    edit(saved / "manifest.json", lambda doc: doc["files"].update({"graph.json": _digest(saved / "graph.json")}))
    with pytest.raises(ArtifactError, match=r"graph.json: node '.*': a stored graph may not call 'os.system'"):
        read_artifact(saved)


def test_a_graph_too_deep_to_read_is_refused(saved: Path) -> None:
    deep = json.loads('{"tuple": [' * 400 + "]}" * 400)
    edit(saved / "graph.json", lambda doc: doc["nodes"][-2].update(args=[deep]))
    edit(saved / "manifest.json", lambda doc: doc["files"].update({"graph.json": _digest(saved / "graph.json")}))
    with pytest.raises(ArtifactError, match=r"graph.json: maximum recursion depth exceeded"):
        read_artifact(saved)


def test_a_file_that_cannot_be_read_is_an_artifact_error(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "read_manifest", _raise(PermissionError(errno.EACCES, "Permission denied")))
    with pytest.raises(ArtifactError, match=r"cannot read .*Permission denied.*; check that you may read its files"):
        read_artifact(saved)


def test_public_names() -> None:
    assert all(hasattr(artifact, name) for name in artifact.__all__)
    assert artifact.__all__ == sorted(artifact.__all__)
    assert {"write_artifact", "read_artifact", "graph_to_json", "graph_from_json"} <= set(artifact.__all__)


def _digest(path: Path) -> dict[str, Any]:
    from ptq4dit_ao.artifact.manifest import file_digest

    digest = file_digest(path)
    check_digest(path, digest)
    return digest


def _raise(error: BaseException) -> Callable[..., None]:
    def fail(*args: object) -> None:
        raise error

    return fail
