"""Each verb as a Python function: the command's options, a result that is an object, the files of the command."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bcosify.cli.main import VERBS, main
from bcosify.convert import BcosConfig, CodaConfig, FaCnnConfig, Student, StudentFacts, TeacherFacts, load_teacher
from bcosify.core.errors import BcosifyError, CheckpointError, PlanError, TargetError
from bcosify.explain import Explanation, TopTarget, explain_scores
from PIL import Image

import bcosify

TINY: dict[str, Any] = {"pretrained": False, "image_size": 64}
SMALL = ("image_size=64", "batch_size=2", "workers=0", "probe_pictures=0", "held_out=4", "evaluate_every=2")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def command(capsys):
    """command(WORD, ...) -> what the command prints with --json."""

    def call(*words: object) -> Any:
        torch.manual_seed(0)
        assert main([*map(str, words), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return call


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder, random = tmp_path_factory.mktemp("verbs") / "pictures", np.random.default_rng(0)
    folder.mkdir()
    for i in range(24):
        coarse = Image.fromarray(random.integers(0, 255, (5, 6, 3), dtype=np.uint8))
        coarse.resize((48, 40), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def shards(pictures) -> Path:
    bcosify.shards(pictures, pictures.parent / "shards", progress=False)
    return pictures.parent / "shards"


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    """A converted folder; not to be changed."""
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("student") / "student"
    bcosify.convert("timm:test_resnet", FaCnnConfig(), out=out, **TINY)
    return out


def plain(found: object) -> Any:
    """A result as JSON gives it back."""
    values = dataclasses.asdict(found) if dataclasses.is_dataclass(found) and not isinstance(found, type) else found
    return json.loads(json.dumps(values, default=str))


def same_files(ours: Path, theirs: Path, *but: str) -> bool:
    names = [sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file()) for folder in (ours, theirs)]
    return names[0] == names[1] != [] and all(
        (ours / name).read_bytes() == (theirs / name).read_bytes() for name in names[0] if name.name not in but
    )


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_is_a_function_with_the_options_of_the_command(verb):
    function = getattr(bcosify, verb)
    options = set(inspect.signature(getattr(importlib.import_module(f"bcosify.cli.{verb}"), verb)).parameters)
    missing = options - {"json"} - set(inspect.signature(function).parameters)
    # The plan alone is another result, so it is another function.
    assert callable(function) and missing == ({"dry_run"} if verb == "convert" else set())


@pytest.mark.parametrize(
    "first", ["bcosify.align.recipe", "bcosify.evaluate.record", "bcosify.convert", "bcosify.explain"]
)
def test_a_verb_can_be_called_whatever_was_imported_before(first):
    importlib.import_module(first)
    package = getattr(bcosify, first.split(".")[1])
    with pytest.raises(TypeError, match="missing"):
        package()
    function = getattr(package, first.split(".")[1])
    assert inspect.isfunction(function) and inspect.signature(package) == inspect.signature(function)


def test_shards(command, pictures, tmp_path):
    written = bcosify.shards(pictures, tmp_path / "ours", size=32, per_shard=10, progress=False)
    printed = command("shards", pictures, tmp_path / "theirs", "--size", 32, "--per-shard", 10)
    assert (written.pictures, written.shards) == (printed["pictures"], printed["shards"]) == (24, 3)
    assert same_files(tmp_path / "ours", tmp_path / "theirs")


def test_convert(command, shards, tmp_path):
    options: dict[str, Any] = {"calibrate": shards, "calibration_pictures": 3, "b": 1.5, "costs": True, **TINY}
    torch.manual_seed(0)
    made = bcosify.convert("timm:test_resnet", keep=["fc"], set={"scale": "cosine"}, out=tmp_path / "ours", **options)
    words = ("--keep", "fc", "--set", "scale=cosine", "--calibrate", shards, "--calibration-pictures", 3, "--b", 1.5)
    tiny = ("timm:test_resnet", "--no-pretrained", "--image-size", 64)
    printed = command("convert", *tiny, *words, "--out", tmp_path / "theirs")
    assert isinstance(made, Student) and made.config == BcosConfig(keep=("fc",), scale="cosine")
    assert (
        list(made.history.conversion.lossy_steps) == printed["lossy_steps"] and made.plan.counts() == printed["counts"]
    )
    assert made.history.calibration.pictures == 3 and same_files(tmp_path / "ours", tmp_path / "theirs")
    plan = bcosify.convert.plan_for("timm:test_resnet", keep=["fc"], **TINY)
    assert command("convert", *tiny, "--keep", "fc", "--dry-run")["steps"] == [
        {name: getattr(step, name) for name in ("name", "found", "becomes", "reason")} for step in plan.steps
    ]


def test_convert_takes_a_method_by_name_or_by_its_config():
    teacher = load_teacher("timm:test_resnet", pretrained=False, image_size=64)
    by_name = bcosify.convert(teacher, "coda", set=["rank=2"])
    by_config = bcosify.convert(teacher, CodaConfig(rank=2))
    assert by_name.config == by_config.config and by_name.plan == by_config.plan
    for wrong, said in (
        ({"method": "codda"}, "Did you mean 'coda'"),
        ({"method": 3}, "is not the settings of a method"),
        ({"method": CodaConfig(), "keep": ["fc"]}, "belong into the config"),
        ({"reference": teacher.model}, "Pass a reference"),
        ({"image_size": 96}, "a Teacher is loaded already"),
    ):
        with pytest.raises(PlanError, match=said):
            bcosify.convert(**{"reference": teacher, **wrong})


def test_inspect(command, student):
    facts = bcosify.inspect(student)
    assert isinstance(facts, StudentFacts) and plain(facts) == command("inspect", student)
    teacher = load_teacher("timm:test_vit", pretrained=False)
    facts = bcosify.inspect(teacher)
    assert isinstance(facts, TeacherFacts) and plain(facts) == command("inspect", "timm:test_vit", "--no-pretrained")


def test_explain(command, student, pictures, tmp_path):
    files = [pictures / "1.png", pictures / "2.png", pictures / "3.png"]
    rows = bcosify.explain(student, files, "top2", out=tmp_path / "ours", batch_size=2)
    words = (*files, "--target", "top2", "--batch-size", 2, "--out", tmp_path / "theirs")
    assert [one.row() for one in rows] == command("explain", student, *words) and len(rows) == 6
    assert same_files(tmp_path / "ours", tmp_path / "theirs")
    assert bcosify.explain(student, files[0], ["top2"]) == rows[:2]


def test_explain_of_a_tensor_is_an_explanation(student, pictures):
    opened = bcosify.load(student)
    images = torch.stack([opened.preprocess.transform()(Image.open(pictures / f"{i}.png")) for i in range(2)])
    expected = explain_scores(opened.model, images, TopTarget(2))
    for found in (
        bcosify.explain(opened.model, images, TopTarget(2)),
        bcosify.explain(opened, images, "top2"),
        bcosify.explain(student, images, TopTarget(2), batch_size=1),
        bcosify.explain(opened, images, expected.outputs.topk(2).indices),
    ):
        assert isinstance(found, Explanation) and torch.allclose(found.scores, expected.scores)
        assert torch.allclose(found.contributions, expected.contributions, atol=1e-6)
    ahead = torch.eye(expected.outputs.shape[1])[0] - torch.eye(expected.outputs.shape[1])[1]
    along = bcosify.explain(opened, images, direction=ahead)
    assert torch.allclose(along.scores[:, 0], expected.outputs[:, 0] - expected.outputs[:, 1], atol=1e-5)


def test_explain_says_what_cannot_be_asked(student, pictures, tmp_path):
    opened, images = bcosify.load(student), torch.zeros(2, 3, 64, 64)
    per_picture = torch.tensor([[0], [1]])
    calls: tuple[tuple[tuple, dict, str], ...] = (
        ((opened.model, images), {}, "target is missing"),
        ((opened.model, images, "tabby"), {}, "no class names"),
        ((opened.model, pictures, 0), {}, "does not say how pictures are prepared"),
        ((opened, images, 0), {"out": tmp_path / "maps"}, "for picture files"),
        ((opened, pictures, per_picture), {}, "from picture to picture"),
        ((opened, images), {"text": "a cat"}, "no text tower"),
    )
    for given, options, said in calls:
        with pytest.raises(TargetError, match=said):
            bcosify.explain(*given, **options)
    assert not (tmp_path / "maps").exists()


def test_evaluate_and_compare(command, student, shards, tmp_path, monkeypatch):
    options: dict[str, Any] = {"data": shards, "against": "none", "pictures": 2, "grids": 1, "batch_size": 4}
    opened = bcosify.load(student)
    before = {name: tensor.clone() for name, tensor in opened.model.state_dict().items()}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # features from the cache round in another way
    found = bcosify.evaluate(opened, out=tmp_path / "ours", **options)
    words = (x for name, value in options.items() for x in (f"--{name.replace('_', '-')}", value))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    printed = command("evaluate", student, *words, "--out", tmp_path / "theirs")

    def kept(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
        """Without what the clock decides."""
        return [one for one in evaluation["measurements"] if one["metric"] != "seconds"]

    assert kept(plain(found)) == kept(printed) and len(kept(printed)) > 20 and plain(found)["model"] == printed["model"]
    assert (tmp_path / "ours" / "report.html").is_file() and not (tmp_path / "ours.run").exists()
    assert json.loads((tmp_path / "ours" / "evaluation.json").read_text()) == plain(found)
    assert all(torch.equal(tensor, before[name]) for name, tensor in opened.model.state_dict().items())
    assert all(parameter.requires_grad for parameter in opened.model.parameters())

    folders = [tmp_path / "ours", tmp_path / "theirs"]
    table = bcosify.compare(folders, tmp_path / "ours.html")
    assert plain(table.rows) == command("compare", *folders, "--out", tmp_path / "theirs.html")
    assert table.names == ("ours", "theirs") and not table.warnings
    assert (tmp_path / "ours.html").read_bytes() == (tmp_path / "theirs.html").read_bytes()


def test_align(command, shards, tmp_path):
    torch.manual_seed(0)
    run = tmp_path / "student"
    bcosify.convert("timm:test_resnet", out=run, **TINY)
    done = bcosify.align(run, data=shards, recipe="smoke", set=SMALL, pictures=8, out=tmp_path / "ours")
    words = ("--data", shards, "--recipe", "smoke", "--set", *SMALL, "--pictures", 8, "--out", tmp_path / "theirs")
    printed = command("align", run, *words)
    differ = ("out", "seconds")
    ours = {name: plain(getattr(done, name)) for name in printed if name not in differ}
    assert ours == {name: value for name, value in printed.items() if name not in differ}
    assert done.out == tmp_path / "ours" and done.work == tmp_path / "ours.run" and done.recipe.batch_size == 2
    assert same_files(tmp_path / "ours", tmp_path / "theirs")
    changes = dict(text.split("=") for text in SMALL)
    again = bcosify.align(
        run,
        data=[shards],
        recipe="smoke",
        set={name: int(value) for name, value in changes.items()},
        pictures=8,
        out=tmp_path / "third",
    )
    assert again.recipe == done.recipe and again.curve == done.curve


def test_export(command, student, tmp_path):
    written = bcosify.export(student, tmp_path / "ours.pt2", "torch", explain=True)
    printed = command("export", student, "--format", "torch", "--explain", "--out", tmp_path / "theirs.pt2")
    facts = plain(written)
    assert {**facts, "out": "", "bytes": 0} == {**printed, "out": "", "bytes": 0} and written.out.is_file()
    with pytest.raises(CheckpointError, match="Pass out=FILE"):
        bcosify.export(bcosify.load(student))


def test_publish(command, student, pictures, tmp_path):
    terms = {"license": "other", "license_link": "https://example.org/terms"}
    seen, picture, out = [], pictures / "1.png", tmp_path / "ours"
    done = bcosify.publish(student, "org/name", **terms, picture=picture, dry_run=True, out=out, staged=seen.append)
    words = [x for name, value in terms.items() for x in (f"--{name.replace('_', '-')}", value)]
    words += ["--picture", picture, "--dry-run", "--out", tmp_path / "theirs"]
    printed = command("publish", student, "org/name", *words)
    assert (done.files, done.headline, done.doors) == (printed["files"], printed["headline"], printed["doors"])
    assert done.licence.card_fields() == printed["license"] and done.published is None and len(seen) == 1
    assert done.folder == out and same_files(out, tmp_path / "theirs")


def test_what_a_caller_refuses_of_a_release_is_not_sent(student, monkeypatch):
    def refuse(release: object) -> None:
        raise BcosifyError("not like this")

    monkeypatch.setattr("bcosify.publish.verb.upload", lambda *_: pytest.fail("sent"))
    with pytest.raises(BcosifyError, match="not like this"):
        bcosify.publish(student, "org/name", license="other", license_link="https://example.org", staged=refuse)


def test_publish_of_a_student_says_what_to_save_first():
    with pytest.raises(BcosifyError, match=r"not a dict\. Save it first: bcosify.save\(student, FOLDER\)"):
        bcosify.publish({}, "org/name")  # pyright: ignore[reportArgumentType]


def test_demo(command, tmp_path, monkeypatch):
    """The real demo takes a minute; here it is the same with one photograph, one region and a few small pictures."""
    recipe = tmp_path / "short.yaml"
    recipe.write_text(
        "pressure: none\nimage_size: 64\nbatch_size: 2\nphases:\n  - {objective: end-to-end, pictures: 4, "
        "learning_rate: 1.0e-4, b: [1.33, 1.33], beta: [0.0, 0.0]}\nheld_out: 2\nworkers: 0\nprobe_pictures: 0\n"
    )
    for name, value in (("CROPS", 2), ("TRAINED", ["brick.png", "coins.png"]), ("EXPLAINED", {"coffee.png": "a cup"})):
        monkeypatch.setattr(f"bcosify.demo.verb.{name}", value)
    monkeypatch.setattr("bcosify.demo.photographs.CELLS", 1)
    told: list[str] = []
    done = bcosify.demo(tmp_path / "ours", str(recipe), say=told.append)
    printed = command("demo", "--out", tmp_path / "theirs", "--recipe", recipe)
    differ = ("seconds", "report")
    assert {k: v for k, v in plain(done).items() if k not in differ} == {
        k: v for k, v in printed.items() if k not in differ
    }
    assert json.loads((tmp_path / "ours" / "demo.json").read_text()) == plain(done)
    assert [one.name for one in done.shown] == ["coffee.png"] and "coffee.png" in done.report.read_text()
    assert [line[:3] for line in told if line[1:3] == "/4"] == ["1/4", "2/4", "3/4", "4/4"]
