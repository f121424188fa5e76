"""What is saved can be loaded: anything else is refused with the name of its layer, and nothing is written."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import warnings

import pytest
import torch
import transformers
from bcosify.convert import Teacher, convert, load, load_teacher, save
from bcosify.core.errors import CheckpointError, PlanError
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils import weight_norm as old_weight_norm

from configs import VISION

PICTURES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def wrapped(teacher: Teacher) -> Teacher:
    return dataclasses.replace(teacher, model=nn.DataParallel(teacher.model))


def in_a_box(teacher: Teacher) -> Teacher:
    return dataclasses.replace(teacher, model=nn.Sequential(teacher.model))


def normed(teacher: Teacher) -> Teacher:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old_weight_norm(teacher.model.get_submodule("blocks.1.mlp.fc1"))
    return teacher


def hooked(teacher: Teacher) -> Teacher:
    teacher.model.get_submodule("blocks.1").register_forward_hook(lambda module, args, output: output * 1.01)
    return teacher


def replaced(teacher: Teacher) -> Teacher:
    old = teacher.model.get_submodule("blocks.2.mlp.fc2")
    teacher.model.set_submodule("blocks.2.mlp.fc2", nn.Sequential(old, nn.Linear(old.out_features, old.out_features)))
    return teacher


def longer(teacher: Teacher) -> Teacher:
    blocks = teacher.model.get_submodule("blocks")
    blocks.append(copy.deepcopy(blocks[0]))
    return teacher


def silenced(teacher: Teacher) -> Teacher:
    """The same keys, another function."""
    teacher.model.set_submodule("blocks.0.mlp.act", nn.ReLU())
    return teacher


def two_layers(teacher: Teacher) -> Teacher:
    teacher.model.head = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 5))
    return teacher


@pytest.mark.parametrize(
    ("change", "layer"),
    [
        (wrapped, "DataParallel"),
        (in_a_box, "Sequential"),
        (normed, r"blocks\.1\.mlp\.fc1"),
        (hooked, r"blocks\.1 "),
        (replaced, r"blocks\.2\.mlp\.fc2"),
        (longer, r"blocks\.3"),
        (silenced, r"blocks\.0\.mlp\.act"),
        (two_layers, "head"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(tiny, tmp_path, change, layer):
    student = convert(change(tiny("test_vit")))
    with pytest.raises(CheckpointError, match=rf"could not be loaded again.*{layer}.*Nothing was written"):
        save(student, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_weight_norm_is_refused_by_name(tiny):
    nn.utils.parametrizations.weight_norm((teacher := tiny("test_vit")).model.get_submodule("head"))
    with pytest.raises(PlanError, match=r"head \(torch.nn.utils.parametrize.ParametrizedLinear\): not supported"):
        convert(teacher)


def test_fused_branches_are_refused(tmp_path):
    from timm.utils.model import reparameterize_model

    teacher = load_teacher("timm:mobileone_s0", pretrained=False, image_size=32)
    fused = dataclasses.replace(teacher, model=reparameterize_model(teacher.model).eval())
    with pytest.raises(CheckpointError, match="stem|stages"):
        save(convert(fused), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_students_own_changes_are_refused_too(tiny, tmp_path):
    student = convert(tiny("test_resnet"))
    student.model.get_submodule("layer1.0.conv1").register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    with pytest.raises(CheckpointError, match=r"layer1\.0\.conv1 \(BcosConv2d.*by a hook"):
        save(student, tmp_path / "out")


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext", "test_efficientnet"])
@pytest.mark.parametrize("classes", [5, 0])
def test_a_classifier_of_ones_own_is_saved_with_its_classes(tiny, tmp_path, name, classes):
    teacher = tiny(name)
    teacher.model.reset_classifier(classes)
    names = tuple(f"plant {i}" for i in range(classes)) or None
    student = convert(dataclasses.replace(teacher, labels=names))
    opened = load(save(student, tmp_path / "out"))
    assert torch.equal(opened.model(PICTURES), student.model(PICTURES))
    assert opened.labels == names and opened.source.model_args["num_classes"] == classes


def test_a_replaced_classifier_counts_as_one_too_and_other_names_are_not_its(tiny, tmp_path):
    teacher = dataclasses.replace(tiny("test_vit"), labels=tuple(f"class {i}" for i in range(1000)))
    teacher.model.head = nn.Linear(64, 5)
    with pytest.warns(UserWarning, match="1000 names of classes do not fit a classifier of 5"):
        student = convert(teacher)
    opened = load(save(student, tmp_path / "out"))
    assert opened.labels is None and opened.model(PICTURES).shape == (2, 5)


def test_a_fine_tuned_classifier_of_transformers_is_saved(tmp_path):
    torch.manual_seed(0)
    config = transformers.ViTConfig(**VISION, num_labels=3)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "hf")
    teacher = load_teacher(f"hf:{tmp_path / 'hf'}")
    teacher.model.get_submodule("model").classifier = nn.Linear(32, 7)
    student = convert(dataclasses.replace(teacher, labels=tuple("abcdefg")))
    opened = load(save(student, tmp_path / "out"))
    pictures = PICTURES[..., :32, :32]
    assert torch.equal(opened.model(pictures), student.model(pictures)) and opened.labels == tuple("abcdefg")


def test_a_library_that_is_not_known_is_refused_before_it_is_written(tiny, tmp_path):
    student = convert(tiny("test_vit"))
    student = dataclasses.replace(student, source=dataclasses.replace(student.source, library="caffe"))
    with pytest.raises(CheckpointError, match="cannot build models of 'caffe'"):
        save(student, tmp_path / "out")


def test_a_fresh_student_is_pickled_with_equal_outputs():
    model = convert(load_teacher("timm:test_vit", pretrained=False, image_size=64)).model
    other = pickle.loads(pickle.dumps(model))
    assert torch.equal(other(PICTURES), model(PICTURES)) and not parametrize.is_parametrized(other)
