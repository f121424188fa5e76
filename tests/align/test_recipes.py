"""Recipes as files: ranges, all faults at once, older forms, and what is no recipe."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from bcosify.align.recipe import Phase, difference, dump, from_values, list_recipes, load_recipe, saved_recipe
from bcosify.core.errors import RecipeError

from runs import RECIPE

WRONG = {
    "workers=-1": "workers: must be between 0 and 1024; got -1",
    "log_every=0": "log_every: must be at least 1; got 0",
    "accumulate=0": "accumulate: must be at least 1; got 0",
    "seed=-1": "seed: must be at least 0",
    "flip=2": "flip: must be between 0 and 1; got 2",
    "batch_size=0": "batch_size: must be at least 1; got 0",
    "image_size=100000": "image_size: must be between 1 and 8192; got 100000",
    "max_bad=-1": "max_bad: must be between 0 and 1; got -1",
    "average=2": "average: must be at least 0 and below 1; got 2",
    "crop_scale=[0,0]": "crop_scale.0: must be above 0 and at most 1; got 0",
    "held_out=1": "held_out: must be at least 2; got 1",
    "betas=[0.9,1]": "betas.1: must be at least 0 and below 1; got 1",
    "phases.0.b=[0,0]": "phases.0.b.0: must be at least 1; got 0",
    "phases.0.pictures=0": "phases.0.pictures: must be at least 1; got 0",
    "phases.0.warmup=3": "phases.0.warmup: must be between 0 and 1; got 3",
    "phases.0.clip=.nan": "phases.0.clip: must be above 0; got nan",
    "phases.0.pressure=1": "unknown key phases.0.pressure",
    "depths=[]": "phases.1.objective.end-to-end.depths: must have from 1 to 1000 depths; got 0",
    "phases.1.objective.end-to-end.map_share=0": "map_share: must be above 0 and at most 1; got 0",
}


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(RecipeError) as found:
        load_recipe("smoke", list(WRONG))
    lines = str(found.value).splitlines()
    assert all(any(said in line for line in lines) for said in WRONG.values())
    for said in ("average: must be at least 0 and below 1; got nan",):
        with pytest.raises(RecipeError, match=said):
            load_recipe("smoke", ["average=.nan"])
    with pytest.raises(RecipeError, match="phases: must have from 1 to 100 phases; got 0"):
        load_recipe("smoke", ["phases=[]"])


def test_a_recipe_made_in_python_has_the_same_ranges():
    with pytest.raises(RecipeError, match="phases.0.ramps.b: must not fall from one value to the next"):
        dataclasses.replace(RECIPE, phases=(Phase("end-to-end", 8, 1e-3, ramps={"b": (0.8, 0.2)}),))
    with pytest.raises(RecipeError, match="mixup, cutmix: a batch is mixed in one way"):
        dataclasses.replace(RECIPE, mixup=0.7, cutmix=0.7)


@pytest.mark.parametrize("name", list_recipes())
def test_what_ships_is_read_without_a_word_and_written_as_it_is(name, recwarn):
    recipe = load_recipe(name)
    assert not recwarn.list and from_values(yaml.safe_load(dump(recipe))) == recipe


FLAT = {
    "pressure": "p",
    "image_size": 64,
    "batch_size": 4,
    "phases": [
        {"objective": "block-local", "pictures": 8, "learning_rate": 1e-3},
        {"objective": {"end-to-end": {"output_weight": 2.0}}, "pictures": 8, "learning_rate": 1e-3},
        {"objective": "end-to-end", "pictures": 8, "learning_rate": 1e-3},
    ],
}


def test_settings_beside_the_phases_are_read_into_them_and_said(tmp_path):
    """Those of a phase come first; one word names the keys, and the form that they have now."""
    older = {**FLAT, "centre": True, "output_weight": 3.0, "depths": [1 / 3, 2 / 3, 1.0], "anchor": 0.2}
    (tmp_path / "older.yaml").write_text(yaml.safe_dump(older))
    with pytest.warns(UserWarning) as said:
        recipe = load_recipe(tmp_path / "older.yaml")
    assert [phase.settings for phase in recipe.phases] == [
        {},
        {"centre": True, "output_weight": 2.0},
        {"centre": True, "output_weight": 3.0},
    ]
    (line,) = [str(one.message) for one in said]
    for words in ("centre, ", "output_weight", "phases.2: objective: {end-to-end: {centre: true, output_weight: 3.0}}"):
        assert words in line
    assert line.endswith("(no phase takes anchor)") and "\n" not in line
    # The same file in the new form is the same recipe.
    (tmp_path / "newer.yaml").write_text(dump(recipe))
    assert load_recipe(tmp_path / "newer.yaml") == recipe


def test_what_is_typed_last_comes_first(tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(FLAT))
    with pytest.warns(UserWarning, match="output_weight: settings of an objective"):
        flat = load_recipe(tmp_path / "recipe.yaml", ["output_weight=5"])
    assert [phase.settings.get("output_weight") for phase in flat.phases] == [None, 5.0, 5.0]
    inside = load_recipe(tmp_path / "recipe.yaml", ["phases.2.objective.end-to-end.centre=true"])
    assert inside.phases[2].settings == {"centre": True}
    with pytest.raises(RecipeError, match="no place 'phases.2.objective.pairwise.centre'"):
        load_recipe(tmp_path / "recipe.yaml", ["phases.2.objective.pairwise.centre=true"])


@pytest.mark.parametrize("schema", ["1", "2"])
def test_recipes_that_runs_of_before_wrote_are_read_without_a_word(schema, recwarn):
    """A resumed run compares them with what is asked now."""
    path = Path(__file__).resolve().parents[1] / "regression" / schema / "run/out.run/recipe.yaml"
    older = saved_recipe(path)
    assert not recwarn.list and not difference(older, from_values(yaml.safe_load(dump(older))))
    values = yaml.safe_load(path.read_text())
    assert difference(older, from_values({**values, "depths": [1.0]}))


def test_how_a_run_is_computed_may_change_and_what_may_not():
    assert not difference(RECIPE, dataclasses.replace(RECIPE, workers=3, max_bad=0.5, accumulate=2))
    assert "+flip: 0.1" in difference(RECIPE, dataclasses.replace(RECIPE, flip=0.1))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"pressure: \xff\xfe", "can't decode byte"),
        (b"[" * 3000, "is not YAML: it is nested"),
        (b"phases: &p [*p]", "is not YAML: a value holds itself"),
        (b"- 1\n- 2", "must be keys and values"),
        (b"3", "must be keys and values"),
        (b"", "must be keys and values; got None"),
        (b"pressure: 2020-13-45", "is not YAML: month"),
        (b"phases: {0: 1}", "phases: must be a list"),
        (b"phases: [1, null, [2]]", "phases.0: must be keys and values; got 1"),
        (b"phases: [{objective: {1: {}}}]", "phases.0.objective: must be str"),
        (b"phases: [{objective: {end-to-end: [1]}}]", "end-to-end: must be keys and values"),
        (b"phases: [{objective: {end-to-end: {1: 2}}}]", "unknown key phases.0.objective.end-to-end.1"),
        (b"\"\\e[31mred\": 1", r"unknown key '\\x1b\[31mred'"),
    ],
)  # fmt: skip
def test_what_is_no_recipe_is_said_in_lines(tmp_path, data, said):
    (tmp_path / "recipe.yaml").write_bytes(data)
    with pytest.raises(RecipeError, match=said):
        load_recipe(tmp_path / "recipe.yaml")
    for name in (tmp_path, "x" * 5000, "a\0b"):
        with pytest.raises(RecipeError, match="recipe"):
            load_recipe(name)
