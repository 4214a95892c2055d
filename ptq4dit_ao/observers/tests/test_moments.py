"""Moments and token samples do not depend on how the calibration set is cut into batches."""

from __future__ import annotations

import torch

from ptq4dit_ao.observers.moments import TOKENS, Moments, TokenSample


def test_moments_are_those_of_all_tokens():
    x = torch.randn(10, 7, 5, generator=torch.Generator().manual_seed(0)) + 1
    moments = Moments(5)
    for part in x.split([3, 1, 6]):
        moments.update(part)
    rows = x.reshape(-1, 5)
    assert moments.count == 70
    torch.testing.assert_close(moments.second, rows.T @ rows / 70)
    torch.testing.assert_close(moments.mean, rows.mean(0))
    assert torch.equal(moments.tokens.sort(0).values, rows.sort(0).values)  # all of so few


def test_a_sample_is_the_same_however_the_tokens_arrive():
    rows = torch.arange(3 * TOKENS + 5.0).unsqueeze(1)
    whole, parts = TokenSample(1), TokenSample(1)
    whole.update(rows)
    for part in rows.split(999):
        parts.update(part)
    assert len(whole.tokens) == TOKENS
    assert torch.equal(whole.tokens.sort(0).values, parts.tokens.sort(0).values)


def test_a_sample_is_spread_evenly():
    sample, period = TokenSample(1), 256  # tokens of one image
    rows = torch.arange(64.0 * TOKENS).unsqueeze(1)
    sample.update(rows)
    for part in (sample.tokens / len(rows), sample.tokens % period / period):  # over the run, and within an image
        counts = torch.histc(part, bins=8, min=0, max=1)
        assert counts.min() > 0.7 * TOKENS / 8 and counts.max() < 1.3 * TOKENS / 8
