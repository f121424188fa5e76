"""The card: YAML that the hub's own parser takes, the numbers that were measured and no others, and what is missing."""

from __future__ import annotations

import dataclasses
import re
from importlib import resources

import jinja2.meta
import pytest
from bcosify.convert import load
from bcosify.convert.history import Alignment
from bcosify.convert.methods import METHODS
from bcosify.evaluate.record import Measurement, read_evaluation
from bcosify.evaluate.verdict import verdict
from bcosify.publish import card as cards
from bcosify.publish.card import Shown, card_of, load_lines, markdown, task_of, turned
from bcosify.publish.licences import Base, Licence
from huggingface_hub import HfApi, ModelCard

BASE, TERMS = (
    Base("timm:test_vit.r160_in1k", "timm/test_vit.r160_in1k", "apache-2.0", found="timm"),
    Licence("apache-2.0"),
)
RECIPE = {
    "image_size": 48,
    "batch_size": 4,
    "seed": 0,
    "phases": [
        {"objective": "block-local", "pictures": 40, "learning_rate": 0.02, "b": [1.0, 2.0], "beta": [0.0, 0.0]},
        {"objective": "end-to-end", "pictures": 60, "learning_rate": 0.0003},
    ],
}
# The same, with settings for an objective.
WITH_SETTINGS = {
    **RECIPE,
    "phases": [RECIPE["phases"][0], RECIPE["phases"][1] | {"objective": {"end-to-end": {"centre": True}}}],
}


@pytest.fixture(scope="module")
def made(student):
    return load(student)


@pytest.fixture
def evaluation(evaluated):
    return read_evaluation(evaluated())


def sections(card: ModelCard) -> dict[str, str]:
    parts = re.split(r"^##+ (.*)$", card.text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_the_header_is_what_the_hub_parses(made, evaluation, tmp_path):
    card_of(made, "org/name", BASE, TERMS, evaluation=evaluation).save(tmp_path / "README.md")
    facts = ModelCard.load(tmp_path / "README.md").data
    assert (facts.license, facts.base_model, facts.pipeline_tag) == ("apache-2.0", BASE.repo, "image-classification")
    assert facts.library_name == "bcosify" and {"bcosify", "bcos", "timm"} <= set(facts.tags)
    assert facts.model_name == "name"
    found = {(result.metric_type, result.metric_value): result for result in facts.eval_results}
    measured = [one for one in evaluation.measurements if one.value is not None]
    assert set(found) == {(one.metric, one.value) for one in measured}
    cosine = found["centred_cosine", 0.4321]
    assert cosine.metric_args == {"low": 0.4, "high": 0.5, "interval": "95 %", "n": 12}
    assert cosine.dataset_args == {"sha256 of the index": "d" * 64}


def test_the_hub_validates_it(made, evaluation, hub):
    card = card_of(made, "org/name", BASE, Licence("dinov3-license", "https://example.org"), evaluation=evaluation)
    HfApi(endpoint=hub.url)._validate_yaml(str(card), repo_type="model")
    assert "POST /api/validate-yaml" in hub.asked


def test_every_measurement_is_there_with_its_interval_and_no_other_number(made, evaluation):
    card = card_of(made, "org/name", BASE, TERMS, evaluation=evaluation)
    text = sections(card)
    assert "| centred cosine | 0.432 (0.400 to 0.500) | output | both |" in text["Fidelity: is it still its teacher?"]
    maps = text["Localisation: do its maps lie on the object?"]
    assert "| energy in mask (more is better) | 0.358 (0.300 to 0.400) | 0.247 (0.200 to 0.300) |" in maps
    assert "does not apply" not in maps and "no grids could be made" in card.text
    known = {f"{value:.3f}" for one in evaluation.measurements for value in (one.value, one.low, one.high) if value}
    tables = "".join(part for name, part in text.items() if "?" in name)
    assert set(re.findall(r"\d+\.\d+", tables)) <= known


def test_what_is_less_localised_than_its_teacher_is_said_so(made, evaluation):
    limits = sections(card_of(made, "org/name", BASE, TERMS, evaluation=evaluation))["Limits"]
    assert "do not lie on the object more than its teacher's" in limits and "0.247 (0.200 to 0.300)" in limits
    better = [
        dataclasses.replace(one, value=0.5) if (one.metric, one.model) == ("energy_in_mask", "student") else one
        for one in evaluation.measurements
    ]
    better = dataclasses.replace(evaluation, measurements=tuple(better))
    limits = sections(card_of(made, "org/name", BASE, TERMS, evaluation=better))["Limits"]
    assert "more than its teacher's" not in limits


@pytest.mark.parametrize(
    ("trained", "measured", "said"),
    [
        (64, 64, []),
        (48, 64, ["It was aligned on pictures of 48 px, but its preprocessing makes 64 px."]),
        (
            64,
            96,
            ["It was measured on pictures of 96 px, but its preprocessing makes 64 px: the figures here hold at 96"],
        ),
        (48, 48, ["aligned on pictures of 48 px", "the figures here hold at 48 px"]),
    ],
)
def test_the_card_names_the_size_that_was_measured(made, evaluated, trained, measured, said):
    evaluation = read_evaluation(evaluated(size=[measured, measured]))
    card = card_of(made, "org/name", BASE, TERMS, evaluation=evaluation, recipe={**RECIPE, "image_size": trained})
    limits = sections(card)["Limits"]
    assert limits.count("its preprocessing makes 64 px") == len(said)
    assert all(words in limits for words in said)


def test_more_on_the_object_than_its_teacher_needs_the_paired_interval(made, evaluation):
    gain = Measurement("localisation", "energy_in_mask_gain", "both", "explanation", "", 0.11, -0.02, 0.24, 7)
    for low, said in ((-0.02, True), (0.03, False)):
        row = dataclasses.replace(gain, low=low)
        better = [
            dataclasses.replace(one, value=0.5) if (one.metric, one.model) == ("energy_in_mask", "student") else one
            for one in evaluation.measurements
        ]
        card = card_of(
            made, "org/name", BASE, TERMS, evaluation=dataclasses.replace(evaluation, measurements=(*better, row))
        )
        assert ("not shown to lie on the object more than its teacher's" in sections(card)["Limits"]) is said
        assert "lie on the object better than its teacher's" in sections(card)["Measured"]
        assert ("are not shown to lie on the object better" in sections(card)["Measured"]) is said


def test_what_was_measured_opens_with_the_verdict(made, evaluated):
    contrast = Measurement(
        "localisation", "signed_contrast", "student", "explanation", "random class", 0.01, -0.02, 0.04, 7
    )
    agreement = Measurement("fidelity", "top1_agreement", "both", "", "", 0.8, 0.7, 0.9, 12)
    evaluation = read_evaluation(evaluated(agreement, contrast))
    measured = sections(card_of(made, "org/name", BASE, TERMS, evaluation=evaluation))["Measured"]
    assert measured.strip().startswith(f"**{verdict(evaluation)}**") and "Do not trust this student yet" in measured
    assert "80 % (70 to 90)" in measured and "not shown to differ between classes" in measured
    evil = dataclasses.replace(contrast, value=None, low=None, high=None, reason="<b>[x](https://evil.example)</b>")
    evaluation = read_evaluation(evaluated(agreement, evil))
    text = str(card_of(made, "org/name", BASE, TERMS, evaluation=evaluation))
    assert "<b>" not in text and "[x](https" not in text


def test_a_missing_evaluation_is_said_and_no_number_made_up(made):
    card = card_of(made, "org/name", BASE, TERMS)
    assert "**This model has not been evaluated.**" in sections(card)["Measured"]
    assert card.data.eval_results is None and "model-index" not in str(card)
    assert "It was not evaluated" in sections(card)["Limits"]
    assert not re.search(r"\d", sections(card)["Measured"])


def test_sections_that_were_not_measured_are_said(made, evaluated):
    only = read_evaluation(evaluated(Measurement("fidelity", "raw_cosine", "both", "", "output", 0.9, 0.8, 0.95, 12)))
    text = sections(card_of(made, "org/name", BASE, TERMS, evaluation=only))
    assert text["Localisation: do its maps lie on the object?"].strip() == "Not measured."
    assert text["Faithfulness: do its maps say what the score hangs on?"].strip() == "Not measured."


def test_alignment_and_recipe(made):
    aligned = made.with_history(alignment=Alignment(12345, pressure="B is 2."))
    how = sections(card_of(aligned, "org/name", BASE, TERMS, recipe=RECIPE, data="Nine photographs."))[
        "How it was made"
    ]
    assert "12,345 views" in how and "B is 2." in how and "Pictures: Nine photographs." in how
    assert "| 1 | block-local | 40 | 0.02 | b 1 → 2, beta 0 |" in how
    assert "| 2 | end-to-end | 60 | 0.0003 | as before |" in how and "At 48 px" in how
    assert (
        sections(card_of(aligned, "org/name", BASE, TERMS, recipe=WITH_SETTINGS, data="Nine photographs."))[
            "How it was made"
        ]
        == how
    )
    card = card_of(aligned, "org/name", BASE, TERMS)
    assert "recipe was not kept" in sections(card)["How it was made"]
    assert "not described by the publisher" in card.text
    assert "Not aligned" in sections(card_of(made, "org/name", BASE, TERMS))["How it was made"]


def test_aloes_patent_note_and_which_recipe_follows_them(made):
    aligned = made.with_history(alignment=Alignment(100))
    for student, recipe, said in (
        (aligned, RECIPE, "its end-to-end phase, too"),
        (aligned, WITH_SETTINGS, "its end-to-end phase, too"),
        (aligned, None, "is not recorded"),
        (made, None, "was not made with an end-to-end phase"),
    ):
        note = sections(card_of(student, "org/name", BASE, TERMS, recipe=recipe))["Licence"]
        assert "patent pending" in note and "`bcos/vit-aloe` follows their paper" in note and said in note
        assert "which is under **apache-2.0**" in note and "published under **apache-2.0**" in note


def test_the_explained_picture_and_its_ledger(made):
    row = {"score": 3.25, "input": 3.5, "constants": {"a": -1.25, "b": 1.0}, "residual": 1e-7}
    text = card_of(made, "org/name", BASE, TERMS, shown=Shown("tabby", row)).text
    assert "![Input, contributions, and the explanation of tabby](explanation.png)" in text
    assert "score 3.25 = 3.5 from the picture -0.25 from constants" in text
    assert "explanation.png" not in card_of(made, "org/name", BASE, TERMS).text


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_its_words(made, method):
    card = card_of(dataclasses.replace(made, method=method), "org/name", BASE, TERMS)
    assert METHODS[method].what in card.text
    assert all(paper.link in sections(card)["Citation"] for paper in METHODS[method].papers)


def test_the_template_asks_for_nothing_that_it_does_not_get(made, monkeypatch):
    template = resources.files("bcosify.model_cards").joinpath("template.md").read_text("utf-8")
    asked = jinja2.meta.find_undeclared_variables(jinja2.Environment().parse(template))
    given = {}
    monkeypatch.setattr(cards.ModelCard, "from_template", lambda *args, **facts: given.update(facts))
    card_of(made, "org/name", BASE, TERMS)
    assert asked <= {*given, "card_data"}
    assert set(given) - {"template_str"} <= asked


def test_doors_follow_the_library_and_the_output(made):
    assert task_of(made) == "image-classification"
    lines = load_lines(made, "org/name")
    assert 'read_picture("cat.png")' in lines["bcosify"] and "Image.open" not in "".join(lines.values())
    assert (
        list(lines) == ["bcosify", "timm", "transformers"]
        and "AutoModelForImageClassification" in lines["transformers"]
    )
    headless = dataclasses.replace(made, labels=None, model=made.model.reset_classifier(0) or made.model)
    assert (
        task_of(headless) == "image-feature-extraction"
        and "import AutoImageProcessor, AutoModel\n" in (load_lines(headless, "org/name")["transformers"])
    )
    tower = dataclasses.replace(made, source=dataclasses.replace(made.source, library="open_clip"), text=object())
    assert task_of(tower) == "zero-shot-image-classification" and "open_clip" in load_lines(tower, "org/name")


def test_tables_keep_their_cells(evaluation):
    from bcosify.evaluate.report.tables import method_tables

    table = method_tables(evaluation)["localisation"]
    flat = turned(table)
    assert len(flat.rows) == len(table.columns) - 2 and len(flat.columns) == len(table.rows) + 1
    assert [row[1] for row in flat.rows] == list(table.rows[0][2:])
    assert all(line.count("|") == markdown(flat).splitlines()[0].count("|") for line in markdown(flat).splitlines())
