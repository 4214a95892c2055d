"""Refusals by reason."""

from __future__ import annotations

from ptq4dit_ao.report.reasons import by_reason


def test_a_reason_is_named_once_whatever_its_node_is_called_and_the_commonest_is_first():
    refusals = [
        ("a", "silu: silu does not commute"),
        ("b.0", "gelu: gelu does not commute: it bends"),
        ("b.1", "gelu_1: gelu does not commute: it bends"),
        ("c", "its input: no channel is free"),
        ("d", "left as it is: of all that was tried, this leaves least error"),
        ("e", "a.b is not a parameter"),
    ]
    assert list(by_reason(refusals).items()) == [
        ("gelu does not commute: it bends", ["b.0", "b.1"]),
        ("silu does not commute", ["a"]),
        ("no channel is free", ["c"]),
        ("left as it is: of all that was tried, this leaves least error", ["d"]),
        ("a.b is not a parameter", ["e"]),
    ]
    assert by_reason([]) == {}
