"""Converted models are pickled and copied like any others: the same function, in another process too."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from bcosify.convert import BcosConfig, CaStreamConfig, CodaConfig, FaCnnConfig, KMeansConfig, convert, set_strength
from bcosify.convert.layers import BcosLinear, convert_in_place, join, scheduled_layers, strength_spans
from bcosify.convert.methods.fa_cnn.class_maps import PlaceClassifier
from torch import nn

from regression_models import CONVNEXT, timm_teacher

MODELS = {
    "bcos-vit": ("test_vit", BcosConfig()),
    "bcos-same": ("test_efficientnet", BcosConfig(scale="unbounded")),
    "bcos-fading-constants": ("convnextv2_atto", BcosConfig()),
    "coda": ("test_resnet", CodaConfig(rank=2)),
    "fa-cnn": ("test_resnet", FaCnnConfig()),
    "fa-cnn-norm": ("test_convnext", FaCnnConfig()),
    "ca-stream": ("test_resnet", CaStreamConfig()),
    "ca-stream-token": ("test_vit", CaStreamConfig(stages=1)),
    "kmeans": ("test_resnet", KMeansConfig()),
}
MOVED = {"b": 1.5, "beta": 0.5, "dampening": 0.25}


def moved(model: nn.Module) -> nn.Module:
    spans = strength_spans(model)
    set_strength(model, **{name: value for name, value in MOVED.items() if name in spans})
    return model.eval()


@pytest.mark.parametrize(
    "copied", [lambda model: pickle.loads(pickle.dumps(model)), copy.deepcopy], ids=["pickled", "deep-copied"]
)
@pytest.mark.parametrize("kind", MODELS)
def test_a_copy_is_the_same_function_and_stands_alone(tiny, kind, copied):
    name, config = MODELS[kind]
    teacher = timm_teacher(name, 64, **CONVNEXT) if name == "convnextv2_atto" else tiny(name)
    model, pictures = moved(convert(teacher, config).model), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted, other = model(pictures), copied(model)
        assert torch.equal(other(pictures), wanted)
        assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
        ours, theirs = ([layer.strengths() for _, layer in scheduled_layers(each)] for each in (model, other))
        assert ours == theirs
        for parameter in other.parameters():
            parameter.add_(1)
        set_strength(other, **{name: least for name, (least, _) in strength_spans(other).items() if name == "beta"})
        assert torch.equal(model(pictures), wanted)


def test_another_process_computes_the_same(tiny):
    model = moved(convert(tiny("test_vit")).model)
    model.requires_grad_(False)
    pictures = torch.randn(2, 3, 64, 64)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(model, pictures).result()
    torch.testing.assert_close(found, model(pictures), rtol=1e-5, atol=1e-5)


def test_classes_that_are_made_of_others_have_names_of_their_own(tiny):
    torch.manual_seed(0)
    layer = join(convert_in_place(nn.Linear(4, 3), BcosLinear), PlaceClassifier)
    other = pickle.loads(pickle.dumps(layer))
    x = torch.randn(2, 4)
    assert type(other) is type(layer) and torch.equal(other(x), layer(x))
    names = [kind.__qualname__ for kind in type(layer).__mro__]
    assert len(set(names)) == len(names) and names[1] == "PlaceClassifier"
    assert names[2] == "BcosLinear[torch.nn.modules.linear.Linear]"
    kinds = {type(module) for module in convert(tiny("test_efficientnet")).model.modules()}
    assert len({(kind.__module__, kind.__qualname__) for kind in kinds}) == len(kinds)


def test_a_class_on_top_of_a_converted_one_is_copied_too():
    layer = convert_in_place(nn.Linear(4, 3), BcosLinear)
    layer.__class__ = type("Wrapped", (type(layer),), {})
    other, x = copy.deepcopy(layer), torch.randn(2, 4)
    assert type(other) is type(layer) and torch.equal(other(x), layer(x)) and other.weight is not layer.weight
