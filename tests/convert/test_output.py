"""What a model's output is: one answer, by its own configuration and weights, wherever it is asked."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from bcosify.align.checks import check_objectives
from bcosify.convert import Source, Student, Teacher, convert, load, load_teacher, save
from bcosify.convert.libraries.timm.classes import names_of, output
from bcosify.convert.library_files import config_of
from bcosify.convert.output import OutputKind, output_kind, with_labels
from bcosify.core.errors import CheckpointError, DataError, RecipeError, SourceError, TargetError
from bcosify.explain.questions import ask
from bcosify.publish.card import load_lines, task_of
from bcosify.publish.transformers_door import LOSSES
from safetensors.torch import save_file
from torch import nn

torch.set_num_threads(1)

PLANTS = tuple(f"plant {i}" for i in range(1000))
CUT = ("input_size", "fixed_input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "first_conv")


@pytest.fixture
def timm_folder(tmp_path) -> Callable[..., str]:
    """timm_folder(COUNT, KEY=VALUE of config.json, ...): the reference of a model of one's own."""

    def make(count: int, **facts: Any) -> str:
        model = timm.create_model("test_vit", num_classes=count)
        folder = tmp_path / "own"
        folder.mkdir()
        save_file(model.state_dict(), folder / "model.safetensors")
        own = {key: value for key, value in model.pretrained_cfg.items() if key in (*CUT, "classifier", "tag")}
        config = {"architecture": "test_vit", "num_classes": count, "pretrained_cfg": own, **facts}
        (folder / "config.json").write_text(json.dumps(config))
        return f"timm:local-dir:{folder}"

    return make


def own_weights(folder: Path, count: int) -> Path:
    save_file(timm.create_model("test_vit", num_classes=count).state_dict(), folder / "own.safetensors")
    return folder / "own.safetensors"


# ---------------------------------------------------------------------------------------------------------- where from


@pytest.mark.parametrize(
    "facts",
    [
        {"label_names": PLANTS},
        {"label_names": {str(i): name for i, name in enumerate(PLANTS)}},
        {
            "label_names": [f"n{i}" for i in range(1000)],
            "label_descriptions": {f"n{i}": PLANTS[i] for i in range(1000)},
        },
        {"label_descriptions": PLANTS},
    ],
    ids=["names", "by number", "descriptions", "descriptions alone"],
)
def test_names_are_those_of_the_model_s_own_configuration(timm_folder, facts):
    """As many classes as ImageNet has say nothing."""
    found = output_kind(load_teacher(timm_folder(1000, **facts)))
    assert (found.kind, found.count, found.names) == ("classes", 1000, PLANTS) and "label_names" in found.named_by


def test_a_thousand_classes_without_names_are_not_imagenets(timm_folder, tmp_path):
    """Also where the configuration still says which weights the training began with."""
    reference = timm_folder(1000)
    found = output_kind(load_teacher(reference))
    assert found == OutputKind("classes", 1000) and found.name(3) == "class 3"
    own = load_teacher("timm:test_vit", weights=own_weights(tmp_path, 1000))
    assert output_kind(own) == OutputKind("classes", 1000)


def test_own_weights_do_not_take_the_names_of_a_folder_either(timm_folder, tmp_path):
    reference = timm_folder(1000, label_names=PLANTS)
    assert load_teacher(reference, weights=own_weights(tmp_path, 1000)).labels is None


def test_names_of_another_number_of_classes_are_left_out_and_said(timm_folder):
    with pytest.warns(UserWarning, match="names for 3 classes, but it has 5 outputs"):
        assert load_teacher(timm_folder(5, label_names=["a", "b", "c"])).labels is None


@pytest.mark.parametrize(
    ("tag", "count", "first"),
    [
        ("a1_in1k", 1000, "tench"),
        ("augreg_in21k", 21843, "organism"),
        ("augreg_in21k_ft_in1k", 1000, "tench"),
        ("augreg_in21k_ft_in1k", 21843, None),
        ("fb_dino", 1000, None),
        ("plants1k", 1000, None),
        ("a1_in1k", 11, None),
    ],
)
def test_imagenets_names_are_for_timms_own_weights_whose_tag_says_so(tag, count, first):
    model: Any = nn.Module()
    model.num_classes, model.pretrained_cfg = count, {"tag": tag}
    found = names_of(f"net.{tag}", "net", model)
    assert (found is None) == (first is None) and (found is None or found[0][0].startswith(first))
    assert names_of(f"hf-hub:timm/net.{tag}", "net", model) == found
    assert names_of(f"hf-hub:me/net.{tag}", "net", model) is None and names_of("local-dir:x", "net", model) is None


@pytest.mark.parametrize(
    ("reference", "count", "weights", "kind"),
    [
        ("timm:vit_base_patch16_clip_224.openai", 512, None, "features"),
        ("timm:hf-hub:timm/vit_base_patch16_clip_224.openai@abc", 512, None, "features"),
        ("timm:vit_base_patch16_clip_224.openai", 5, "0" * 64, "classes"),
        ("timm:vit_base_patch16_clip_224.openai_ft_in1k", 1000, None, "classes"),
        ("timm:resnet50.a1_in1k", 1000, None, "classes"),
        ("timm:resnet50", 1, "0" * 64, "regression"),
        ("timm:resnet50", 0, None, "features"),
    ],
)
def test_an_embedding_of_timms_is_no_row_of_classes(reference, count, weights, kind):
    architecture = "vit_base_patch16_clip_224" if "clip" in reference else "resnet50"
    assert output(Source(reference, "timm", architecture, weights=weights), count) == kind


@pytest.mark.parametrize(
    ("settings", "kind", "count"),
    [
        ({"num_labels": 3}, "classes", 3),
        ({"num_labels": 1}, "regression", 1),
        ({"num_labels": 3, "problem_type": "regression"}, "regression", 3),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, "multi-label", 3),
    ],
)
def test_transformers_says_what_its_outputs_are(hf_folder, tmp_path, settings, kind, count):
    vit = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    folder = hf_folder("ViTForImageClassification", "ViTConfig", image_size=32, patch_size=8, **vit, **settings)
    teacher = load_teacher(f"hf:{folder}")
    student = load(save(convert(teacher), tmp_path / "out"))
    assert output_kind(student) == output_kind(teacher) == OutputKind(kind, count)
    wanted = {"multi-label": "multi_label_classification", "regression": "regression"}.get(kind)
    assert config_of(student).get("problem_type") == wanted
    # The same number of classes, of other weights: the names of the folder's are not theirs.
    named = dataclasses.replace(teacher, labels=("a", "b", "c")[:count])
    assert output_kind(named).names == ("a", "b", "c")[:count]


# ------------------------------------------------------------------------------------------------------ one's own names


@pytest.fixture(scope="module")
def five() -> Teacher:
    """Five classes without names."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=5, img_size=32).eval()
    teacher = load_teacher("timm:test_vit", pretrained=False, image_size=32)
    source = Source("timm:test_vit", "timm", "test_vit", {"num_classes": 5, "img_size": 32}, weights="random")
    return dataclasses.replace(teacher, model=model, source=source, labels=None, named_by="")


@pytest.fixture(scope="module")
def student(five) -> Student:
    return convert(five)


@pytest.mark.parametrize("given", ["file", "list"])
def test_names_of_ones_own_travel_with_the_student(five, tmp_path, given):
    (tmp_path / "names.txt").write_text("\ufeffoak\nash\n beech \nelm\noak\n\n", "utf-8")
    labels = tmp_path / "names.txt" if given == "file" else ["oak", "ash", "beech", "elm", "oak"]
    opened = load(save(convert(five, labels=labels), tmp_path / "out"))
    found = output_kind(opened)
    assert found.names == ("oak", "ash", "beech", "elm", "oak")
    assert found.named_by == ("--labels names.txt" if given == "file" else "labels")
    config = config_of(opened)
    assert config["pretrained_cfg"]["label_names"] == found.names and config["id2label"][2] == "beech"


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("a\nb\nc\nd\n", SourceError, "has 4 names, but timm:test_vit has 5 outputs"),
        ("a\n\nc\nd\ne\n", DataError, "line 2 is empty"),
        ("", DataError, "there are no names"),
        (None, DataError, "cannot be read"),
    ],
)
def test_names_that_do_not_fit_are_refused_before_anything_is_written(five, tmp_path, text, error, said):
    if text is not None:
        (tmp_path / "names.txt").write_text(text)
    with pytest.raises(error, match=said):
        convert(five, labels=tmp_path / "names.txt", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_features_have_no_names(five):
    headless = dataclasses.replace(five, model=timm.create_model("test_vit", num_classes=0))
    assert output_kind(headless) == OutputKind("features")
    with pytest.raises(SourceError, match="returns features, which have no names"):
        with_labels(headless, ["a"])


def test_a_record_with_other_names_than_outputs_is_refused(student, tmp_path):
    folder = save(student, tmp_path / "out")
    record = json.loads((folder / "bcosify.json").read_text())
    for change, said in [
        ({"labels": ["a"]}, "5 outputs and 1 names"),
        ({"labels": [1, 2, 3, 4, 5]}, "labels must be texts"),
        ({"output": "wine"}, "output one of classes"),
    ]:
        (folder / "bcosify.json").write_text(json.dumps({**record, **change}))
        with pytest.raises(CheckpointError, match=said):
            load(folder, check=False)


# ------------------------------------------------------------------------------------------------------ the same answer


def of_kind(student: Student, kind: str, count: int = 5, **more: Any) -> Student:
    if count != 5:
        torch.manual_seed(1)
        model = timm.create_model("test_vit", num_classes=count, img_size=32).eval()
        student = dataclasses.replace(student, model=model)
    return dataclasses.replace(student, output=kind, **more)


@pytest.mark.parametrize(
    ("kind", "count", "labels"),
    [
        ("classes", 5, None),
        ("multi-label", 5, tuple("abcde")),
        ("regression", 1, None),
        ("regression", 1, ("age",)),
        ("features", 5, None),
    ],
)
def test_cards_configurations_and_the_default_question_say_the_same(student, kind, count, labels):
    asked = of_kind(student, kind, count, labels=labels)
    question, config = ask(asked), config_of(asked)
    outputs = torch.tensor([[-3.0, -1.0, -2.0, -5.0, -4.0][:count]])
    scores, facts = question.target.scores(outputs), question.names(outputs)[0][0]
    lines = load_lines(asked, "me/model")
    if kind == "features":
        assert facts["label"] == "self" and task_of(asked) == "image-feature-extraction"
        assert "SelfTarget()" in lines["bcosify"] and config["architectures"] == ["BcosifyModel"]
        return
    best = int(outputs.argmax())
    assert float(scores) == float(outputs.max()) and facts["target"] == best
    names = {"classes": "class 1", "multi-label": "b", "regression": "age" if labels else "output"}
    assert facts["label"] == names[kind] and config["architectures"] == ["BcosifyForImageClassification"]
    assert config["num_classes"] == count and config.get("id2label") == (dict(enumerate(labels)) if labels else None)
    assert ("ClassTarget(0)" if kind == "regression" else "TopTarget()") in lines["bcosify"]


def test_a_head_that_was_replaced_by_hand_is_not_named_by_the_old_one(five):
    other = dataclasses.replace(five, model=timm.create_model("test_vit", num_classes=5, img_size=32).eval())
    other.model.head = nn.Linear(other.model.head.in_features, 7)
    question = ask(other)
    with torch.no_grad(), pytest.raises(TargetError, match="said to have 5 outputs, but it gives 7"):
        question.names(other.model(torch.zeros(1, 3, 32, 32)))


def test_what_an_output_is_in_words():
    assert str(OutputKind("classes", 1000, PLANTS, "its configuration")) == "1,000 classes, named by its configuration"
    assert str(OutputKind("regression", 1)) == "1 value (regression), without names"
    assert str(OutputKind("multi-label", 2)) == "2 labels (multi-label), without names"
    assert str(OutputKind("features")) == "features, no classes"


def test_own_weights_do_not_take_the_names_of_transformers_configuration(hf_folder, tmp_path):
    vit = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    names = {0: "tabby", 1: "dog", 2: "bus"}
    folder = hf_folder("ViTForImageClassification", "ViTConfig", image_size=32, patch_size=8, **vit, id2label=names)
    assert output_kind(load_teacher(f"hf:{folder}")).named_by == "its configuration (id2label)"
    own = load_teacher(f"hf:{folder}", weights=folder / "model.safetensors")
    assert output_kind(own) == OutputKind("classes", 3)


@pytest.mark.parametrize(("kind", "refused"), [("classes", False), ("multi-label", False), ("regression", True)])
def test_an_objective_of_classes_is_refused_where_there_are_none(student, kind, refused):
    phases: Any = SimpleNamespace(phases=[SimpleNamespace(objective="decisions")])
    asked = dataclasses.replace(student, output=kind)
    with (
        pytest.raises(RecipeError, match=r"objective decisions: .* decides on no classes") if refused else nullcontext()
    ):
        check_objectives(asked, phases)


def test_losses_of_transformers_door_are_those_of_the_kind():
    values = torch.tensor([[0.5], [2.0]])
    assert float(LOSSES["regression"](values, torch.tensor([0, 1]))) == pytest.approx((0.25 + 1) / 2)
    logits, labels = torch.tensor([[0.0, 0.0]]), torch.tensor([[1, 0]])
    assert float(LOSSES["multi-label"](logits, labels)) == pytest.approx(0.6931, abs=1e-4)
