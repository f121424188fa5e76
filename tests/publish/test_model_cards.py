"""The cards in model_cards/: what the tool makes of the evaluation beside them, and nothing that a hand wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
from bcosify.evaluate.record import read_evaluation
from bcosify.evaluate.report.tables import fidelity_table, method_tables
from bcosify.publish.card import markdown, turned
from bcosify.publish.staging import _check_card, _check_paths
from huggingface_hub import ModelCard

CARDS = sorted(path.parent for path in (Path(__file__).resolve().parents[2] / "model_cards").glob("*/README.md"))


def test_both_real_models_have_one():
    assert {folder.name for folder in CARDS} >= {"bcos-efficientnet-lite0", "bcos-dinov2-small"}


@pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
def test_a_card_says_what_its_evaluation_says(folder):
    evaluation, card = read_evaluation(folder), ModelCard.load(folder / "README.md")
    tables = method_tables(evaluation)
    for table in (fidelity_table(evaluation), turned(tables["localisation"]), turned(tables["faithfulness"])):
        assert markdown(table) in card.text
    results = {(result.metric_type, result.metric_value) for result in card.data.eval_results}
    assert results == {(one.metric, one.value) for one in evaluation.headlines().values()}


@pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
def test_a_card_is_whole_and_names_no_place(folder):
    _check_card(folder / "README.md")
    _check_paths(folder)
    names = {path.name for path in folder.iterdir()}
    assert names == {"README.md", "evaluation.json", "explanation.png", "recipe.yaml"}
    text = (folder / "README.md").read_text()
    assert "patent pending" in text and "](explanation.png)" in text and "**apache-2.0**" in text
