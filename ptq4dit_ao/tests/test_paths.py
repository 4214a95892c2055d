"""Paths as users give them, and whether something can be written there."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from ptq4dit_ao._paths import as_path, because, check_file, check_room, check_writable
from ptq4dit_ao.errors import ArgumentError, ArtifactError


def test_the_home_folder_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert as_path("~/a") == as_path(Path("~/a")) == tmp_path / "a"
    assert as_path("a/~") == Path("a/~") and as_path(".") == Path()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", r"output is '', which is no path; give a name \('.' is the current folder\)"),
        ("a\0b", r"output is 'a\\x00b', which is no path"),
        (None, "output is of type NoneType; give a path as text"),
        (3, r"output is 3 \(int\); give a path as text"),
        (b"a", "output is of type bytes; give a path as text"),
        ("~nobody_here/x", "output is '~nobody_here/x', and there is no such user's home folder; write it out"),
    ],
)
def test_what_is_no_path_is_refused(path, message):
    with pytest.raises(ArgumentError, match=message):
        as_path(path, "output")


@pytest.mark.parametrize("there", ["nothing", "file", "folder"])
def test_asking_changes_nothing(tmp_path, there):
    path = tmp_path / "a" / "b" / "c"
    if there != "nothing":
        path.parent.mkdir(parents=True)
        path.touch() if there == "file" else path.mkdir()
    before = sorted(tmp_path.rglob("*"))
    check_writable(path)
    assert sorted(tmp_path.rglob("*")) == before


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").touch()
    for path, reason in (
        (Path("/proc/no/x"), "No such file or directory"),
        (tmp_path / "file" / "x", "Not a directory"),
        (tmp_path / "file" / "x" / "y", "Not a directory"),
        (tmp_path / ("x" * 250), "File name too long"),  # with what is added while it is written
    ):
        with pytest.raises(ArtifactError, match=rf"cannot write .*: {reason} .*; choose a place that you may write to"):
            check_writable(path, ArtifactError)
    with pytest.raises(ArgumentError, match="it is a folder; give the name of a file in it"):
        check_file(tmp_path)
    with pytest.raises(ArgumentError, match="cannot write /: it is the root of all folders; give the name of one"):
        check_writable(Path("/"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_the_current_folder_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    check_writable(Path())
    check_writable(Path("../here"))
    assert [path.name for path in tmp_path.rglob("*")] == ["here"]


def test_room(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=2_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage if path == tmp_path else pytest.fail(str(path)))
    check_room(tmp_path / "not" / "there", 2_000_000)
    with pytest.raises(ArgumentError, match="no room for .*: it takes 3.5 MB at least, and 2.0 MB are free there"):
        check_room(tmp_path / "not" / "there", 3_500_000)


def test_what_the_system_says():
    assert because(OSError(errno.ENOENT, os.strerror(errno.ENOENT), "x")) == "No such file or directory (x)"
    assert because(OSError("disk full")) == "disk full"
