"""Swaps travel with the model: no rule is asked when it is opened, ids outlive names, and wrong rows are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bcosify.convert import BcosConfig, CodaConfig, convert, load, plan_for, save
from bcosify.convert.history import History
from bcosify.convert.methods import dynamic_linear
from bcosify.convert.methods.dynamic_linear import FadingArguments, fading_bias
from bcosify.convert.plan import Decision, class_path
from bcosify.convert.schema_1 import history_of
from bcosify.convert.swaps import ALIASES, SWAPS, find_swap, swap
from bcosify.core.errors import CheckpointError, PlanError
from torch import nn

from folders import resigned
from regression_models import CONVNEXT, timm_teacher

GRN = "timm.layers.grn.GlobalResponseNorm"
ACTIVATION = "timm.layers.activations.GELU"


@pytest.fixture
def saved(tiny, tmp_path):
    """saved(NAME): a teacher, its student as it was saved, and the folder."""

    def make(name: str = "test_vit"):
        teacher = tiny(name)
        student = convert(teacher)
        return teacher, student, save(student, tmp_path / "student")

    return make


def record_of(folder: Path) -> dict:
    return json.loads((folder / "bcosify.json").read_text())


def test_a_folder_opens_when_a_rule_of_its_method_is_gone_or_new(tmp_path, monkeypatch):
    teacher = timm_teacher("convnextv2_atto", **CONVNEXT)
    student = convert(teacher)
    folder = save(student, tmp_path / "student")
    assert {GRN, ACTIVATION} <= {class_path(module) for module in teacher.model.modules()}
    pictures = torch.randn(2, 3, 32, 32)
    wanted = student.model(pictures)
    changes = {
        "gone": lambda patch: patch.delitem(dynamic_linear.RULES, GRN),
        "new": lambda patch: patch.setitem(
            dynamic_linear.RULES, ACTIVATION, lambda _: Decision(fading_bias, "new", FadingArguments())
        ),
    }
    for change in changes.values():
        with monkeypatch.context() as patch:
            change(patch)
            assert plan_for(teacher, BcosConfig()).swaps != student.plan.swaps
            opened = load(folder)
        assert opened.plan.swaps == student.plan.swaps and torch.equal(opened.model(pictures), wanted)
    assert plan_for(teacher, BcosConfig()).swaps == student.plan.swaps


def test_a_folder_opens_when_a_swap_has_another_id(saved, monkeypatch):
    _, student, folder = saved()
    old = SWAPS["bcos.linear"]
    monkeypatch.delitem(SWAPS, "bcos.linear")
    with pytest.raises(CheckpointError, match="no swap 'bcos.linear'.*Did you mean"):
        load(folder)
    monkeypatch.setitem(SWAPS, "bcos.dense", old)
    monkeypatch.setitem(ALIASES, "bcos.linear", "bcos.dense")
    pictures = torch.randn(2, 3, 64, 64)
    assert torch.equal(load(folder).model(pictures), student.model(pictures))


def test_no_class_is_named_in_the_swaps_of_a_folder(saved):
    _, student, folder = saved("test_efficientnet")
    record = record_of(folder)
    assert [(row["name"], row["swap"]) for row in record["swaps"]] == [
        (step.name, step.swap.id) for step in student.plan.swaps
    ]
    assert record["swaps"][0] == {
        "name": "conv_stem",
        "swap": "bcos.stem_conv2d",
        "args": {"standardised": False, "bounded": True},
    }
    text = json.dumps(record["swaps"])
    assert not any(entry.layer.__name__ in text for entry in SWAPS.values())


ROWS = {
    "id": ({"swap": "bcos.linaer"}, "no swap 'bcos.linaer'. Did you mean 'bcos.linear'"),
    "id of code": ({"swap": "os.system"}, "no swap 'os.system'"),
    "name": ({"name": "haed"}, "no module 'haed'.*Did you mean 'head'"),
    "twice": ({"name": "norm"}, "no module 'norm' that is still to be swapped"),
    "kind": ({"swap": "bcos.conv2d"}, "head is a Linear, not a Conv2d"),
    "missing argument": ({"args": {}}, "missing key args.bounded"),
    "unknown argument": ({"args": {"bounded": True, "b": 2}}, "unknown key args.b"),
    "argument of another kind": ({"args": {"bounded": "yes"}}, "args.bounded: must be bool"),
    "more": ({"code": "evil"}, "a swap has name, swap and args"),
    "no texts": ({"name": 3}, "a swap has name, swap and args"),
    "a constant that is none": (
        {"swap": "common.fading_bias", "args": {"constants": ["forward"]}},
        "Linear has no parameter or buffer 'forward' to fade",
    ),
}


@pytest.mark.parametrize("kind", ROWS)
def test_rows_that_cannot_be_carried_out_are_refused(saved, kind):
    _, _, folder = saved()
    change, said = ROWS[kind]
    rows = record_of(folder)["swaps"]
    assert rows[-1]["name"] == "head"
    with pytest.raises(CheckpointError, match=said):
        load(resigned(folder, swaps=[*rows[:-1], {**rows[-1], **change}]))


@pytest.mark.parametrize("rows", [["bcos"], [None], [[]]], ids=str)
def test_swaps_that_are_no_rows_are_refused(saved, rows):
    _, _, folder = saved()
    with pytest.raises(CheckpointError, match="a swap has name, swap and args"):
        load(resigned(folder, swaps=rows))


def test_ids_are_taken_once():
    with pytest.raises(ValueError, match="there is a swap 'bcos.linear' already"):
        swap("bcos.linear", nn.Linear)(lambda module, preprocess, given: None)
    with pytest.raises(PlanError, match="no swap 'coda.lin'. Did you mean 'coda.linear'"):
        find_swap("coda.lin")


def test_a_method_may_be_given_by_name(tiny):
    teacher = tiny()
    student = convert(teacher, "coda")
    assert student.config == CodaConfig() and student.plan.swaps == plan_for(teacher, CodaConfig()).swaps
    assert convert(teacher).config == BcosConfig()
    with pytest.raises(PlanError, match="no method 'codaa'. Did you mean 'coda'"):
        convert(teacher, "codaa")
    with pytest.raises(PlanError, match=r"dict is not the settings of a method. There are: BcosConfig \(bcos\)"):
        convert(teacher, {"scale": "cosine"})


def test_the_report_of_schema_1_becomes_a_history():
    report = {
        "identity_error": 1e-7,
        "teacher": [1.0, 2.0],
        "lossy_steps": [{"step": "identity", "cosine": 1.0}],
        "calibration": {"pictures": 8, "b": 1.5, "beta": 0.0, "layers": 3},
        "alignment": {"pictures": 80, "final": {"cosine": 0.5}, "curve": [{"cosine": 0.5}], "pressure": "B is 2"},
        "own": [1],
    }
    history = history_of(report)
    assert history.conversion.teacher == (1.0, 2.0) and history.conversion.lossy_steps[0]["step"] == "identity"
    assert history.calibration.strengths == {"b": 1.5, "beta": 0.0} and history.calibration.layers == 3
    assert history.alignment.curve == ({"cosine": 0.5},) and history.alignment.kept is None
    assert history.notes == {"own": [1]} and not history.unchanged and history_of({}) == History()
    assert History.from_json(json.loads(json.dumps(history.to_json()))) == history
    with pytest.raises(ValueError, match="unknown key history.calibrated"):
        History.from_json({"version": 1, "calibrated": True})
