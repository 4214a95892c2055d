"""What the free sizes of tiny diffusers transformers, and of modules like theirs, show."""

from __future__ import annotations

import types

import pytest
import torch
from torch import Tensor, nn

from ptq4dit_ao.capture import export_transformer
from ptq4dit_ao.capture.axes import axis_kinds
from ptq4dit_ao.capture.interface import free_sizes, input_specs
from ptq4dit_ao.testing.zoo import FAMILIES


class Rounded(nn.Module):
    """Computes a number of tokens with Python's rounding of a quotient of sizes."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, : round(x.shape[2] / 2)].sum(1)


def test_a_guard_may_round():
    graph = export_transformer(Rounded().eval(), (torch.randn(3, 8, 6, 4),))
    assert "height" in free_sizes(graph).names or free_sizes(graph).fixed


class Follows(nn.Module):
    """Takes four frames of one tensor for each frame of another after the first."""

    def forward(self, x: Tensor, faces: Tensor) -> Tensor:
        torch._check(faces.shape[2] == 4 * x.shape[2] - 3)
        return x + faces[:, :, ::4]


def test_a_size_may_be_another_less_a_number():
    graph = export_transformer(Follows().eval(), (torch.randn(3, 4, 5, 6, 6), torch.randn(3, 4, 17, 6, 6)))
    sizes = free_sizes(graph)
    assert "frames" in sizes.names and not any("frames" in axis for axis in sizes.fixed)
    assert input_specs(graph)[1].sizes[2] == "(-3) + 4*frames"
    assert graph(torch.randn(2, 4, 1, 6, 6), torch.randn(2, 4, 1, 6, 6)).shape == (2, 4, 1, 6, 6)


def test_a_graph_runs_at_the_smallest_sizes_that_it_says():
    """One row and one column of patches, which the export itself leaves out."""
    graph = export_transformer(FAMILIES["sd3"].model(), inputs := FAMILIES["sd3"].inputs(3))
    inputs["hidden_states"] = inputs["hidden_states"][..., :2, :2]
    assert graph(*inputs.values()).shape == (3, 4, 2, 2)


def kinds_of(x: Tensor, name: str = "hidden_states", **options: object) -> dict[int, str]:
    return axis_kinds({name: x}, 3, 4, **options)[name]


def test_images_of_a_list_are_no_frames():
    found = kinds_of(torch.zeros(3, 2, 4, 1, 8, 8))
    assert found == {0: "batch", 3: "frames", 4: "height", 5: "width"}


def test_sequences_of_channels_are_free_in_their_length():
    assert kinds_of(torch.zeros(3, 4, 9)) == {0: "batch", 2: "tokens"}
    assert kinds_of(torch.zeros(3, 9, 4)) == {0: "batch", 1: "tokens"}
    assert kinds_of(torch.zeros(3, 4, 9), "encoder_hidden_states") == {0: "batch", 1: "text"}


@pytest.mark.parametrize("name", ["timestep", "r_timestep"])
def test_times_of_frames_are_as_many_as_there_are(name):
    assert kinds_of(torch.rand(3, 5), name) == {0: "batch", 1: "tokens"}
    assert kinds_of(torch.rand(3, 5), "pooled_projections") == {0: "batch"}


def test_as_many_frames_as_channels_are_free():
    assert kinds_of(torch.zeros(3, 4, 5, 8, 6)) == {0: "batch", 2: "frames", 3: "height", 4: "width"}
    assert kinds_of(torch.zeros(3, 5, 4, 8, 6)) == {0: "batch", 1: "frames", 3: "height", 4: "width"}
    assert kinds_of(torch.zeros(3, 4, 4, 8, 6)) == {0: "batch", 1: "frames", 2: "frames", 3: "height", 4: "width"}

    class ByChannel(nn.Module):
        """Frames first; its channels are fixed."""

        def __init__(self) -> None:
            super().__init__()
            self.config = types.SimpleNamespace(in_channels=4)
            self.gain = nn.Parameter(torch.ones(4, 1, 1))

        def forward(self, hidden_states: Tensor) -> Tensor:
            return hidden_states * self.gain

    sizes = free_sizes(export_transformer(ByChannel().eval(), (torch.zeros(3, 4, 4, 8, 6),)))
    assert sizes.names == ("batch", "frames", "height", "width") and not sizes.fixed


def test_channels_may_be_last():
    found = kinds_of(torch.zeros(3, 5, 8, 8, 9), channels_last=True)
    assert found == {0: "batch", 1: "frames", 2: "height", 3: "width"}


@pytest.mark.parametrize(("masked", "kinds"), [(True, {0: "batch", 1: "text"}), (False, {0: "batch"})])
def test_features_of_several_layers_are_no_image(masked, kinds):
    tensors = {"encoder_hidden_states": torch.zeros(3, 7, 5, 24)}
    if masked:
        tensors["encoder_attention_mask"] = torch.ones(3, 7)
    assert axis_kinds(tensors, 3, 4)["encoder_hidden_states"] == kinds


def test_four_indices_are_no_coordinates():
    assert kinds_of(torch.arange(4)[None], "indices_latents") == {0: "tokens", 1: "tokens"}
    assert kinds_of(torch.zeros(6, 3, dtype=torch.long), "img_ids") == {0: "tokens"}
