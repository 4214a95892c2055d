"""The double of facebookresearch/DiT: its checkpoint's names and shapes, and the function it computes."""

from __future__ import annotations

import argparse

import pytest
import torch
from torch import Tensor

from ptq4dit_ao.core.tests import reference
from ptq4dit_ao.evaluation.bench.random_dit import randomize_
from ptq4dit_ao.testing.facebook_dit import DiT, load_facebook_state_dict, sincos_position_embedding

SMALL = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 3,
    "hidden_size": 48,
    "depth": 2,
    "num_heads": 4,
    "num_classes": 10,
}


@pytest.fixture
def model() -> DiT:
    return randomize_(DiT(**SMALL), seed=0).double().eval()


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, torch.tensor([0, 437, 999]), torch.tensor([3, 9, 10])  # 10 is the null class


# Names and shapes


def xl_2_names_and_shapes() -> dict[str, tuple[int, ...]]:
    """Of the public DiT-XL-2-256x256.pt."""
    linears = {"t_embedder.mlp.0": (1152, 256), "t_embedder.mlp.2": (1152, 1152)}
    linears |= {"final_layer.linear": (32, 1152), "final_layer.adaLN_modulation.1": (2304, 1152)}
    for i in range(28):
        linears |= {
            f"blocks.{i}.attn.qkv": (3456, 1152),
            f"blocks.{i}.attn.proj": (1152, 1152),
            f"blocks.{i}.mlp.fc1": (4608, 1152),
            f"blocks.{i}.mlp.fc2": (1152, 4608),
            f"blocks.{i}.adaLN_modulation.1": (6912, 1152),
        }
    shapes = {f"{name}.weight": shape for name, shape in linears.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in linears.items()}
    shapes |= {"x_embedder.proj.weight": (1152, 4, 2, 2), "x_embedder.proj.bias": (1152,)}
    return shapes | {"pos_embed": (1, 256, 1152), "y_embedder.embedding_table.weight": (1001, 1152)}


def test_state_dict_is_that_of_dit_xl_2():
    with torch.device("meta"):
        model = DiT()
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == xl_2_names_and_shapes()
    assert len(model.state_dict()) == 292
    assert sum(parameter.numel() for parameter in model.parameters()) == 675_129_632


def test_without_bias_exactly_the_block_biases_are_gone():
    gone = DiT(**SMALL).state_dict().keys() - DiT(**SMALL, bias=False).state_dict().keys()
    linears = ("attn.qkv", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
    assert gone == {f"blocks.{i}.{linear}.bias" for i in range(2) for linear in linears}


def test_learn_sigma_doubles_the_output_channels(inputs):
    for learn_sigma, channels in ((True, 6), (False, 3)):
        model = DiT(**SMALL, learn_sigma=learn_sigma).double().eval()
        assert model(*inputs).shape == (3, channels, 8, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"input_size": 9}, "input_size=9 is no multiple of patch_size=2"), ({"num_heads": 5}, "of num_heads=5")],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        DiT(**(SMALL | change))


# Loading


def test_loads_a_dict_a_file_and_a_training_checkpoint(model, tmp_path):
    state = model.state_dict()
    torch.save(state, tmp_path / "public.pt")
    torch.save({"model": {}, "ema": state, "opt": {}, "args": argparse.Namespace(lr=1e-4)}, tmp_path / "training.pt")
    for source in (state, tmp_path / "public.pt", str(tmp_path / "training.pt")):
        loaded = load_facebook_state_dict(DiT(**SMALL).double(), source).state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_loading_is_strict(model):
    state = model.state_dict()
    state["blocks.0.attn.to_q.weight"] = state.pop("blocks.0.attn.qkv.weight")
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*blocks.0.attn.qkv.weight.*Unexpected.*to_q"):
        load_facebook_state_dict(DiT(**SMALL), state)


# Randomizing


def test_a_fresh_model_is_adaln_zero(inputs):
    model = DiT(**SMALL).double().eval()
    assert not model(*inputs).any()
    c = torch.randn(3, 48, dtype=torch.float64)
    tokens = torch.randn(3, 16, 48, dtype=torch.float64)
    assert torch.equal(model.blocks[0](tokens, c), tokens)


def test_randomize_leaves_nothing_at_zero_and_positions_alone(model):
    for parameter in model.parameters():
        assert parameter.std() > 0.01
    torch.testing.assert_close(model.pos_embed[0], sincos_position_embedding(48, 4).float().double(), rtol=0, atol=0)


def test_randomize_depends_on_the_seed_only(model):
    same = randomize_(DiT(**SMALL), seed=0).state_dict()
    other = randomize_(DiT(**SMALL), seed=1).state_dict()
    for name, value in model.float().state_dict().items():
        assert torch.equal(value, same[name])
        assert torch.equal(value, other[name]) == (name == "pos_embed")


def test_every_input_of_a_randomized_model_matters(model, inputs):
    x, t, y = inputs
    out = model(x, t, y)
    assert 0.1 < out.std() < 10
    for changed in ((x.flip(0), t, y), (x, t.flip(0), y), (x, t, y.flip(0))):
        assert (model(*changed) - out).abs().mean() > 0.01 * out.std()


# The function


def test_positions_put_the_column_first():
    positions = sincos_position_embedding(8, 3)  # two frequencies, 1 and 1 / 100, of two axes
    row, column = 1.0, 2.0
    angles = torch.tensor([column, column / 100, row, row / 100], dtype=torch.float64).reshape(2, 2)
    expected = torch.cat([angles.sin(), angles.cos()], dim=1).flatten()
    torch.testing.assert_close(positions[1 * 3 + 2], expected, rtol=1e-14, atol=0)


def test_attention_fused_or_not_is_one_function(model, inputs):
    plain = DiT(**SMALL, fused_attention=False).double().eval()
    load_facebook_state_dict(plain, model.state_dict())
    torch.testing.assert_close(plain(*inputs), model(*inputs), rtol=0, atol=1e-12)


def test_labels_are_dropped_in_train_mode_only_and_with_a_null_class():
    embedder = DiT(**SMALL, class_dropout_prob=1.0).y_embedder
    labels = torch.tensor([0, 1, 2])
    assert torch.equal(embedder(labels), embedder.embedding_table.weight[10].expand(3, -1))
    assert torch.equal(embedder.eval()(labels), embedder.embedding_table.weight[:3])
    assert DiT(**SMALL, class_dropout_prob=0.0).y_embedder.embedding_table.num_embeddings == 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_in_other_dtypes(model, inputs, dtype):
    x, t, y = inputs
    out = model.to(dtype)(x.to(dtype), t, y)
    assert out.dtype == dtype
    assert out.isfinite().all()


def test_block_is_that_of_the_numpy_reference(model):
    block = model.blocks[0]
    q_weight, k_weight, v_weight = block.attn.qkv.weight.detach().numpy().reshape(3, 48, 48)
    q_bias, k_bias, v_bias = block.attn.qkv.bias.detach().numpy().reshape(3, 48)
    others = {"adaln": block.adaLN_modulation[1], "proj": block.attn.proj, "fc1": block.mlp.fc1, "fc2": block.mlp.fc2}
    weights = reference.BlockWeights(
        q_weight=q_weight, k_weight=k_weight, v_weight=v_weight, q_bias=q_bias, k_bias=k_bias, v_bias=v_bias,
        **{f"{name}_weight": linear.weight.detach().numpy() for name, linear in others.items()},
        **{f"{name}_bias": linear.bias.detach().numpy() for name, linear in others.items()},
    )  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 16, 48, generator=generator, dtype=torch.float64)
    c = torch.randn(3, 48, generator=generator, dtype=torch.float64)
    expected = torch.from_numpy(reference.dit_block_forward(weights, x.numpy(), c.numpy(), heads=4))
    torch.testing.assert_close(block(x, c), expected, rtol=0, atol=1e-12)


# diffusers


def to_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the names of diffusers' DiTTransformer2DModel, whose blocks each embed (t, y)."""
    embedders = {
        "t_embedder.mlp.0": "timestep_embedder.linear_1",
        "t_embedder.mlp.2": "timestep_embedder.linear_2",
        "y_embedder.embedding_table": "class_embedder.embedding_table",
    }
    outer = {
        "x_embedder.proj": "pos_embed.proj",
        "final_layer.adaLN_modulation.1": "proj_out_1",
        "final_layer.linear": "proj_out_2",
    }
    inner = {
        "adaLN_modulation.1": "norm1.linear",
        "attn.proj": "attn1.to_out.0",
        "mlp.fc1": "ff.net.0.proj",
        "mlp.fc2": "ff.net.2",
    }
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    converted = {}
    for name, value in state.items():
        module, _, kind = name.rpartition(".")
        if name == "pos_embed":  # a buffer that diffusers does not save
            continue
        if module in outer:
            converted[f"{outer[module]}.{kind}"] = value
        elif module in embedders:
            for i in range(depth):
                converted[f"transformer_blocks.{i}.norm1.emb.{embedders[module]}.{kind}"] = value
        else:
            _, i, module = module.split(".", 2)
            if module == "attn.qkv":
                for part, rows in zip("qkv", value.chunk(3), strict=True):
                    converted[f"transformer_blocks.{i}.attn1.to_{part}.{kind}"] = rows
            else:
                converted[f"transformer_blocks.{i}.{inner[module]}.{kind}"] = value
    return converted


def build_diffusers(model: DiT):
    diffusers = pytest.importorskip("diffusers")
    twin = diffusers.DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=12,
        in_channels=3,
        out_channels=6,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        attention_bias=True,
        activation_fn="gelu-approximate",
        norm_eps=1e-6,  # of norm3 alone, 1e-5 by default; the other norms have 1e-6 written in
    )
    twin = twin.double().eval()
    twin.load_state_dict(to_diffusers(model.state_dict()), strict=True)
    return twin


def run_diffusers(twin, inputs) -> Tensor:
    x, t, y = inputs
    return twin(x, timestep=t, class_labels=y).sample


def test_computes_what_diffusers_computes(model, inputs):
    twin = build_diffusers(model)
    for block in twin.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    # Sines and cosines of NumPy and torch may differ in the last place before float32 rounds them.
    torch.testing.assert_close(twin.pos_embed.pos_embed, model.pos_embed.data, rtol=0, atol=1e-6)
    twin.pos_embed.pos_embed.copy_(model.pos_embed)
    torch.testing.assert_close(run_diffusers(twin, inputs), model(*inputs), rtol=0, atol=1e-10)


def test_sinusoids_of_diffusers_have_other_frequencies(model):
    """diffusers divides the exponents by 127, facebookresearch/DiT by 128: the same weights, another function of t."""
    emb = build_diffusers(model).transformer_blocks[0].norm1.emb
    t, y = torch.tensor([0, 500]), torch.tensor([0, 0])
    ours = model.t_embedder(t) + model.y_embedder(y)
    theirs = emb(t, y, hidden_dtype=torch.float64)
    torch.testing.assert_close(theirs[0], ours[0], rtol=0, atol=1e-12)  # at t = 0 all frequencies agree
    assert (theirs[1] - ours[1]).std() > 0.1 * ours[1].std()
