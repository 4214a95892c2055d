"""A file is the old one or the complete new one."""

from __future__ import annotations

import pytest

from ptq4dit_ao._files import replacing_files


def test_files_take_their_places_when_they_are_complete(tmp_path):
    path = tmp_path / "model.xml"
    path.write_text("old")
    with replacing_files(path) as unfinished:
        unfinished.write_text("new")
        unfinished.with_suffix(".bin").write_text("weights")
        unfinished.with_name("scratch").mkdir()
        assert unfinished.name == path.name and path.read_text() == "old"
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"model.xml": "new", "model.bin": "weights"}


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "model.xml"
    path.write_text("old")

    def fail_half_way():
        with replacing_files(path) as unfinished:
            unfinished.write_text("new")
            raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        fail_half_way()
    assert [file.name for file in tmp_path.iterdir()] == ["model.xml"] and path.read_text() == "old"
