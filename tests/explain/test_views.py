"""The mean over views is the mean of single explanations, moved back, and its ledger holds for the mean score."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from bcosify.cli.main import main
from bcosify.convert import convert, save, set_strength
from bcosify.core.errors import OptionError
from bcosify.explain import (
    ClassTarget,
    SelfTarget,
    TopTarget,
    Views,
    ZeroShotTarget,
    explain,
    explain_scores,
    explain_views,
)
from bcosify.explain.targets import settled
from bcosify.explain.views import views_of
from PIL import Image

from tiny import tiny_teacher

KINDS = [Views(4, "noise", seed=3), Views(5, "shift", 6), Views(2, "flip")]


@pytest.fixture(scope="module")
def models():
    """A CNN's teacher, and a student of it with carried biases."""
    teacher = tiny_teacher("test_resnet")
    student = convert(tiny_teacher("test_resnet"))
    set_strength(student.model, 1.2, 1.0, carry=0.5, window=3)
    return {"teacher": teacher.model.eval(), "student": student.model.eval()}


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("views", KINDS, ids=str)
@pytest.mark.parametrize("name", ["teacher", "student"])
def test_it_is_the_mean_of_single_explanations_and_balances(models, images, name, views):
    model = models[name]
    found = explain_views(model, images, TopTarget(2), views)
    target = ClassTarget(TopTarget(2).classes(model(images)))
    maps, scores, constants = [], [], []
    for pictures, rows, columns in views.of(images):
        assert torch.equal(pictures, images[..., rows, :][..., columns]) or views.kind == "noise"
        one = explain(model, pictures, target)
        moved = torch.zeros_like(one.contributions)
        for y, row in enumerate(rows.tolist()):
            for x, column in enumerate(columns.tolist()):
                moved[..., row, column] += one.contributions[..., y, x]
        maps.append(moved)
        scores.append(one.scores)
        constants.append(one.constant_part)
    assert len(maps) == views.count
    assert torch.allclose(found.contributions, torch.stack(maps).mean(0), rtol=1e-4, atol=1e-7)
    assert torch.allclose(found.scores, torch.stack(scores).mean(0), rtol=1e-5)
    assert torch.allclose(found.constant_part, torch.stack(constants).mean(0), rtol=1e-4, atol=1e-6)
    assert found.balanced(1e-4).all() and (found.direct is not None) == (name == "student")
    assert torch.allclose(found.input_part + found.constant_part, found.scores, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.outputs, model(images)) and found.encoded_inputs is None


def test_views_differ_begin_with_the_picture_and_are_the_same_again(images):
    for views in KINDS:
        first, second = ([picture for picture, _, _ in views.of(images)] for _ in range(2))
        assert torch.equal(first[0], images) and all(map(torch.equal, first, second))
        assert all(not torch.equal(one, images) for one in first[1:])
    spread = torch.stack([one - images for one, _, _ in Views(9, "noise", 0.5).of(images)][1:])
    assert float(spread.std()) == pytest.approx(0.5, rel=0.05)
    for _, rows, columns in Views(20, "shift", 3).of(images):
        assert int((rows - torch.arange(64)).abs().max()) <= 3 and int((columns - torch.arange(64)).abs().max()) <= 3


@pytest.mark.parametrize("target", [TopTarget(2), SelfTarget(), ZeroShotTarget(torch.eye(6)[:4], TopTarget(2))])
def test_a_settled_target_asks_the_same_of_these_outputs_and_one_thing_of_others(target):
    output, other = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1))
    fixed = settled(target, output)
    assert torch.allclose(fixed.scores(output), target.scores(output), atol=1e-6)
    # Nothing is chosen anew: each score of others is the score of what was chosen here.
    unit = torch.nn.functional.normalize(output)
    similarity = torch.nn.functional.normalize(other)[:, :4]  # the labels are the first four axes
    wanted = {
        TopTarget: lambda: other.gather(1, output.topk(2).indices),
        SelfTarget: lambda: (other * unit).sum(1, keepdim=True),
        ZeroShotTarget: lambda: similarity.gather(1, output[:, :4].topk(2).indices),
    }[type(target)]()
    assert torch.allclose(fixed.scores(other), wanted, atol=1e-6)
    assert not torch.allclose(fixed.scores(other), target.scores(other), atol=1e-3)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [(9, Views(9)), ("9", Views(9)), ("shift:5", Views(5, "shift")), ("flip", Views(2, "flip")), ("noise", Views(9))],
)
def test_views_in_words(given, wanted):
    assert views_of(given) == wanted


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (0, "at least 1; got 0"),
        ("0", "at least 1; got 0"),
        ("-3", "at least 1; got -3"),
        (True, "at least 1"),
        (2.5, "at least 1"),
        ("nois:3", "knows no 'nois'. Did you mean 'noise'"),
        ("noise:x", "must be a number, or noise:NUMBER"),
        ("flip:9", "2 views by flips"),
    ],
)
def test_what_are_no_views_is_refused(given, said):
    with pytest.raises(OptionError) as caught:
        views_of(given)
    assert said in caught.value.wrong["views"]


def test_the_command_records_the_views(tmp_path, capsys):
    student = save(convert(tiny_teacher("test_resnet")), tmp_path / "student")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    out = tmp_path / "maps"
    words = ["explain", str(student), str(tmp_path / "a.png"), "--views", "shift:3", "--out", str(out)]
    assert main([*words, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["views"] == {"count": 3, "kind": "shift", "size": None, "seed": 0}
    assert row["score"] == pytest.approx(row["input"] + sum(row["constants"].values()) + row["residual"], abs=1e-4)
    stored = np.load(out / "a.npz")
    assert stored["views"].shape == (3, 3, 64, 64) and stored["contributions"].sum() == pytest.approx(
        row["input"], 1e-4
    )
    plain = Image.open(out / "a.png").height
    assert main([*words, "--overwrite", "--views", "0"]) == 2 and (out / "a.npz").exists()
    assert main(["explain", str(student), str(tmp_path / "a.png"), "--views", "1", "--out", str(tmp_path / "one")]) == 0
    assert Image.open(tmp_path / "one" / "a.png").height < plain  # without the line that says of what it is the mean


def test_without_parts_the_map_is_the_same_and_what_is_carried_is_not_found_out(models, images):
    for model in models.values():
        whole, plain = (explain_scores(model, images, TopTarget(2), parts=parts) for parts in (True, False))
        assert plain.direct is None and not plain.carried and plain.balanced(1e-4).all()
        torch.testing.assert_close(plain.contributions, whole.contributions, atol=1e-6, rtol=1e-5)
    assert whole.direct is not None and whole.carried
