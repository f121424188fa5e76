"""Channels-last memory: who gets it, and that nothing but speed changes."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from bcosify.convert import convert, fold, load, load_teacher, save, set_strength
from bcosify.convert.memory import laid_out, memory_format_of
from bcosify.core.pictures import noise_pictures
from bcosify.explain import TopTarget, explain
from torch import nn

CONVOLUTIONAL = ("test_resnet", "test_efficientnet", "test_nfnet", "resnet50", "densenet121", "vgg11")
OTHERS = ("test_vit", "vit_small_patch16_224", "swin_tiny_patch4_window7_224", "mixer_s32_224", "convnext_tiny")


def channels_last(model: nn.Module) -> list[bool]:
    """Of every convolution whose format shows."""
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    shown = [w for w in weights if w.shape[1] > 1 and w.shape[2] > 1]
    assert shown
    return [w.is_contiguous(memory_format=torch.channels_last) for w in shown]


@pytest.fixture(scope="module", params=["test_resnet", "test_nfnet", "test_efficientnet"])
def student(request):
    torch.manual_seed(0)
    student = convert(load_teacher(f"timm:{request.param}", pretrained=False, image_size=64))
    set_strength(student.model, b=1.5, beta=0.5)
    return student


@pytest.mark.parametrize("name", [*CONVOLUTIONAL, *OTHERS])
def test_convolutional_networks_get_it_and_no_others(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    wanted = torch.channels_last if name in CONVOLUTIONAL else torch.contiguous_format
    assert memory_format_of(model) == wanted
    assert set(channels_last(laid_out(model))) == {wanted == torch.channels_last}
    assert memory_format_of(nn.Flatten()) == torch.contiguous_format


def test_function_ledger_and_gradients_are_the_same(student):
    plain, model = copy.deepcopy(student.model), laid_out(copy.deepcopy(student.model))
    assert all(channels_last(model)) and not any(channels_last(plain))
    pictures = noise_pictures(3, (64, 64))
    there = pictures.contiguous(memory_format=torch.channels_last)
    wanted = plain(pictures).detach()
    for given in (pictures, there):
        torch.testing.assert_close(model(given), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    plain(pictures).square().mean().backward()
    model(there).square().mean().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5 * float(theirs.grad.abs().max()))
    ours, theirs = (explain(one, pictures, TopTarget(2)) for one in (model, plain))
    assert ours.balanced(1e-5).all()
    limit = 1e-5 * float(theirs.contributions.abs().sum((-2, -1)).max())
    torch.testing.assert_close(ours.contributions, theirs.contributions, rtol=1e-4, atol=limit)
    # Whose model it is decides how it lies in memory.
    assert all(channels_last(model)) and not any(channels_last(plain))


def test_it_is_saved_loaded_and_folded(student, tmp_path):
    model = laid_out(copy.deepcopy(student.model))
    opened = load(save(type(student)(**{**vars(student), "model": model}), tmp_path / "student"))
    assert not any(channels_last(opened.model))
    for name, tensor in model.state_dict().items():
        assert torch.equal(opened.model.state_dict()[name], tensor)
    pictures = noise_pictures(2, (64, 64))
    with torch.no_grad():
        wanted = student.model(pictures)
        folded = fold(type(student)(**{**vars(student), "model": model}))
        torch.testing.assert_close(folded(pictures), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
