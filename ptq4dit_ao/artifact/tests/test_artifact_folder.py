from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.fx import GraphModule

from ptq4dit_ao._files import replacing_folder
from ptq4dit_ao.artifact import read_artifact, write_artifact
from ptq4dit_ao.errors import ArtifactError


@pytest.fixture
def old(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a").write_text("old")
    return folder


def replace(target: Path) -> None:
    with replacing_folder(target) as folder:
        (folder / "b").write_text("new")


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def siblings(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir())


def test_a_new_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    replace(tmp_path / "x" / "y")
    assert contents(tmp_path / "x" / "y") == {"b": "new"}
    assert siblings(tmp_path / "x" / "y") == ["y"]


def test_an_old_folder_is_replaced_as_a_whole(old: Path) -> None:
    replace(old)
    assert contents(old) == {"b": "new"}
    assert siblings(old) == ["model"]


def test_nothing_appears_before_the_end(old: Path) -> None:
    with replacing_folder(old) as folder:
        (folder / "b").write_text("new")
        assert contents(old) == {"a": "old"}
        assert folder.parent == old.parent
        assert folder.name.startswith(".model.tmp-")


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
def test_a_failing_block_leaves_the_old_folder_alone(old: Path, error: type[BaseException]) -> None:
    def fail(folder: Path) -> None:
        (folder / "b").write_text("new")
        raise error

    with pytest.raises(error), replacing_folder(old) as folder:
        fail(folder)
    assert contents(old) == {"a": "old"}
    assert siblings(old) == ["model"]


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failing_rename_is_rolled_back(
    old: Path, monkeypatch: pytest.MonkeyPatch, nth: int, error: type[BaseException]
) -> None:
    rename, calls = os.rename, []

    def fail_at_nth(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == nth:
            raise error
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_at_nth)
    with pytest.raises(error):
        replace(old)
    assert contents(old) == {"a": "old"}
    assert siblings(old) == ["model"]


def test_everything_is_on_the_disk_before_it_takes_its_place(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def record_fsync(descriptor: int) -> None:
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def record_rename(source: Path, target: Path) -> None:
        events.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    replace(old)
    temporary = events[1]
    assert events == [f"{temporary}/b", temporary, "rename", "rename", str(old.parent)]


@pytest.fixture
def saved(small: GraphModule, tmp_path: Path) -> Path:
    write_artifact(tmp_path / "model", small, {"generation": 1}, [])
    return tmp_path / "model"


# Saves what it has read with other metadata, and is killed once the weights are written.
KILLED_WRITER = """
import os, signal, sys
from ptq4dit_ao.artifact import read_artifact, store, write_artifact
store.file_digest = lambda path: os.kill(os.getpid(), signal.SIGKILL)
write_artifact(sys.argv[1], read_artifact(sys.argv[1]).graph_module, {"generation": 2}, [])
"""


def test_a_process_killed_while_writing_leaves_the_old_model(saved: Path, small: GraphModule) -> None:
    result = subprocess.run([sys.executable, "-c", KILLED_WRITER, str(saved)], capture_output=True, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr
    (left,) = [path for path in saved.parent.iterdir() if path != saved]
    assert left.name.startswith(".model.tmp-")
    assert (left / "weights.safetensors").exists()
    with pytest.raises(ArtifactError, match=r"has no manifest.json; the folder is not a complete"):
        read_artifact(left)
    assert read_artifact(saved).metadata == {"generation": 1}
    write_artifact(saved, small, {"generation": 3}, [])
    assert read_artifact(saved).metadata == {"generation": 3}


def test_an_old_model_set_aside_by_a_killed_process_is_named(saved: Path) -> None:
    """As after a kill in the instant between the two renames."""
    aside = saved.rename(saved.with_name(".model.old-0123abcd"))
    with pytest.raises(
        ArtifactError, match=r"no folder .*model; an interrupted save left .* as .*\.old-0123abcd, rename"
    ):
        read_artifact(saved)
    assert read_artifact(aside.rename(saved)).metadata == {"generation": 1}


def test_a_disk_that_is_really_full_is_reported(saved: Path, small: GraphModule) -> None:
    """The weights are written by Rust, which reports the failure in words of its own."""
    _, hard = soft_and_hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((saved / "graph.json").stat().st_size, hard))
    try:
        small.register_buffer("offset", torch.ones(10_000))
        with pytest.raises(ArtifactError, match=r"no room to save the model as .*model \(File too large\): it takes 4"):
            write_artifact(saved, small, {"generation": 2}, [])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft_and_hard)
    assert read_artifact(saved).metadata == {"generation": 1}
    assert siblings(saved) == ["model"]
