"""What the demo says of a photograph is true: sums add up, regions are erased as written, the page works."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import skimage.data
import torch
from bcosify.align import load_recipe
from bcosify.convert import load
from bcosify.convert.layers import strength_spans
from bcosify.convert.output import output_kind
from bcosify.core.errors import CheckpointError, DataError
from bcosify.demo.photographs import ABSENT, CELLS, Models, _absent, show
from bcosify.demo.verb import STUDENT, Demonstration
from bcosify.evaluate.report import data_url, render_page
from PIL import Image

import bcosify

from browser import in_browser
from exif import encoded

SIDE = 64


@pytest.fixture(scope="module")
def student():
    found = load(STUDENT)
    return dataclasses.replace(found, preprocess=found.preprocess.at(SIDE))


@pytest.fixture(scope="module")
def shown(student):
    """Facts and pictures of a cup of coffee, seen at a small size."""
    return show("coffee.png", Image.fromarray(skimage.data.coffee()), Models.of(student))


def test_ledgers_add_up(shown):
    for ledger in shown[0].ledgers:
        total = ledger.pixels_for + ledger.pixels_against + ledger.constants + ledger.residual
        assert total == pytest.approx(ledger.score, abs=1e-3)
        assert ledger.pixels_for > 0 >= ledger.pixels_against
        both = ledger.direct + ledger.carried
        assert both == pytest.approx(ledger.pixels_for + ledger.pixels_against, abs=1e-3)


def test_shares_of_regions_are_those_of_the_ledger(shown):
    """Cells add up to any rectangle of them, and all of them to the input's part."""
    regions, ledger = {region.box: region.share for region in shown[0].regions}, shown[0].ledgers[0]
    assert len(regions) == (CELLS * (CELLS + 1) // 2) ** 2
    whole = regions[0, 0, CELLS, CELLS]
    assert whole + ledger.constants == pytest.approx(ledger.score, abs=1e-3)
    cells = [regions[left, top, left + 1, top + 1] for left in range(CELLS) for top in range(CELLS)]
    assert sum(cells) == pytest.approx(whole, abs=1e-3)
    assert regions[0, 0, 2, 1] == pytest.approx(regions[0, 0, 1, 1] + regions[1, 0, 2, 1], abs=1e-3)


def test_a_region_is_erased_as_it_is_written(shown, student):
    left, top, right, bottom = box = (1, 2, 3, 4)
    region = next(region for region in shown[0].regions if region.box == box)
    picture = student.preprocess.transform()(Image.fromarray(skimage.data.coffee()))[None]
    cell = SIDE // CELLS
    picture[:, :, top * cell : bottom * cell, left * cell : right * cell] = 0  # the mean colour
    with torch.no_grad():
        output = student.model(picture)[0]
    names = {label: number for number, label in enumerate(student.labels)}
    assert float(output[names[shown[0].ledgers[0].label]]) == pytest.approx(region.erased, rel=1e-4)
    assert region.decides == student.labels[int(output.argmax())]


def test_the_live_part_trains_the_student_where_it_is():
    recipe, spans = load_recipe("demo"), strength_spans(load(STUDENT).model)
    (phase,) = recipe.phases
    for name in ("b", "beta", "carry"):
        assert getattr(phase, name) == pytest.approx(spans[name], abs=1e-6)
    assert phase.window == spans["window"][0]


def test_the_class_maps_decide_as_the_teacher(shown):
    theirs, ours = shown[0].teacher, shown[0].class_maps
    assert (ours.label, ours.second) == (theirs.label, theirs.second)
    assert ours.probability == pytest.approx(theirs.probability, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "content"),
    [("text.jpg", b"no picture"), ("cut.png", encoded(Image.new("RGB", (64, 64)), "PNG")[:60])],
)
def test_a_photo_that_is_no_picture_is_refused_before_anything_is_written(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name} is no picture that can be read"):
        bcosify.demo(tmp_path / "out", photo=str(tmp_path / name))
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(CheckpointError, match="not written by this command"):
        bcosify.demo(tmp_path / "out", overwrite=True)


CHECK = """
<script>
window.onerror = (message) => { document.body.dataset.errors = message; };
window.addEventListener("load", () => {
  const board = document.querySelector(".board"), said = document.querySelector("[aria-live]");
  const state = document.body.dataset;
  state.first = said.textContent;
  const place = board.getBoundingClientRect();
  const at = (x, y) => ({
    clientX: place.left + x * place.width, clientY: place.top + y * place.height, pointerId: 1, bubbles: true,
  });
  board.setPointerCapture = () => {};
  board.dispatchEvent(new PointerEvent("pointerdown", at(0.01, 0.01)));
  board.dispatchEvent(new PointerEvent("pointermove", at(0.99, 0.99)));
  board.dispatchEvent(new PointerEvent("pointerup", at(0.99, 0.99)));
  state.whole = said.textContent;
  board.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft", shiftKey: true, bubbles: true }));
  state.keys = said.textContent;
  state.wide = document.documentElement.scrollWidth > window.innerWidth;
});
</script>
"""


def test_the_page_in_a_browser(shown, tmp_path):
    """Dragging over the whole picture says the input's part of the score; arrow keys change the region."""
    facts, tiles = shown
    facts = dataclasses.replace(facts, name='<b>"it\'s" & coffee</b>')
    made = Demonstration(
        STUDENT, "teacher", "words", 1.5, "64 x 64 pixels", (facts,), 0.0, [], 4, 1, Path("report.html")
    )
    pictures = [{key: data_url(tile, "JPEG") for key, tile in tiles.items()}]
    page = render_page("demo.html", **vars(made), pictures=pictures, titles={}, cells=CELLS)
    assert facts.name not in page and not re.search(r"(src|href)=.(?!data:)", page)
    found = in_browser(page, CHECK, tmp_path, 400)
    ledger = facts.ledgers[0]
    whole = next(region for region in facts.regions if region.box == (0, 0, CELLS, CELLS))
    assert "errors" not in found and found["wide"] == "false"
    said = re.match(r"This region adds (\S+) of (\S+) to (.*?)\. Without it the score is (\S+):", found["whole"])
    assert said is not None and said[3] == ledger.label
    assert [float(said[k]) for k in (1, 2, 4)] == pytest.approx([whole.share, ledger.score, whole.erased], abs=0.006)
    assert len({found["first"], found["whole"], found["keys"]}) == 3


def test_a_class_that_either_model_sees_is_not_called_absent(shown, student):
    assert shown[0].absent.label == ABSENT[0]
    names = output_kind(student)
    outputs = torch.zeros(2, names.count)
    outputs[0, names.names.index(ABSENT[0])] = outputs[1, names.names.index(ABSENT[1])] = 9
    assert names.name(_absent(outputs, names)) == ABSENT[2]
