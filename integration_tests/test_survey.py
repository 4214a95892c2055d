"""Tests of every family end to end: captured, folded exactly, quantized, saved, and run on every backend's kernels."""

from __future__ import annotations

import pytest
from families import OTHERS, survey, table

from ptq4dit_ao.lowering.backend import BACKENDS
from ptq4dit_ao.testing.zoo import FAMILIES

QUICK = ("flux", "lumina2", "pixart_sigma", "wan")
SQNR_DB = 18
"""Of W8A8 on random parameters; a wrong scale or zero point somewhere gives single digits."""
PARITY_DB = 30
"""Of a backend with the simulated graph: where rounding falls the other way, 36 dB have been seen; else 60 to 140."""
LEARNED_DB = 10
"""Of two steps of learning, which leave ranges at their start."""


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES])
def test_a_family_runs_as_integers(name):
    row = survey(FAMILIES[name], "fbgemm")
    assert row["fold_error"] <= 1e-12
    assert row["integer_gemms"] == row["quantized"] >= 0.9 * row["linears"]
    assert sum(row["sites"].get(kind, 0) for kind in ("offline", "vector multiply", "partial")) >= 3
    assert row["sqnr_db"] >= SQNR_DB
    assert f"| `{row['class']}` |" in table([row], {"backend": "fbgemm"})


@pytest.mark.slow
@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_family_runs_on_every_backend_or_is_refused_in_words(name):
    others = [backend for backend in OTHERS if BACKENDS[backend].unavailable() is None]
    row = survey(FAMILIES[name], "fbgemm", others)
    assert list(row["backends"]) == others
    for backend, found in row["backends"].items():
        if isinstance(found, str):
            assert found.startswith((f"backend {backend!r} cannot build", f"backend {backend!r} ran "))
        else:
            assert found >= PARITY_DB
    assert row["learned_db"] >= LEARNED_DB
