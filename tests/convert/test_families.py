"""Tiny members of families whose layers differ: identity, ledger, finite at B = 2, and back from disk.

The full sweep is benchmarks/coverage.py.
"""

from __future__ import annotations

import copy
import dataclasses

import pytest
import timm
import torch
from bcosify.convert import (
    BcosConfig,
    CaStreamConfig,
    CodaConfig,
    FaCnnConfig,
    Preprocess,
    Source,
    Teacher,
    convert,
    identity_error,
    load,
    load_teacher,
    save,
    set_strength,
)
from bcosify.convert.layers import BcosConv2d, batch_statistics, scheduled_layers
from bcosify.convert.methods import find_method
from bcosify.convert.randomise import randomise
from bcosify.core.errors import PlanError
from bcosify.core.pictures import noise_pictures
from bcosify.explain import explain
from torch import nn

from configs import VISION
from tiny import tiny_teacher

# name: (size, what is special)
FAMILIES = {
    "test_vit": (64, "packed qkv"),
    "test_vit3": (64, "attention pooling, LayerScale"),
    "test_vit4": (64, "RMSNorm, SwiGLU"),
    "test_vit_relpos": (160, "relative position bias"),
    "test_resnet": (64, "batch norm, anti-aliased pool"),
    "test_nfnet": (64, "scaled weight standardisation, learnt gains"),
    "test_convnext2": (64, "depthwise, response norm"),
    "test_efficientnet_evos": (64, "EvoNorm"),
    "test_efficientnet_gn": (64, "group norm, squeeze-and-excite"),
    "test_byobnet": (64, "attention gates"),
    "test_mambaout": (64, "gated convolution"),
    "hgnetv2_b0": (64, "affine after the activation"),
    "cs3darknet_focus_s": (64, "the picture folded into twelve channels"),
    "starnet_s050": (64, "product of two branches"),
    "edgenext_xx_small": (64, "attention over channels"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_student_is_its_teacher_explains_and_comes_back(name, tmp_path):
    teacher = tiny_teacher(name, FAMILIES[name][0])
    pictures = noise_pictures(2, teacher.preprocess.size)
    student = convert(teacher)
    assert student.history.conversion.identity_error <= 1e-4
    for strength in ((1.0, 1.0), (1.5, 0.5)):
        set_strength(student.model, *strength)
        explanation = explain(student.model, pictures, targets=[0, 3])
        assert explanation.balanced().all() and explanation.encoded_inputs.shape[1] == 6
    with torch.no_grad():
        wanted = student.model(pictures)
        assert torch.equal(load(save(student, tmp_path / "student")).model(pictures), wanted)
        set_strength(student.model, 2.0, 0.0)
        assert student.model(pictures).isfinite().all()


CNNS = ("test_resnet", "test_convnext2", "test_efficientnet")
METHODS = {BcosConfig: (*CNNS, "test_vit"), CodaConfig: (*CNNS, "test_vit"), FaCnnConfig: CNNS, CaStreamConfig: CNNS}


@pytest.mark.parametrize(("config", "name"), [(config(), name) for config, names in METHODS.items() for name in names])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_a_step_off_the_cpu_never_waits_for_the_device(config, name, layout):
    """The meta device stands for every device but the CPU: reading a number from it is an error."""
    student = convert(load_teacher(f"timm:{name}", pretrained=False, image_size=64), config)
    set_strength(student.model, **find_method(student.method).ends(student.config))
    model, pictures = student.model.to("meta"), torch.empty(2, 3, 64, 64, device="meta", memory_format=layout)
    with torch.no_grad():
        wanted = model(pictures)
    assert (wanted.shape, wanted.device.type) == ((2, 1000), "meta")
    with batch_statistics(model):
        model(pictures).square().mean().backward()
    assert any(parameter.grad is not None for parameter in model.parameters())


def built(model: nn.Module, size: int) -> Teacher:
    """A teacher that is no timm model."""
    preprocess = Preprocess((size, size), (0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
    torch.manual_seed(0)
    return Teacher(randomise(model, noise_pictures(2, (size, size))), Source("timm:own", "timm", "own"), preprocess)


class Pooled(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pictures):
        return self.model(pictures).pooler_output.flatten(1)


STAGES = {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 1, 1]}


@pytest.mark.parametrize(
    ("name", "config"),
    [("Siglip", VISION), ("CLIP", VISION), ("Dinov2", VISION), ("DINOv3ViT", VISION), ("ConvNextV2", STAGES)],
)
def test_transformers_models(name, config):
    import transformers

    model = f"{name}VisionModel" if name in ("Siglip", "CLIP") else f"{name}Model"
    model_class = getattr(transformers, model)
    teacher = built(Pooled(model_class(model_class.config_class(**config))), 32)
    student = convert(teacher)
    # The embeddings module holds tokens and is given the picture too, but the convolution in it is what reads it.
    assert {kind for kind in student.plan.counts() if "SixChannel" in kind} == {"SixChannelBcosConv2d"}
    assert student.history.conversion.identity_error <= 1e-5
    set_strength(student.model, 1.5, 0.5)
    assert explain(student.model, noise_pictures(2, (32, 32)), targets=[0, 1]).balanced().all()


@pytest.mark.parametrize(("tower", "kind"), [("ViT", "SeparateAttention"), ("ResNet", "SeparateAttentionPool2d")])
def test_open_clip_towers(tower, kind):
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.transformer import VisionTransformer

    model = (
        VisionTransformer(32, 8, 32, 2, 2, 2.0, attentional_pool=True, attn_pooler_queries=4, attn_pooler_heads=2)
        if tower == "ViT"
        else ModifiedResNet([1, 1, 1, 1], 16, 4, image_size=64, width=8)
    )
    size = 32 if tower == "ViT" else 64
    student = convert(built(model, size))
    assert {kind, "SixChannelBcosConv2d"} <= set(student.plan.counts())
    assert student.history.conversion.identity_error <= 1e-5
    set_strength(student.model, 1.5, 0.5)
    assert explain(student.model, noise_pictures(2, (size, size)), targets=[0, 1]).balanced().all()


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("beit_base_patch16_224", ("blocks.0.attn",)),
        ("swinv2_cr_tiny_224", ()),
        ("swinv2_tiny_window8_256", ("layers.0.blocks.0.attn",)),
    ],
)
def test_constants_of_other_names_fade(name, names):
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    # On the meta device: only the plan is asked for, and no weight is ever made.
    preprocess = Preprocess((256, 256) if "256" in name else (224, 224), (0.5,) * 3, (0.5,) * 3)
    student = convert(Teacher(model, Source(f"timm:{name}", "timm", name), preprocess))
    steps = {step.name: step for step in student.plan.swaps}
    assert all("q_bias and v_bias fade" in steps[step].reason for step in names)
    for step in names:
        attention = student.model.get_submodule(step)
        attention._beta = 0.5
        assert attention.q_bias is not attention._parameters["q_bias"]
        attention._beta = 1.0
        assert attention.q_bias is attention._parameters["q_bias"]


def test_query_and_value_biases_of_beit_are_gone_at_beta_0():
    torch.manual_seed(0)
    model = timm.create_model("beit_base_patch16_224", img_size=32, depth=1, embed_dim=24, num_heads=2, num_classes=4)
    student = convert(built(model, 32))
    assert student.history.conversion.identity_error <= 1e-5
    pictures = noise_pictures(1, (32, 32))
    constants = explain(student.model, pictures, 0).constants
    assert any("v_bias" in name for name in constants)
    set_strength(student.model, beta=0.0)
    assert not any("bias" in name and "table" not in name for name in explain(student.model, pictures, 0).constants)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_nfnet"])
def test_half_precision_teachers_convert_and_stay_half(name, dtype):
    teacher = tiny_teacher(name, 64)
    teacher.model.to(dtype)
    student = convert(teacher)
    assert {parameter.dtype for parameter in student.model.parameters()} == {dtype}
    assert {parameter.dtype for parameter in teacher.model.parameters()} == {dtype}
    assert student.history.conversion.identity_error <= 1e-4  # compared in float32
    assert all(layer.beta.dtype == torch.float32 for _, layer in scheduled_layers(student.model))
    pictures = noise_pictures(2, (64, 64)).to(dtype)
    assert identity_error(student.model, teacher.model, pictures) <= 30 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", ["test_vit3", "test_resnet", "test_nfnet"])
def test_models_without_memory_convert_and_take_weights_later(name):
    teacher = tiny_teacher(name, 64)
    empty = copy.deepcopy(teacher.model).to("meta")
    skeleton = convert(dataclasses.replace(teacher, model=empty))
    assert {parameter.device.type for parameter in skeleton.model.parameters()} == {"meta"}
    assert skeleton.history.conversion.identity_error is None
    student = convert(teacher)
    assert skeleton.plan == student.plan
    skeleton.model.load_state_dict(student.model.state_dict(), assign=True)
    pictures = noise_pictures(2, (64, 64))
    assert identity_error(skeleton.model, student.model, pictures) == 0


class Tied(nn.Module):
    """One convolution at two places, and two layers that share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.once = nn.Conv2d(8, 8, 3, padding=1)
        self.again = self.once
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)
        self.down.weight = self.up.weight

    def forward(self, x):
        x = self.again(self.once(self.stem(x)).relu()).mean((2, 3))
        return self.down(self.up(x).relu())


def test_shared_and_tied_modules_are_converted_once_and_stay_tied():
    student = convert(built(Tied(), 16))
    model = student.model
    assert model.once is model.again and isinstance(model.once, BcosConv2d)
    assert model.up.weight is model.down.weight
    assert [step.name for step in student.plan.swaps] == ["stem", "once", "up", "down"]
    set_strength(model, 1.7, 0.3)
    assert explain(model, noise_pictures(2, (16, 16)), targets=[0, 1]).balanced().all()


def test_weight_standardisation_is_folded_into_plain_weights():
    student = convert(tiny_teacher("test_nfnet", 64))
    reasons = {step.found: step.reason for step in student.plan.swaps}
    assert "folded" in reasons["ScaledStdConv2d"]
    convolutions = [layer for _, layer in scheduled_layers(student.model) if isinstance(layer, BcosConv2d)]
    assert convolutions and all("gain" not in layer._parameters for layer in convolutions)


def test_recurrent_networks_are_refused_by_name():
    with torch.device("meta"):
        model = timm.create_model("sequencer2d_s", pretrained=False)
    teacher = Teacher(
        model, Source("timm:sequencer2d_s", "timm", "own"), Preprocess((224, 224), (0.5,) * 3, (0.5,) * 3)
    )
    with pytest.raises(PlanError, match=r"(?s)rnn_v \(torch\S*LSTM\): a recurrent layer.*and 26 more"):
        convert(teacher)
