"""A file is the old one or the complete new one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from ptq4dit_ao._files import is_unfinished, replace_text, replacing_file


def test_a_file_takes_its_place_when_it_is_complete(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with replacing_file(path) as first, replacing_file(path) as second:
        assert first != second and is_unfinished(first.parent) and first.parent.parent == tmp_path
        second.write_text("new")
        assert path.read_text() == "old"
    replace_text(path, "ä")
    assert path.read_bytes() == "ä".encode() and list(tmp_path.iterdir()) == [path] and not is_unfinished(path)


def test_what_a_kill_has_left_is_removed_and_nothing_that_is_in_use(tmp_path):
    path = tmp_path / "a.json"
    (tmp_path / ".a.json.tmp-0123abcd").mkdir()
    (tmp_path / ".a.json.tmp-0123abcd" / ".tmpXyz").write_text("half")
    other = tmp_path / ".b.json.tmp-0123abcd"
    other.mkdir()
    with replacing_file(path) as first:
        first.write_text("first")
        replace_text(path, "second")
    assert path.read_text() == "first" and sorted(tmp_path.iterdir()) == [other, path]


def test_a_killed_write_leaves_what_the_next_removes(tmp_path):
    """safetensors itself writes to a file of a random name first."""
    code = (
        "import os, signal, sys\nfrom ptq4dit_ao._files import replacing_file\n"
        "with replacing_file(sys.argv[1]) as temporary:\n os.kill(os.getpid(), signal.SIGKILL)"
    )
    path = tmp_path / "a.json"
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == -signal.SIGKILL
    assert [is_unfinished(left) for left in tmp_path.iterdir()] == [True]
    replace_text(path, "new")
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")

    def fail_half_way():
        with replacing_file(path) as temporary:
            temporary.write_text("half")
            raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        fail_half_way()
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_what_safetensors_writes_has_the_mode_of_any_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        with replacing_file(tmp_path / "a.safetensors") as temporary:
            save_file({"x": torch.zeros(1)}, temporary)
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640
