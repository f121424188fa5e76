"""The command: exit codes, what goes where, and what a slip of the finger is told."""

from __future__ import annotations

import importlib
import inspect
import json
import shutil
import subprocess
import sys
import warnings
import weakref
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from bcosify.cli import main as command
from bcosify.cli.main import VERBS, main
from bcosify.convert import CodaConfig, load, load_teacher
from bcosify.convert.history import Calibration
from bcosify.convert.layers import ReferenceSized
from bcosify.core.errors import BcosifyError, DataWarning
from bcosify.explain import explain
from PIL import Image
from safetensors.torch import save_file

TINY = ("timm:test_resnet", "--no-pretrained", "--image-size", "64")
# What `inspect` says of a student whose biases are not carried.
NOT_CARRIED = {"carry": "0", "window": "0", "spread": "0"}


@pytest.fixture
def run(capsys):
    """run(WORD, ...) -> (exit code, stdout, stderr)."""

    def call(*words: object) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    """A converted folder; not to be changed."""
    out = tmp_path_factory.mktemp("cli") / "student"
    torch.manual_seed(0)
    assert main(["convert", *TINY, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder with two photographs and a file that is none."""
    spec = find_spec("skimage")
    assert spec is not None and spec.submodule_search_locations
    folder = tmp_path_factory.mktemp("pictures")
    for name in ("chelsea.png", "coffee.png"):
        shutil.copy(Path(spec.submodule_search_locations[0]) / "data" / name, folder)
    (folder / "broken.jpg").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def shards(pictures, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "shards"
    assert main(["shards", str(pictures), str(out), "--size", "64"]) == 0
    return out


def options_of(verb: str) -> dict[str, inspect.Parameter]:
    function = getattr(importlib.import_module(f"bcosify.cli.{verb}"), verb)
    return dict(inspect.signature(function).parameters)


# ------------------------------------------------------------------------------------------------------------- usage


def test_no_verb_is_wrong_usage_and_help_is_not(run):
    code, out, err = run()
    assert (code, out) == (2, "") and all(verb in err for verb in VERBS)
    for flag in ("-h", "--help"):
        code, out, err = run(flag)
        assert (code, err) == (0, "") and all(f"{verb} " in out and text in out for verb, text in VERBS.items())


def test_version_is_the_packages(run):
    from importlib.metadata import version

    assert run("--version") == (0, version("bcosify") + "\n", "")


@pytest.mark.parametrize(("typed", "meant"), [("convret", "convert"), ("inspct", "inspect"), ("Shards", "shards")])
def test_a_misspelt_verb_is_told_the_near_one(run, typed, meant):
    code, out, err = run(typed)
    assert (code, out) == (2, "") and f"no verb '{typed}'. Did you mean '{meant}'" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("convert",), "required: reference"),
        (("convert", *TINY, "--imagesize", "64"), "Did you mean '--image-size'"),
        (("convert", *TINY, "--dryrun=1"), "Did you mean '--dry-run'"),
        (("convert", *TINY, "--b"), "expected one argument"),
        (("convert", *TINY, "two"), "unrecognized arguments: two"),
        (("inspect", "timm:test_vit", "--no-pretraind"), "Did you mean '--no-pretrained'"),
        (("shards", "folder"), "required: out"),
        (("align", "folder"), "required: data"),
    ],
    ids=str,
)
def test_wrong_usage_ends_with_2_and_the_usage(run, words, said):
    code, out, err = run(*words)
    assert (code, out) == (2, "") and said in err and f"usage: bcosify {words[0]}" in err and "--help tells more" in err


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_each_verb_tells_every_option(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    out, err = capsys.readouterr()
    assert (ended.value.code, err) == (0, "") and f"usage: bcosify {verb}" in out
    squeezed = " ".join(out.split())
    for name, parameter in options_of(verb).items():
        flag = name.replace("_", "-")
        spelt = (
            {f"--{flag}", f"--no-{flag}"} if parameter.default is not inspect.Parameter.empty else {name, f"--{flag}"}
        )
        assert any(word in out for word in spelt), name
    documented = command.docstring_parser.parse(getattr(importlib.import_module(f"bcosify.cli.{verb}"), verb).__doc__)
    assert [item.arg_name for item in documented.params] == list(options_of(verb))
    assert all(item.description and " ".join(item.description.split()[:3]) in squeezed for item in documented.params)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_can_answer_in_json(verb):
    assert options_of(verb)["json"].default is False


def test_help_is_quick():
    code = "import sys, bcosify.cli.main as m; m.main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_module_runs_as_the_command_does():
    ended = subprocess.run([sys.executable, "-m", "bcosify.cli", "convrt"], capture_output=True, text=True)
    assert ended.returncode == 2 and "Did you mean 'convert'" in ended.stderr


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (BcosifyError("it [bold]broke"), 1, "bcosify inspect: it [bold]broke\n"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=repr,
)
def test_errors_end_with_their_message_alone(run, monkeypatch, error, code, said):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("bcosify.convert.inspection.load_teacher", fail)
    found, out, err = run("inspect", "timm:test_vit")
    assert (found, out) == (code, "") and said in err and "Traceback" not in err


def test_bugs_are_not_hidden(monkeypatch):
    monkeypatch.setattr("bcosify.convert.inspection.load_teacher", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["inspect", "timm:test_vit"])


# ----------------------------------------------------------------------------------------------------------- convert


def test_convert_writes_a_folder_and_says_what_it_did(run, tmp_path):
    code, out, err = run("convert", *TINY, "--out", tmp_path / "a" / "student")
    assert (
        (code, out) == (0, "")
        and "identity at B=1, beta=1: relative error" in err
        and "biases carried, reference gains" in err
    )
    student = tmp_path / "a" / "student"
    assert f"wrote {student}\nnext: bcosify align {student} --data SHARDS\n" in err
    measured = load(tmp_path / "a" / "student").history.conversion
    assert measured.identity_error < 1e-5 and len(measured.lossy_steps) == 7


def test_convert_prints_only_json_on_stdout(run, tmp_path):
    code, out, err = run("convert", *TINY, "--out", tmp_path / "student", "--json")
    result = json.loads(out)
    assert code == 0 and "wrote" in err
    assert result["out"] == str(tmp_path / "student") and result["identity_error"] < 1e-5
    assert result["counts"]["SixChannelBcosConv2d"] == 1 and result["lossy_steps"][0]["cosine"] == 1


def test_convert_to_another_method_with_its_own_settings(run, tmp_path):
    words = ("--method", "coda", "--set", "squash=sq", "rank=2", "--keep", "fc")
    code, _, err = run("convert", *TINY, "--out", tmp_path / "student", *words)
    assert code == 0 and "identity at beta=1: relative error" in err and "biases removed, reference gains" in err
    student = load(tmp_path / "student")
    assert student.config == CodaConfig(keep=("fc",), squash="sq", rank=2)
    steps = [(row["beta"], row.get("carry", 0)) for row in student.history.conversion.lossy_steps]
    assert steps == [(1, 0), (0, 1), (0, 0), (0, 0), (0, 1)]
    code, out, _ = run("inspect", tmp_path / "student", "--json")
    facts = json.loads(out)
    assert (facts["method"], facts["strengths"]) == ("coda", {"beta": "1", **NOT_CARRIED})


def test_convert_after_fa_cnn_and_explain_without_gradients(run, pictures, tmp_path):
    code, _, err = run("convert", *TINY, "--method", "fa-cnn", "--out", tmp_path / "student")
    assert code == 0 and "1 ClassMaps" in err and "identity at dampening=0: relative error" in err
    assert "dampening=4" in err and "calibrated" not in err
    code, out, _ = run("inspect", tmp_path / "student", "--json")
    assert code == 0 and json.loads(out)["strengths"] == {"dampening": "0"}
    code, out, _ = run("explain", tmp_path / "student", pictures / "chelsea.png", "--out", tmp_path / "maps", "--json")
    (row,) = json.loads(out)
    assert code == 0 and row["score"] == pytest.approx(row["input"] + row["constants"]["fc.bias"], abs=1e-4)
    with np.load(tmp_path / "maps" / "chelsea.npz") as maps:
        assert list(maps) == ["contributions"] and maps["contributions"].shape == (1, 64, 64)
        assert maps["contributions"].sum() == pytest.approx(row["input"], abs=1e-4)
    assert (tmp_path / "maps" / "chelsea.png").is_file()


def test_calibrating_what_has_no_gains_is_refused(run, shards, tmp_path):
    words = ("--method", "fa-cnn", "--calibrate", shards, "--out", tmp_path / "student")
    code, _, err = run("convert", *TINY, *words)
    assert code == 1 and "no layer of a fa-cnn student has a gain" in err and not (tmp_path / "student").exists()


@pytest.mark.parametrize("json_too", [False, True])
def test_a_dry_run_shows_every_layer_and_writes_nothing(run, tmp_path, monkeypatch, json_too):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bcosify.convert.verb.save", lambda *_, **__: pytest.fail("saved"))
    words = ["--json"] if json_too else []
    code, out, err = run("convert", *TINY, "--keep", "fc", "--dry-run", "--out", tmp_path / "student", *words)
    assert code == 0 and not list(tmp_path.iterdir())
    layers = [name for name, module in load_teacher("timm:test_resnet", pretrained=False).model.named_modules()]
    text = out if json_too else err
    assert all(name in text for name in layers if name.endswith(("conv1", "bn2", "fc"))) and "kept as asked" in text
    assert (json.loads(out)["counts"]["SixChannelBcosConv2d"] == 1) if json_too else out == ""


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_convert_refuses_an_existing_folder_before_any_work(run, tmp_path, monkeypatch, kind):
    out = tmp_path / "student"
    out.mkdir() if kind == "folder" else out.write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr("bcosify.convert.verb.load_teacher", lambda *_, **__: pytest.fail("loaded a teacher first"))
        code, _, err = run("convert", *TINY, "--out", out)
    assert code == 1 and "exists already. Nothing was written" in err and "--overwrite" in err
    code, _, err = run("convert", *TINY, "--out", out, "--overwrite")
    if kind == "folder":  # an empty one
        assert code == 0 and (out / "bcosify.json").is_file()
    else:
        assert code == 1 and "was not written by this command" in err and out.read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (TINY, "--out FOLDER is missing (or pass --dry-run"),
        (("timm:test_resnt", "--out", "{tmp}"), "Did you mean 'test_resnet'"),
        (("resnet50", "--out", "{tmp}"), "Did you mean 'timm:resnet50'"),
        (("timm:test_resnet", "--out", "{tmp}"), "--no-pretrained"),
        (("timm:sequencer2d_s", "--no-pretrained", "--out", "{tmp}"), "--keep NAME"),
        ((*TINY, "--out", "{tmp}", "--method", "bcoss"), "Did you mean 'bcos'"),
        ((*TINY, "--out", "{tmp}", "--set", "scale=cosin"), "Did you mean 'cosine'"),
        (
            (*TINY, "--out", "{tmp}", "--set", "scal=1", "keep=3"),
            "2 fault(s):\n  keep: must be a list; got 3\n  unknown key scal",
        ),
        ((*TINY, "--out", "{tmp}", "--set", "dampening=bound"), "unknown key dampening"),
        ((*TINY, "--out", "{tmp}", "--method", "fa-cnn", "--set", "scale=cosine"), "There are: keep, dampening"),
        ((*TINY, "--out", "{tmp}", "--method", "fa-cnn", "--set", "dampening=bounds"), "Did you mean 'bound'"),
        ((*TINY, "--out", "{tmp}", "--set", "scale"), "--set scale: write it as key=value"),
        ((*TINY, "--out", "{tmp}", "--set", "scale=["), "--set scale=[: the value is not YAML"),
        ((*TINY, "--out", "{tmp}", "--method", "coda", "--b", "2"), "--b 2.0 --method coda: it has no B"),
        ((*TINY, "--out", "{tmp}", "--method", "coda", "--set", "rank=0"), "rank: must be at least 1; got 0"),
        ((*TINY, "--out", "{tmp}", "--keep", "fcc"), "--keep fcc names no module of the model. Did you mean 'fc'"),
        ((*TINY, "--out", "{tmp}", "--weights", "none.safetensors"), "there is no such file"),
        ((*TINY, "--out", "{tmp}", "--calibrate", "nowhere.tar"), "nowhere.tar"),
        (("timm:test_vit", "--no-pretrained", "--image-size", "33", "--out", "{tmp}"), "--image-size"),
    ],
    ids=str,
)
def test_convert_fails_with_a_message_and_writes_nothing(run, tmp_path, monkeypatch, words, said):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    code, out, err = run("convert", *(str(word).format(tmp=tmp_path / "student") for word in words))
    assert (code, out) == (1, "") and said in err and err.startswith("bcosify convert: ")
    assert not (tmp_path / "student").exists()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("--b", "0.5"), "must be at least 1; got 0.5"),
        (("--b", "nan"), "must be a number; got 'nan'"),
        (("--image-size", "0"), "must be between 1 and 8192; got 0"),
        (("--image-size", "big"), "must be a whole number; got 'big'"),
        (("--image-size", "1.5"), "must be a whole number; got '1.5'"),
    ],
    ids=str,
)
def test_numbers_out_of_range_are_wrong_usage(run, tmp_path, option, said):
    code, out, err = run("convert", *TINY, "--out", tmp_path / "student", *option)
    assert (code, out) == (2, "") and err.startswith(f"bcosify convert: {option[0]} {said}") and err.count("\n") == 1
    assert not (tmp_path / "student").exists()


def test_convert_takes_own_weights_and_a_folder(run, tmp_path):
    import timm

    model = timm.create_model("test_resnet", num_classes=3)
    save_file(model.state_dict(), tmp_path / "own.safetensors")
    weights = ("--weights", tmp_path / "own.safetensors")
    assert run("convert", "timm:test_resnet", *weights, "--out", tmp_path / "a")[0] == 0
    timm.models.save_for_hf(model, tmp_path / "folder", safe_serialization=True)
    assert run("convert", f"dir:{tmp_path / 'folder'}", "--out", tmp_path / "b")[0] == 0
    states = [load(tmp_path / name).model.state_dict() for name in "ab"]
    assert (
        all(torch.equal(value, states[1][key]) for key, value in states[0].items()) and len(states[0]["fc.bias"]) == 3
    )


@pytest.mark.parametrize("count", [2, 1])
def test_convert_calibrates_on_pictures_from_shards(run, tmp_path, shards, count):
    words = ("--calibrate", shards, "--calibration-pictures", count, "--b", "1.5", "--keep", "fc")
    code, _, err = run("convert", *TINY, *words, "--out", tmp_path / "student")
    opened = load(tmp_path / "student")
    ends = {"b": 1.5, "beta": 0.0, "carry": 1.0, "window": 7.0}
    sized = sum(isinstance(layer, ReferenceSized) for layer in opened.model.modules())
    assert code == 0 and opened.history.calibration == Calibration(count, ends, sized)
    first, norm = opened.model.layer1[0].conv1.strengths(), opened.model.layer1[0].bn1.strengths()
    assert f"({count} pictures from" in err and first == {"b": 1.5, "beta": 0, "carry": 1}
    assert norm == {"beta": 0, "carry": 1, "window": 7, "spread": 0} and sized > 10


@pytest.mark.parametrize("count", ["0", "-1"])
def test_calibration_needs_a_picture(run, tmp_path, shards, count):
    words = ("--calibrate", shards, "--calibration-pictures", count)
    code, out, err = run("convert", *TINY, *words, "--out", tmp_path / "student")
    assert (code, out) == (2, "") and "--calibration-pictures" in err and not (tmp_path / "student").exists()


# ----------------------------------------------------------------------------------------------------------- inspect


def test_inspect_shows_what_a_conversion_would_do(run):
    code, out, err = run("inspect", "timm:test_vit", "--no-pretrained")
    assert (code, out) == (0, "")
    for fact in ("test_vit", "371240", "160 x 160", "SixChannelBcosConv2d: 1", "BcosLinear: 19", "blocks.5"):
        assert fact in err
    assert "next: bcosify convert timm:test_vit" in err
    code, out, _ = run("inspect", "timm:test_vit", "--no-pretrained", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["parameters"] == 371240 and facts["taps"] == ["blocks.1", "blocks.3", "blocks.5"]


def test_inspect_shows_what_a_converted_folder_is(run, student):
    code, out, err = run("inspect", student)
    assert (code, out) == (0, "") and "timm:test_resnet" in err and "not aligned" in err and "64 x 64" in err
    code, out, err = run("inspect", student, "--json")
    facts = json.loads(out)
    assert (
        (code, err) == (0, "")
        and facts["method"] == "bcos"
        and facts["strengths"] == {"b": "1", "beta": "1", **NOT_CARRIED}
    )
    assert facts["identity_error"] < 1e-5 and facts["layers"]["SixChannelBcosConv2d"] == 1


def test_inspect_refuses_a_damaged_folder(run, student, tmp_path):
    damaged = shutil.copytree(student, tmp_path / "damaged")
    (damaged / "probe.safetensors").unlink()
    code, out, err = run("inspect", damaged)
    assert (code, out) == (1, "") and "probe.safetensors is missing" in err


@pytest.mark.parametrize("reference", ["nowhere", "timm:test_vitt", "dir:nowhere"])
def test_inspect_refuses_what_is_no_model(run, reference):
    code, out, err = run("inspect", reference)
    assert (code, out) == (1, "") and err.startswith("bcosify inspect: ")


# ------------------------------------------------------------------------------------------------- explain and shards


def test_explain_prints_only_json_on_stdout_and_its_ledger_adds_up(run, student, pictures, tmp_path):
    words = (pictures / "chelsea.png", "--target", "top2", "--out", tmp_path / "maps", "--json")
    code, out, err = run("explain", student, *words)
    rows = json.loads(out)
    assert code == 0 and len(rows) == 2
    parts = [(abs(sum(row["constants"].values())), abs(row["input"])) for row in rows]
    share = sum(constants / (constants + pixels) for constants, pixels in parts) / 2
    assert "still its teacher" in err and f"Constants make {share:.0%} of its scores; next: bcosify align" in err
    for row in rows:
        assert row["score"] == pytest.approx(row["input"] + sum(row["constants"].values()), abs=1e-3)
    assert sorted(path.suffix for path in (tmp_path / "maps").iterdir()) == [".json", ".npz", ".png"]


def test_explain_holds_one_batch_of_pictures_at_a_time(run, student, pictures, tmp_path, monkeypatch):
    module = importlib.import_module("bcosify.explain.verb")
    read, held, alive = module.read_picture, [], []

    def noted(file: Path, limit: int | None):
        picture = read(file, limit)
        held.append(weakref.ref(picture))
        alive.append(sum(one() is not None for one in held))
        return picture

    monkeypatch.setattr(module, "read_picture", noted)
    many = [tmp_path / f"{number}.png" for number in range(5)]
    for file in many:
        shutil.copy(pictures / "chelsea.png", file)
    code, printed, _ = run("explain", student, *many, "--out", tmp_path / "maps", "--batch-size", 2, "--json")
    assert code == 0 and len(json.loads(printed)) == 5
    assert len(alive) == 5 and max(alive) <= 2


def test_explain_skips_a_broken_picture_and_lists_it(run, student, pictures, tmp_path):
    """What opens as a picture is only seen to be broken when its turn comes."""
    folder = tmp_path / "in"
    folder.mkdir()
    whole = (pictures / "chelsea.png").read_bytes()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(whole)
    (folder / "1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "._0.png").write_bytes(b"x")
    (folder / "notes.txt").touch()
    with pytest.warns(DataWarning) as warned:
        code, out, said = run("explain", student, folder, "--batch-size", 1, "--out", tmp_path / "maps", "--json")
    left_out, skipped = (str(one.message) for one in warned if one.category is DataWarning)
    assert code == 1 and [Path(row["image"]).name for row in json.loads(out)] == ["0.png", "2.png"]
    assert left_out == f"Left out of {folder}: 1 hidden (such as '._0.png'), 1 .txt (such as 'notes.txt')."
    assert skipped.startswith(f"1 of 3 pictures could not be read and were skipped. The first: {folder}/1.png is no")
    assert "1 of 3 pictures were skipped; " in said and "skipped.jsonl lists them" in " ".join(said.split())
    names = [f"{number}{ending}" for number in (0, 2) for ending in (".json", ".npz", ".png")]
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == [*names, "skipped.jsonl"]
    (line,) = (tmp_path / "maps" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["path"] == str(folder / "1.png") and "truncated" in json.loads(line)["reason"]


def test_a_warning_of_ours_is_one_line(capsys):
    with command._plain_warnings():
        assert warnings.formatwarning("what", DataWarning, "place.py", 7) == "bcosify: what\n"
        assert "place.py:7" in warnings.formatwarning("what", UserWarning, "place.py", 7)
    assert "place.py:7" in warnings.formatwarning("what", DataWarning, "place.py", 7)


def test_explain_leaves_nothing_where_no_picture_can_be_read(run, student, pictures, tmp_path):
    broken = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in broken:
        path.write_bytes((pictures / "chelsea.png").read_bytes()[:9000])
    code, _, said = run("explain", student, *broken, "--batch-size", 1, "--out", tmp_path / "maps")
    assert code == 1 and "None of the 2 pictures can be read. The first:" in said and "a.png is no picture" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_results_of_explain_never_collide(student, pictures, tmp_path):
    names = ["a.png", "q/a.png", "a-2.png", "q/A.png", "a.jpg", "l" * 240 + ".png", "l" * 240 + "m.png"]
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / "in" / name)
    ledgers = explain(student, [tmp_path / "in" / name for name in names], out=tmp_path / "maps")
    assert len(ledgers) == len(names) and not ledgers.skipped
    written = {path.name for path in (tmp_path / "maps").iterdir()}
    assert len(written) == 3 * len(names) == len({name.casefold() for name in written})
    assert {"a.json", "a-2.json", "a-2-2.json", "A-3.json", "a-4.json", "l" * 200 + "-2.json"} <= written


def test_explain_reads_every_depth_of_grey_alike(student, pictures, tmp_path):
    grey = np.asarray(Image.open(pictures / "chelsea.png").convert("L"))
    Image.fromarray(grey).save(tmp_path / "8.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    Image.fromarray((grey / 255).astype(np.float32)).save(tmp_path / "f.tif")
    with pytest.warns(DataWarning, match="1 as white"):
        first, *others = explain(student, [tmp_path / name for name in ("8.png", "16.png", "f.tif")], "top1")
    assert [one.target for one in others] == [first.target] * 2
    assert [one.score for one in others] == pytest.approx([first.score] * 2, abs=1e-3)


def test_the_limit_of_pixels_is_an_option_of_explain_and_shards(run, student, pictures, tmp_path):
    cat = pictures / "chelsea.png"
    pixels = ("--max-pixels", 451 * 300 - 1)
    code, _, said = run("explain", student, cat, "--out", tmp_path / "maps", *pixels)
    assert code == 1 and "451 x 300 pixels, and the limit is 135299" in " ".join(said.split())
    code, out, _ = run("shards", pictures, tmp_path / "shards", "--max-pixels", 451 * 300, "--json")
    skipped = {item["path"]: item["reason"] for item in json.loads(out)["skipped"]}
    assert code == 0 and set(skipped) == {"broken.jpg", "coffee.png"} and "the limit is 135300" in skipped["coffee.png"]
    assert run("explain", student, cat, "--out", tmp_path / "maps", "--max-pixels", 451 * 300)[0] == 0


def test_explain_refuses_before_any_work(run, student, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("bcosify.explain.verb.explain_scores", lambda *_, **__: pytest.fail("explained first"))
    (tmp_path / "maps").mkdir()
    for words, said in (
        ((student, pictures / "chelsea.png", "--out", tmp_path / "maps"), "exists already"),
        ((student, pictures / "chelsea.png", "--out", tmp_path / "new", "--target", "tabbby"), "Did you mean"),
        ((student, pictures / "broken.jpg", "--out", tmp_path / "new"), "broken.jpg"),
        ((student, pictures / "none.png", "--out", tmp_path / "new"), "none.png"),
        ((tmp_path / "maps", pictures / "chelsea.png", "--out", tmp_path / "new"), "maps"),
    ):
        code, out, err = run("explain", *words)
        assert (code, out) == (1, "") and said in err
    assert not list((tmp_path / "maps").iterdir()) and not (tmp_path / "new").exists()


def test_shards_says_what_it_packed_and_what_it_could_not(run, pictures, tmp_path):
    code, out, err = run("shards", pictures, tmp_path / "out", "--size", "64")
    assert (code, out) == (0, "") and "2 pictures in 1 shards" in err and "broken.jpg" in err
    code, out, err = run("shards", pictures, tmp_path / "out")
    assert (code, out) == (1, "") and "--overwrite" in err


def test_shards_prints_its_json_once(run, pictures, tmp_path):
    code, out, _ = run("shards", pictures, tmp_path / "out", "--size", "null", "--json")
    assert code == 0 and json.loads(out)["pictures"] == 2


def test_align_refuses_before_any_work(run, student, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "bcosify.convert.original.reload_teacher", lambda *_, **__: pytest.fail("loaded a teacher first")
    )
    for words, said in (
        ((student, "--data", shards, "--recipe", "smok"), "Did you mean 'smoke'"),
        ((student, "--data", tmp_path / "none.tar", "--recipe", "smoke"), "none.tar"),
        ((tmp_path, "--data", shards, "--recipe", "smoke"), "missing"),
        ((student, "--data", shards, "--recipe", "smoke", "--set", "batch_sise=2"), "batch_size"),
    ):
        code, out, err = run("align", *words, "--out", tmp_path / "aligned")
        assert (code, out) == (1, "") and said in err
    assert not list(tmp_path.glob("aligned*"))
