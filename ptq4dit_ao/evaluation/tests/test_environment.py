"""Figures say where they come from."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch

import ptq4dit_ao
from ptq4dit_ao._version import installed_version
from ptq4dit_ao.evaluation.environment import commit, environment, has_native_bfloat16, resident_mb


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of nothing but the package's folder."""
    folder = tmp_path / "site-packages" / "ptq4dit_ao"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    monkeypatch.setattr(ptq4dit_ao, "__file__", str(folder / "__init__.py"))
    return folder


def git(folder, *arguments: str) -> None:
    me = ("-c", "user.name=x", "-c", "user.email=x@example.com")
    subprocess.run(["git", "-C", str(folder), *me, *arguments], check=True, capture_output=True)


def test_an_installed_package_gives_its_version(package):
    assert commit() is None
    git(package.parents[1], "init")  # as where a virtual environment lies in somebody's checkout
    git(package.parents[1], "add", ".")
    git(package.parents[1], "commit", "-m", "theirs")
    assert commit() is None
    assert environment()["ptq4dit-ao"] == ptq4dit_ao.__version__


def test_a_checkout_gives_its_commit_and_whether_files_differ(package):
    git(package.parent, "init")
    assert commit() is None  # nothing committed
    git(package.parent, "add", ".")
    git(package.parent, "commit", "-m", "first")
    clean = commit()
    assert clean is not None and len(clean) == 12 and int(clean, 16) >= 0
    (package / "__init__.py").write_text("changed")
    assert commit() == f"{clean}-dirty" == environment()["ptq4dit-ao"]


def test_the_rest_is_plain_json():
    about = environment()
    assert json.loads(json.dumps(about)) == about
    assert about["cpu"] and about["threads"] == torch.get_num_threads()
    assert about["versions"]["torch"] == installed_version("torch") and installed_version("no-such-package") is None


def test_memory_is_in_megabytes():
    before = resident_mb()
    if before is None:
        pytest.skip("this system has no /proc/self/status")
    kept = torch.ones(50_000_000, dtype=torch.uint8)
    assert 40 < resident_mb() - before < 60 and len(kept)


@pytest.mark.parametrize(
    ("able", "native"), [({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx512_vnni": True}, False)]
)
def test_bfloat16_is_native_where_the_processor_multiplies_it(able, native, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert has_native_bfloat16() is native
