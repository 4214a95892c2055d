"""Random DiTs have the published sizes, and one embedder in all blocks."""

from __future__ import annotations

import pytest
import torch

from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.evaluation.bench.random_dit import WIDTHS, random_batches, random_dit


@pytest.mark.parametrize(
    ("width", "parameters"), [("dit-s", 33e6), ("dit-b", 131e6), ("dit-l", 458e6), ("dit-xl", 675e6)]
)
def test_sizes_are_the_published_ones(width, parameters):
    with torch.device("meta"):
        first, second = (random_dit(width, blocks) for blocks in (1, 2))
    count = [sum(p.numel() for p in model.parameters()) for model in (first, second)]
    embedders = sum(p.numel() for p in second.transformer_blocks[1].norm1.emb.parameters())
    # diffusers repeats the embedders in every block; the published count has them once.
    assert count[0] + (WIDTHS[width][-1] - 1) * (count[1] - count[0] - embedders) == pytest.approx(parameters, rel=0.01)


def test_it_runs_and_its_blocks_share_their_embedders():
    model, (batch, other) = random_dit("dit-s", 2), random_batches(2, 3)
    first, second = (block.norm1.emb.state_dict() for block in model.transformer_blocks)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(model.transformer_blocks[0].attn1.to_q.weight, model.transformer_blocks[1].attn1.to_q.weight)
    assert not torch.equal(batch[0], other[0]) and torch.equal(batch[0], random_batches(1, 3)[0][0])
    with torch.no_grad():
        output = model(*batch, return_dict=False)[0]
    assert output.shape == (3, 8, 32, 32) and output.std() > 0.1


def test_other_widths_are_refused():
    with pytest.raises(ArgumentError, match="width is 'dit-m'; choose one of dit-s, dit-b, dit-l, dit-xl"):
        random_dit("dit-m")
