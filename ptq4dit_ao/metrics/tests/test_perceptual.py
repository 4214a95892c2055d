"""LPIPS and the CLIP score, with networks of random weights on disk."""

from __future__ import annotations

import sys

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from ptq4dit_ao.errors import ArgumentError, MissingDependencyError
from ptq4dit_ao.metrics import clip_score, image_errors, lpips, perceptual
from ptq4dit_ao.testing.pipelines import _clip_config, _clip_tokenizer


def pictures(n=3, channels=3, size=64):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, channels, size, size, generator=generator) * 2 - 1
    return x, (x + 0.1 * torch.randn(x.shape, generator=generator)).clamp(-1, 1)


@pytest.fixture
def squeeze(tmp_path, monkeypatch):
    """torchvision's file of SqueezeNet, with random weights."""
    pytest.importorskip("torchmetrics")
    torchvision = pytest.importorskip("torchvision")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.manual_seed(0)
    weights = torchvision.models.squeezenet1_1(weights=None).state_dict()
    torch.save(weights, tmp_path / "checkpoints" / "squeezenet1_1-b8a52dc0.pth")


def test_lpips_is_of_each_pair(squeeze):
    x, y = pictures()
    found = lpips(x, y, "squeeze")
    assert found.shape == (3,) and found.dtype == torch.float64 and (found > 0).all()
    assert lpips(x, x, "squeeze").tolist() == [0, 0, 0]
    assert lpips(x[1:2], y[1:2], "squeeze").tolist() == pytest.approx([float(found[1])], rel=1e-5)
    errors = image_errors(x, y, lpips="squeeze")
    assert errors.lpips.value == pytest.approx(float(found.mean()), rel=1e-5) and image_errors(x, y).lpips is None


def test_a_broken_image_is_told(squeeze):
    x, y = pictures()
    y[1, 0, 0, 0] = torch.nan
    assert lpips(x, y, "squeeze").isnan().tolist() == [False, True, False]


def test_grey_images_have_three_equal_channels(squeeze):
    x, y = pictures(channels=1)
    assert torch.equal(lpips(x, y, "squeeze"), lpips(x.repeat(1, 3, 1, 1), y.repeat(1, 3, 1, 1), "squeeze"))


def test_weights_are_never_downloaded(squeeze):
    with pytest.raises(
        ArgumentError, match="LPIPS by 'alex' needs torchvision's weights as .*/alexnet-owt-7be5be79.pth"
    ):
        lpips(*pictures())


@pytest.mark.parametrize(
    ("pair", "network", "message"),
    [
        (pictures(size=32), "alex", "images have 32 pixels a side, and LPIPS is for 64 and more"),
        (pictures(channels=4), "alex", r"LPIPS expects one \(N, 3, H, W\)"),
        ((pictures()[0], pictures(n=2)[0]), "alex", r"images have shape \(2, 3, 64, 64\) and their references \(3, "),
        (pictures(), "resnet", "lpips is 'resnet'; choose one of alex, vgg, squeeze"),
    ],
)
def test_images_that_lpips_is_not_for(pair, network, message):
    with pytest.raises(ArgumentError, match=message):
        lpips(*pair, network)


def test_a_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(MissingDependencyError, match=r"'torchmetrics' is not installed; .*'ptq4dit-ao\[lpips\]'"):
        lpips(*pictures())


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder with a tiny CLIP model and a tokenizer of letters."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(2)  # with others the cosines are below 0
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 16, "projection_dim": 16}
    config = CLIPConfig(text_config=_clip_config().to_dict(), vision_config=vision, projection_dim=16)
    CLIPModel(config).eval().save_pretrained(folder)
    _clip_tokenizer().save_pretrained(folder)
    return folder


def test_the_clip_score_is_of_images_and_their_texts(clip, monkeypatch):
    monkeypatch.setattr(perceptual, "BATCH", 2)
    images, prompts = pictures(size=48)[0], ["a cat", "dogs and a tree", "a"]
    found = clip_score(images, prompts, clip)
    assert 0 <= found.low <= found.value <= found.high <= 100
    each = [clip_score(images[i : i + 1], [prompts[i]], clip).value for i in range(3)]
    assert found.value == pytest.approx(sum(each) / 3, rel=1e-4)
    assert clip_score(images, prompts[::-1], clip).value != pytest.approx(found.value, rel=1e-4)


def test_the_middle_of_a_wide_image_is_scored(clip):
    wide = torch.cat([torch.ones(1, 3, 32, 16), pictures(n=1, size=32)[0], torch.ones(1, 3, 32, 16)], dim=3)
    assert clip_score(wide, ["a"], clip).value == clip_score(wide[..., 16:48], ["a"], clip).value


def test_what_has_no_clip_score(clip, tmp_path):
    images = pictures(n=2)[0]
    for prompts, message in ((["a"], "there are 1 texts for images of shape"), ("ab", "there is a text for images")):
        with pytest.raises(ArgumentError, match=message):
            clip_score(images, prompts, clip)
    with pytest.raises(ArgumentError, match="there is no CLIP model in .*; give the folder of one"):
        clip_score(images, ["a", "b"], tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ArgumentError, match="cannot be loaded as a CLIP model with its tokenizer"):
        clip_score(images, ["a", "b"], tmp_path)
