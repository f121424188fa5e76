"""The whole: what is measured, what is said not to apply, the record, and the page in a browser."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re

import numpy as np
import pytest
import torch
from bcosify.convert import BcosConfig, convert, set_strength
from bcosify.convert.output import OutputKind
from bcosify.convert.randomise import randomise
from bcosify.core.errors import DataError
from bcosify.core.pictures import noise_pictures
from bcosify.evaluate import metrics, registry, suite
from bcosify.evaluate.baselines import CONTROLS
from bcosify.evaluate.contrast import OTHERS
from bcosify.evaluate.metrics import perturbation
from bcosify.evaluate.record import FILE, Measurement, read_evaluation
from bcosify.evaluate.report import gallery_of, report_page
from bcosify.evaluate.report.report import SAME
from bcosify.evaluate.report.tables import comparison, method_tables
from bcosify.evaluate.suite import Pictures, Settings
from PIL import Image

from browser import in_browser
from tiny import tiny_teacher

METHODS = (("teacher", "input-x-gradient"), ("teacher", "rollout"))
QUICK = Settings(METHODS, grids=1, confident=0.0, subsets=2, cascade_pictures=2, cascade_steps=2)

CLASSES = OutputKind("classes", 1000)


def pictures(count: int = 9, **more) -> Pictures:
    masks = torch.zeros(count, 64, 64)
    masks[:, 16:48, 8:40] = 1
    images = noise_pictures(count, (64, 64), seed=3)
    return Pictures(images, tuple(f"p{i}" for i in range(count)), **{"masks": masks, **more})


@pytest.fixture(scope="module")
def pair(tiny_subject):
    """pair(NAME): teacher and student of a tiny model, the student away from the teacher."""

    def make(name: str = "test_vit"):
        teacher = tiny_teacher(name)
        student = convert(teacher, BcosConfig())
        set_strength(student.model, 1.5, 0.5)
        ours = tiny_subject(name, model=student.model, name="student")
        return tiny_subject(name, model=teacher.model), ours

    return make


@pytest.fixture(scope="module")
def measured(pair):
    return suite.evaluate_subjects(*pair(), pictures(), pictures(), QUICK, progress=False)


def test_every_metric_is_there_with_an_interval_or_a_reason(measured):
    evaluation, explained = measured
    controls = {("teacher", name) for name in CONTROLS}
    assert set(explained.maps) == {("teacher", "explanation"), ("student", "explanation"), *METHODS, *controls}
    found = {(one.section, one.metric) for one in evaluation.measurements}
    assert {
        *(("fidelity", m) for m in ("raw_cosine", "centred_cosine", "linear_cka", "neighbour_agreement", "kl")),
        *(("fidelity", m) for m in ("top1_agreement", "top5_agreement", "dense_agreement")),
        *(("probes", m) for m in ("knn", "linear_probe", "zero_shot")),
        *(("faithfulness", m) for m in ("ledger_residual", "bias_share", "deletion_auc", "insertion_auc")),
        *(("faithfulness", m) for m in ("removed_most_25", "removed_least_25", "average_drop", "average_gain")),
        *(("faithfulness", m) for m in ("increase", "sensitivity_n", "infidelity", "scaled_infidelity", "randomised")),
        *(("localisation", m) for m in ("energy_in_mask", "pointing_game", "gridpg", "mask_area")),
    } <= found
    for one in evaluation.measurements:
        if one.reason:
            assert one.value is None
        else:
            assert one.value is not None and one.low is not None and one.high is not None and one.n > 0
            assert one.low - 1e-6 <= one.value <= one.high + 1e-6
    residual = evaluation.find("ledger_residual", "student", "explanation")
    assert residual is not None and residual.value is not None and residual.value < 1e-4
    area = evaluation.find("mask_area", "both")
    assert area is not None and area.value == pytest.approx(0.25)
    assert {step.step.split(":")[0] for step in evaluation.seconds} >= {"fidelity", "maps", "removal curves"}


def test_the_same_seed_gives_the_same_numbers_and_batches_do_not_matter(pair, measured):
    teacher, student = (dataclasses.replace(subject, batch_size=5) for subject in pair())
    again, _ = suite.evaluate_subjects(teacher, student, pictures(), pictures(), QUICK, progress=False)
    equal = []
    for one, other in zip(measured[0].measurements, again.measurements, strict=True):
        assert dataclasses.replace(one, value=0, low=0, high=0) == dataclasses.replace(other, value=0, low=0, high=0)
        assert (one.value is None) == (other.value is None)
        if one.value is not None:
            equal.append(one.value == pytest.approx(other.value, rel=1e-4, abs=1e-5))
            # Curves go by the order of contributions, where almost equal ones may swap by rounding.
            assert one.value == pytest.approx(other.value, rel=0.05, abs=0.02), one.metric
    assert sum(equal) > 0.9 * len(equal)


def test_the_record_reads_back_as_it_was_written(measured, tmp_path):
    evaluation, _ = measured
    evaluation.write(tmp_path)
    again = read_evaluation(tmp_path)
    assert json.loads(json.dumps(dataclasses.asdict(again))) == json.loads(json.dumps(dataclasses.asdict(evaluation)))
    assert again.measurements == evaluation.measurements and again.curves == evaluation.curves
    assert {"centred_cosine", "energy_in_mask", "deletion_auc", "insertion_auc"} <= set(again.headline())


def test_a_stopped_evaluation_goes_on_where_it_was(pair, measured, tmp_path, monkeypatch):
    """Stopped in the student's curve: what came before is on disk, is not done again, and the numbers are the same."""
    facts = {"model": {"weights": "w"}, "progress": False, "work": tmp_path / "work"}
    removal_outputs, features_of = perturbation.removal_outputs, suite.features_of

    def stop(subject, *more, **options):
        if subject.name == "student":
            raise KeyboardInterrupt
        return removal_outputs(subject, *more, **options)

    monkeypatch.setattr(perturbation, "removal_outputs", stop)
    with pytest.raises(KeyboardInterrupt):
        suite.evaluate_subjects(*pair(), pictures(), pictures(), QUICK, **facts)
    kept = read_evaluation(tmp_path / "work")
    assert kept.find("deletion_auc", "teacher", "explanation")
    assert kept.find("deletion_auc", "student", "explanation") is None
    monkeypatch.setattr(perturbation, "removal_outputs", removal_outputs)
    monkeypatch.setattr(suite, "features_of", lambda *_: pytest.fail("fidelity was done before"))
    evaluation, explained = suite.evaluate_subjects(*pair(), pictures(), pictures(), QUICK, **facts)
    assert evaluation.seconds[: len(kept.seconds)] == kept.seconds
    assert [step.step for step in evaluation.seconds] == [step.step for step in measured[0].seconds]
    assert evaluation.measurements == measured[0].measurements and evaluation.curves == measured[0].curves
    for key, maps in measured[1].maps.items():
        assert torch.equal(explained.maps[key], maps)
    # Other weights are another evaluation: nothing is taken over.
    monkeypatch.setattr(suite, "features_of", features_of)
    other, _ = suite.evaluate_subjects(*pair(), pictures(), pictures(), QUICK, **{**facts, "model": {"weights": "v"}})
    assert other.seconds != evaluation.seconds and other.measurements == evaluation.measurements


NEW = """
from bcosify.core.errors import NotApplicable
from bcosify.evaluate.registry import metric

@metric("positive_share", "faithfulness", -1, needs="maps", title="positive SHARE")
def positive_share(task, model, method):
    if model == "student":
        raise NotApplicable("only the teacher's")
    return (task.maps[model, method] > 0).float().mean((1, 2))
"""


def test_a_new_metric_is_one_file(pair, tmp_path, monkeypatch):
    """It is measured, kept as a step, and shown under its title the best marked where it is clear."""
    (tmp_path / "positive.py").write_text(NEW)
    registry.all_metrics()
    monkeypatch.setattr(metrics, "__path__", [*metrics.__path__, str(tmp_path)])
    monkeypatch.setattr(registry, "METRICS", dict(registry.METRICS))
    monkeypatch.setattr(registry, "STEPS", list(registry.STEPS))
    registry.load_all.cache_clear()
    evaluation, explained = suite.evaluate_subjects(*pair(), pictures(), pictures(), QUICK, progress=False)
    one = evaluation.find("positive_share", "teacher", "explanation")
    expected = (explained.maps["teacher", "explanation"] > 0).float().mean()
    assert one is not None and one.value == pytest.approx(float(expected))
    absent = evaluation.find("positive_share", "student", "explanation")
    assert absent is not None and absent.value is None and absent.reason == "only the teacher's"
    assert "positive share: teacher, explanation" in [step.step for step in evaluation.seconds]
    table = method_tables(evaluation)["faithfulness"]
    (column,) = (number for number, (name, _) in enumerate(table.columns) if name == "positive SHARE")
    assert table.columns[column][1] == "less is better"
    values = [row[column] for row in table.rows if row[0].text == "teacher" and row[column].order != ""]
    ones = [one for one in evaluation.measurements if one.metric == "positive_share" and one.value is not None]
    lowest, *rest = sorted(ones, key=lambda one: one.value)
    clear = all(lowest.high < one.low for one in rest)
    assert [cell.best for cell in values] == [clear and cell.order == lowest.value for cell in values]


def test_two_metrics_of_one_name_are_refused():
    assert "kl" in registry.all_metrics()
    with pytest.raises(ValueError, match="two metrics are called 'kl'"):
        registry.measures(registry.Metric("kl", "fidelity"), needs="features", place=0)(lambda *_: ())


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (None, "there is no such evaluation"),
        ("{", "is not JSON"),
        ("[]", "schema list"),
        ('{"schema": 2}', "schema 2; this version reads 1"),
        ('{"schema": 1, "measurements": [{"what": 1}], "curves": [], "seconds": []}', "no evaluation of schema 1"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path, written, said):
    if written is not None:
        (tmp_path / FILE).write_text(written)
    with pytest.raises(DataError, match=said):
        read_evaluation(tmp_path)


# ------------------------------------------------------------------------------------------------------- bad input


def test_what_does_not_apply_is_said_and_is_no_zero(pair):
    """A CNN has no attention, these pictures no masks and no labels."""
    evaluation, explained = suite.evaluate_subjects(
        *pair("test_resnet"), pictures(masks=None), pictures(4, masks=None), QUICK, progress=False
    )
    assert ("teacher", "rollout") not in explained.maps
    reasons = {(one.metric, one.method): one.reason for one in evaluation.measurements if one.reason}
    assert "no attention" in reasons["maps", "rollout"]
    assert "pass --masks" in reasons["energy_in_mask", "explanation"]
    assert "pass --labels" in reasons["knn", ""]
    shown = method_tables(evaluation)["faithfulness"]
    row = next(cells for cells in shown.rows if cells[1].text == "rollout")
    assert {cell.text for cell in row[2:]} == {"does not apply"} and "no attention" in row[2].note


def test_one_picture_has_no_interval_and_nothing_to_compare_with(pair):
    evaluation, _ = suite.evaluate_subjects(*pair(), pictures(1), pictures(1), QUICK, progress=False)
    cosine = evaluation.find("centred_cosine", "both")
    assert cosine is not None and cosine.value is None and "no others" in cosine.reason
    energy = evaluation.find("energy_in_mask", "student", "explanation")
    assert energy is not None and energy.value is not None and (energy.low, energy.n) == (None, 1)


def test_a_model_without_classes_has_no_top_1(tiny_subject):
    import timm

    torch.manual_seed(0)
    models = [randomise(timm.create_model("test_vit", num_classes=0, img_size=64), None, seed) for seed in (0, 1)]
    subjects = [
        tiny_subject(model=model, classifier=False, name=name)
        for name, model in zip(("teacher", "student"), models, strict=True)
    ]
    evaluation, _ = suite.evaluate_subjects(
        *subjects, pictures(), pictures(), dataclasses.replace(QUICK, methods=()), progress=False
    )
    for metric in ("top1_agreement", "kl"):
        one = evaluation.find(metric, "both")
        assert one is not None and one.value is None and one.reason == "the model has no classes"
    gain = evaluation.find("average_gain", "teacher", "explanation")
    assert gain is not None and gain.value is None
    with pytest.raises(DataError, match="One picture has no mean"):
        suite.evaluate_subjects(*subjects, pictures(), pictures(1), QUICK, progress=False)


def test_a_regression_is_measured_by_its_value(subject_of):
    """Everything that needs classes is left out with the reason, and nothing fails."""
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 6, 4, stride=4), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten()
    subjects = [
        subject_of(torch.nn.Sequential(*layers, torch.nn.Linear(24, 1)), name, classifier=False, output="regression")
        for name in ("teacher", "student")
    ]
    settings = dataclasses.replace(QUICK, methods=())
    evaluation, explained = suite.evaluate_subjects(*subjects, pictures(), pictures(), settings, progress=False)
    agreement, grids = (
        evaluation.find(name, who, how, variant)
        for name, who, how, variant in (
            ("top1_agreement", "both", "", ""),
            ("gridpg", "teacher", "explanation", "native 2x2"),
        )
    )
    assert agreement.reason == "the model has no classes" and agreement.value is None and grids.value is None
    (shown, *_) = gallery_of(explained, OutputKind("regression", 1))
    assert shown["decision"] == "output"
    assert shown["ledgers"][0]["score"] == pytest.approx(float(explained.outputs["teacher"][0, 0]), abs=1e-5)


def test_models_that_do_not_belong_together_are_refused(pair, subject_of):
    teacher, _ = pair()
    stranger = subject_of(torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()), name="student")
    with pytest.raises(DataError, match="do not belong together"):
        suite.evaluate_subjects(
            teacher, dataclasses.replace(stranger, tokens=None), pictures(), pictures(), QUICK, progress=False
        )


def test_no_pictures_and_masks_of_another_size_are_refused():
    with pytest.raises(DataError, match="no pictures"):
        Pictures(torch.zeros(0, 3, 8, 8), ())
    with pytest.raises(DataError, match="do not fit"):
        pictures(masks=torch.zeros(9, 32, 32))
    with pytest.raises(DataError, match="no fill is called 'gray'"):
        Settings(removals=((1, "gray"),))


def test_a_teacher_of_nan_is_refused(pair):
    teacher, student = pair()
    with torch.no_grad():
        teacher.model.head.weight.fill_(torch.nan)
    with pytest.raises(DataError, match="NaN"):
        suite.evaluate_subjects(teacher, student, pictures(), pictures(), QUICK, progress=False)


# ------------------------------------------------------------------------------------------------------------ page


def test_evaluations_side_by_side_mark_the_better(measured):
    evaluation, _ = measured
    row = Measurement("faithfulness", "deletion_auc", "student", "explanation", "v", 0.2, 0.1, 0.3, 5)
    less = dataclasses.replace(row, value=0.05, low=0.0, high=0.09)
    better = dataclasses.replace(evaluation, measurements=(less,))
    table = comparison([("one", dataclasses.replace(evaluation, measurements=(row,))), ("two", better)])
    assert [cell.best for cell in table.rows[0]] == [False, False, False, False, True]
    assert table.rows[0][3].text == "0.200" and table.rows[0][3].interval == "0.100 to 0.300"


def test_the_page_holds_everything_itself(measured):
    page = report_page(measured[0], gallery_of(measured[1], CLASSES, 2), "a <b> title", "what")
    assert "a &lt;b&gt; title" in page and "<svg" in page and page.count('class="map') >= 8
    assert not re.search(r"""(?:src|href)=["'](?!data:)|@import|url\((?!data:)|https?://""", page)


def decoded(url: str) -> bytes:
    return base64.b64decode(url.partition(",")[2])


def test_the_gallery_opens_on_the_student_and_shows_another_class_and_the_mask(measured):
    evaluation, explained = measured
    ours = ("student", "explanation")
    half = dataclasses.replace(explained, other_maps={(*ours, OTHERS[0]): -0.5 * explained.maps[ours]})
    shown, _ = gallery_of(half, CLASSES, 2)
    assert [one["of"] for one in shown["maps"]] == [
        *("student: explanation", "teacher: explanation", "teacher: input-x-gradient", "teacher: rollout"),
        *(f"teacher: {name}" for name in CONTROLS),
    ]
    assert [len(one["sources"]) for one in shown["maps"]] == [2, 1, 1, 1, 1, 1, 1]
    # One scale for both: the other map, minus one half of it, is as much paler, and has turned its sign.
    (_, decision), (what, other) = shown["maps"][0]["sources"]
    red, pale = (np.asarray(Image.open(io.BytesIO(decoded(url))).convert("RGB"), int) for url in (decision, other))
    assert what == "another class" and red.shape == pale.shape == (64, 64, 3)
    sign, turned = (picture[..., 0] - picture[..., 2] for picture in (red, pale))
    strong = np.abs(sign) > 60
    assert strong.any() and (sign[strong] * turned[strong] < 0).all() and pale.mean() > red.mean()
    # The border of the square mask: rows 16 to 48, columns 8 to 40.
    drawing = decoded(shown["outline"]).decode()
    assert 'd="M8 16H40M8 48H40M8 16V48M40 16V48"' in drawing and 'viewBox="0 0 64 64"' in drawing
    assert shown["decision"] == CLASSES.name(int(explained.decisions.classes[0]))
    assert shown["student_decides"] == CLASSES.name(int(explained.outputs["student"][0].argmax()))
    page = report_page(evaluation, gallery_of(half, CLASSES, 2), "title", "what")
    # Rollout, the centre and edges know no class: one map of each, which says so, also where another was made.
    blind = dataclasses.replace(
        half, other_maps={("teacher", "rollout", OTHERS[0]): explained.maps["teacher", "rollout"]}
    )
    (again,) = gallery_of(blind, CLASSES, 1)
    assert [[what for what, _ in one["sources"]] for one in again["maps"] if one["blind"]] == [[SAME]] * 3
    assert page.count(f"<small>{SAME}</small>") == 6
    assert page.count("<small>another class</small>") == 2 and page.count("--outline: url(data:image/svg") == 2
    bare = dataclasses.replace(explained, pictures=pictures(masks=None), other_maps={})
    page = report_page(evaluation, gallery_of(bare, CLASSES, 1), "title", "what")
    assert "--outline: url" not in page and "another class</small>" not in page and "object's mask</" not in page


def test_names_of_strangers_are_escaped_in_the_gallery(measured):
    evil = '"><script>alert(1)</script>'
    explained = dataclasses.replace(measured[1], pictures=dataclasses.replace(measured[1].pictures, keys=(evil,) * 9))
    names = OutputKind("classes", 1000, (evil,) * 1000)
    page = report_page(measured[0], gallery_of(explained, names, 1), evil, evil)
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page


CHECK = """
<script>
window.onerror = (message) => { document.body.dataset.errors = (document.body.dataset.errors || "") + message; };
window.addEventListener("load", () => {
  const table = document.querySelectorAll("table.sortable")[1], body = table.tBodies[0];
  const column = [...table.tHead.rows[0].cells].findIndex((cell) => cell.textContent.startsWith("energy"));
  const values = () => [...body.rows].map((row) => row.cells[column].dataset.order).join(" ");
  const button = table.tHead.rows[0].cells[column].querySelector("button");
  const state = document.body.dataset;
  button.click(); state.up = values();
  button.click(); state.down = values();
  const slider = document.getElementById("opacity"), map = document.querySelector(".map");
  slider.value = 0.2; slider.dispatchEvent(new Event("input"));
  state.opacity = getComputedStyle(map).opacity;
  const maps = [...document.querySelectorAll(".map")];
  const visible = maps.filter((one) => one.complete && one.getBoundingClientRect().width > 40);
  state.shown = visible.length; state.first = visible[0].alt;
  state.outline = getComputedStyle(map.parentElement, "::after").backgroundImage.slice(0, 23);
  state.wide = document.documentElement.scrollWidth > innerWidth;
});
</script>
"""


def test_the_page_in_a_browser(measured, tmp_path):
    """No console error, tables sort both ways, the slider changes the maps, which are all seen with the mask's line."""
    page = report_page(measured[0], gallery_of(measured[1], CLASSES, 2), "title", "what")
    found = in_browser(page, CHECK, tmp_path, 390)
    assert "errors" not in found
    up, down = ([float(value) for value in found[name].split()] for name in ("up", "down"))
    assert up == sorted(up) and down == sorted(down, reverse=True) and len(set(up)) > 1
    assert found["opacity"] == "0.2" and found["shown"] == "20" and found["wide"] == "false"
    assert found["first"] == "student: explanation, the decision: p0" and "data:image/svg" in found["outline"]
