"""A method is one folder and a line: nothing else has to know of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bcosify.align.checks import choose_recipe
from bcosify.cli.main import main
from bcosify.convert import convert, load, set_strength
from bcosify.convert.layers import Scheduled, at_start, convert_in_place
from bcosify.convert.methods import METHODS, register
from bcosify.convert.plan import Decision, Method, Paper
from bcosify.convert.swaps import SWAPS, swap
from bcosify.core.errors import PlanError
from bcosify.core.pictures import noise_pictures
from bcosify.explain import TopTarget, explain
from torch import Tensor, nn

# ---------------------------------------------------------------------------------- what would be the method's folder


@dataclasses.dataclass(frozen=True)
class QuietConfig:
    """Settings of the toy: modules to keep, and whether the classifier is left as it is."""

    keep: tuple[str, ...] = ()
    classifier: bool = True


class QuietLinear(Scheduled):
    """Mixin over a linear layer: its response is divided by 1 + dampening."""

    strength_names = ("dampening",)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / (1 + self._strength("dampening"))  # type: ignore[misc]


def _decide(name: str, module: nn.Module, model: nn.Module, seen: None, config: QuietConfig) -> Decision | None:
    if not isinstance(module, nn.Linear):
        return None
    if name == "head" and not config.classifier:
        return Decision(None, "the classifier is kept")
    return Decision(SWAPS["quiet.linear"], "linear")


QUIET = Method(
    name="quiet",
    config_class=QuietConfig,
    decide=_decide,
    ends=lambda config: {"dampening": 1.0},
    look=lambda model, size: None,
    title="Quiet",
    what="Its linear layers respond more quietly.",
    papers=(Paper("On Quiet", "Nobody", "2026", "https://example.org/quiet"),),
    hint="quieter layers",
    recipes=("smoke",),
)

# --------------------------------------------------------------------------------------------------------- the line


@pytest.fixture
def quiet() -> Iterator[Method]:
    swap("quiet.linear", QuietLinear, nn.Linear)(
        lambda module, preprocess, given: convert_in_place(module, QuietLinear)
    )
    register(QUIET)
    yield QUIET
    del METHODS["quiet"], SWAPS["quiet.linear"]


@pytest.fixture
def folder(quiet, tmp_path, capsys) -> Path:
    """What `bcosify convert --method quiet` writes."""
    words = ("convert", "timm:test_vit", "--no-pretrained", "--image-size", "64", "--method", "quiet", "--json")
    assert main([*words, "--out", str(tmp_path / "student")]) == 0
    assert json.loads(capsys.readouterr().out)["method"] == "quiet"
    return tmp_path / "student"


def test_it_is_saved_loaded_moved_and_explained(folder):
    student = load(folder)
    assert student.method == "quiet" and student.config == QuietConfig() and at_start(student.model)
    record = json.loads((folder / "bcosify.json").read_text())
    assert {row["swap"] for row in record["swaps"]} == {"quiet.linear"}
    pictures = noise_pictures(2, student.preprocess.size)
    before = student.model(pictures)
    set_strength(student.model, dampening=1.0)
    assert not torch.allclose(student.model(pictures), before)
    found = explain(student.model, pictures, TopTarget())  # raises where its ledger does not balance
    assert found.contributions.shape[0] == 2


def test_its_settings_are_the_commands(quiet, tmp_path, capsys):
    words = ("convert", "timm:test_vit", "--no-pretrained", "--image-size", "64", "--method", "quiet", "--dry-run")
    assert main([*words, "--set", "classifier=false", "--json"]) == 0
    steps = {row["name"]: row["becomes"] for row in json.loads(capsys.readouterr().out)["steps"]}
    assert steps["head"] is None and "QuietLinear" in steps.values()


def test_help_card_and_recipe_know_it(folder, tmp_path, capsys):
    assert choose_recipe(load(folder)) == "smoke"
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    assert "`quiet` (quieter layers)" in " ".join(capsys.readouterr().out.split())
    words = ("publish", str(folder), "lab/quiet", "--dry-run", "--out", str(tmp_path / "staged"))
    assert main([*words, "--license", "mit", "--license-link", "https://opensource.org/license/mit"]) == 0
    card = (tmp_path / "staged" / "README.md").read_text()
    assert QUIET.what in card and "https://example.org/quiet" in card and "| Quiet (`quiet`) |" in card


def test_it_is_found_by_name_and_by_its_settings(quiet, tiny):
    teacher = tiny("test_vit")
    assert convert(teacher, "quiet").method == convert(teacher, QuietConfig()).method == "quiet"
    with pytest.raises(PlanError, match="no method 'quite'. Did you mean 'quiet'"):
        convert(teacher, "quite")
    with pytest.raises(ValueError, match="quiet"):
        register(QUIET)
