"""Folders, settings, texts and options made to harm, by their kinds: what is promised in docs/security.md.

Folders of students that lie about their weights are in `publish/test_malicious.py`, tars in `data/`.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bcosify.publish
import open_clip
import pytest
import torch
import transformers
from bcosify.cli.console import show_table
from bcosify.cli.main import main
from bcosify.convert import convert, load, load_teacher, save
from bcosify.convert.libraries.open_clip.settings import checked_settings
from bcosify.convert.libraries.transformers.files import checked_config
from bcosify.convert.limits import bounded_run
from bcosify.core import files
from bcosify.core.errors import BcosifyError, CheckpointError, DataError, PublishError, SourceError, near_miss
from bcosify.core.files import check_file, check_free, new_file, new_folder
from bcosify.core.words import markdown, markdown_code, markdown_link, printable
from bcosify.publish.card import card_of
from bcosify.publish.licences import Base, Licence, choose_licence
from bcosify.publish.staging import Request, stage
from PIL import Image
from safetensors.torch import load_file, save_file

import bcosify

from folders import resigned, write_open_clip, write_tokenizer

torch.set_num_threads(1)
TOKEN = "hf_" + "x" * 34  # no real one: it looks like a token of the hub


@pytest.fixture(autouse=True)
def offline(monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def honest(tmp_path_factory) -> dict[str, Path]:
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("honest")
    towers = write_open_clip(place / "clip", image_size=32, patch_size=8, width=32, layers=1, head_width=16)
    return {
        "towers": towers,
        "pair": save(convert(load_teacher(f"open_clip:local-dir:{towers}")), place / "pair"),
        "vit": save(convert(load_teacher("timm:test_vit", pretrained=False, image_size=32)), place / "vit"),
    }


@pytest.fixture
def folder_of(honest, tmp_path) -> Callable[[str], Path]:
    """folder_of(KIND): a folder, free to be turned into a trap."""
    return lambda kind: Path(shutil.copytree(honest[kind], tmp_path / "trap"))


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


# ------------------------------------------------------------------------------------------------------- code runs


def add_code(folder: Path, mark: Path) -> None:
    """A tokenizer whose Python leaves a file where it is run, as a hub repository would bring it."""
    write_tokenizer(folder)
    edit(
        folder / "tokenizer_config.json",
        lambda values: values.update(auto_map={"AutoTokenizer": ["evil.Tok", "evil.Tok"]}, tokenizer_class="Tok"),
    )
    (folder / "evil.py").write_text(
        f"from pathlib import Path\nfrom transformers import PreTrainedTokenizerFast\nPath({str(mark)!r}).touch()\n"
        "class Tok(PreTrainedTokenizerFast):\n    pass\n"
    )


def ask_for(folder: Path, **settings: Any) -> None:
    edit(folder / "open_clip_config.json", lambda values: values["model_cfg"]["text_cfg"].update(settings))


def list_text(folder: Path, *left_out: str) -> Path:
    """The record lists all that lies in text/, but for some."""
    names = [path.name for path in (folder / "text").iterdir() if path.name not in left_out]
    return resigned(folder, text=dict.fromkeys(names, ""))


WANTED = {"hf_tokenizer_name": "x", "tokenizer_kwargs": {"trust_remote_code": True}}
DOORS: dict[str, Callable[[Path], Any]] = {
    "load": lambda folder: load(folder).text.embed(["a"]),
    "open_clip": lambda folder: open_clip.create_model(f"local-dir:{folder}"),
    "tokenizer": lambda folder: open_clip.get_tokenizer(f"local-dir:{folder}")(["a"]),
}


def test_a_source_whose_tokenizer_wants_its_code_to_be_run(folder_of, tmp_path):
    folder, mark = folder_of("towers"), tmp_path / "mark"
    add_code(folder, mark)
    ask_for(folder, **WANTED)
    for verb in (load_teacher, bcosify.convert, bcosify.inspect):
        with pytest.raises(SourceError, match="tokenizer_kwargs has trust_remote_code, which could run other code"):
            verb(f"open_clip:local-dir:{folder}")
    ask_for(folder, tokenizer_kwargs={})
    with pytest.raises(SourceError, match="tokenizer .* cannot be had"):
        load_teacher(f"open_clip:local-dir:{folder}").text.embed(["a"])
    assert not mark.exists()


@pytest.mark.parametrize("door", DOORS)
def test_a_student_whose_tokenizer_wants_its_code_to_be_run(folder_of, tmp_path, door):
    folder, mark = folder_of("pair"), tmp_path / "mark"
    add_code(folder / "text", mark)
    ask_for(folder / "text", **WANTED)
    with pytest.raises(CheckpointError, match="names files that a text tower does not have: evil.py"):
        DOORS[door](list_text(folder))
    with pytest.raises(CheckpointError, match="text holds evil.py, which the student's record does not list"):
        DOORS[door](list_text(folder, "evil.py"))
    (folder / "text" / "evil.py").unlink()
    with pytest.raises(BcosifyError, match="tokenizer_kwargs has trust_remote_code, which could run other code"):
        DOORS[door](list_text(folder))
    assert not mark.exists()


@pytest.mark.parametrize(
    ("part", "settings"),
    [
        ("text_cfg", {"tokenizer_kwargs": {"bpe_path": "/etc/hostname"}}),
        ("text_cfg", {"tokenizer_kwargs": {"clean": "os.system"}}),
        ("text_cfg", {"tokenizer_kwargs": ["trust_remote_code"]}),
        ("text_cfg", {"tokenizer_kwargs": {"code_revision": "main"}}),
        ("text_cfg", {"hf_tokenizer_name": "/home/someone/secret"}),
        ("text_cfg", {"hf_model_name": "../../elsewhere"}),
        ("vision_cfg", {"timm_model_name": "hf-hub:evil/model"}),
        ("vision_cfg", {"timm_model_name": "local-dir:/tmp/evil"}),
        ("vision_cfg", {"cache_dir": "/tmp"}),
        ("", {"pretrained_image": True}),
        ("", {"vision_cfg": 3}),
    ],
    ids=str,
)
def test_settings_that_are_not_passed_on_to_open_clip(part, settings):
    values: dict[str, Any] = {"embed_dim": 16, "vision_cfg": {"layers": 1}, "text_cfg": {"layers": 1}}
    assert checked_settings(values, "here") == values
    (values[part] if part else values).update(settings)
    with pytest.raises(SourceError):
        checked_settings(values, "here")


def test_settings_of_all_that_open_clip_ships_are_passed_on():
    for name in open_clip.list_models():
        settings = open_clip.get_model_config(name)
        assert checked_settings(settings, name)["text_cfg"].items() >= settings["text_cfg"].items()


VIT = {"model_type": "vit", "hidden_size": 8, "num_attention_heads": 1}


@pytest.mark.parametrize(
    "settings",
    [
        {"backbone": "evil/model"},
        {"use_pretrained_backbone": True},
        {"attn_implementation": "evil/kernel"},
        {"_attn_implementation": {"text_config": "evil/kernel"}},
        {"experts_implementation": "evil/kernel"},
        {"deeper": [{"auto_map": {"AutoModel": "evil.Model"}}]},
        {"model_type": "timm_wrapper", "architecture": "hf-hub:evil/model"},
        {"model_type": "timm_backbone", "backbone": None},
        {"model_type": ["vit"]},
        {"model_type": "clip", "text_config": {"attn_implementation": "evil/kernel"}},
        {"model_type": "detr"},  # has a network of timm's inside where nothing is said
    ],
    ids=str,
)
def test_settings_that_make_transformers_look_elsewhere(settings):
    with pytest.raises(SourceError):
        checked_config({**VIT, **settings}, "here")


def test_settings_that_transformers_does_not_declare_are_not_passed_on():
    config = checked_config({**VIT, "attn_implementation": "sdpa", "unheard_of": {"path": "/etc"}}, "here")
    assert (config.hidden_size, hasattr(config, "unheard_of")) == (8, False)
    pair = {"model_type": "clip", "vision_config": {"hidden_size": 8, "num_attention_heads": 1, "unheard_of": 1}}
    vision = checked_config(pair, "here").vision_config
    assert (vision.hidden_size, hasattr(vision, "unheard_of")) == (8, False)


def test_a_class_of_another_type_is_not_built(tmp_path):
    from bcosify.convert.libraries.transformers.towers import class_named

    config = checked_config(VIT, "here")
    assert class_named("ViTModel", config) is transformers.ViTModel
    for name in ("RagModel", "DetrModel", "TimmWrapperModel", "AutoModel", "os", 3):
        with pytest.raises(SourceError):
            class_named(name, config)


def test_kernels_that_config_json_names_are_not_fetched(folder_of, monkeypatch):
    asked: list[Any] = []
    monkeypatch.setattr(
        transformers.PreTrainedModel,
        "_check_and_adjust_attn_implementation",
        lambda self, name, *args, **options: asked.append(name) or "eager",
    )
    folder = folder_of("vit")
    keys = {"attn_implementation": "evil/kernel", "_attn_implementation": "evil/kernel", "backbone": "evil/model"}
    edit(folder / "config.json", lambda values: values.update(keys))
    model = transformers.AutoModel.from_pretrained(resigned(folder))
    assert asked and "evil/kernel" not in asked and not hasattr(model.config, "backbone")


@pytest.mark.parametrize("key", ["pretrained_filter_fn", "pretrained_model_args", "checkpoint_path", "feature_cfg"])
def test_settings_that_timms_factories_keep_for_themselves(folder_of, key):
    folder = folder_of("vit")
    edit(folder / "bcosify.json", lambda record: record["source"]["model_args"].update({key: "evil.pth"}))
    with pytest.raises(BcosifyError, match="only ever built empty"):
        load(resigned(folder))


# --------------------------------------------------------------------------------------------------- secrets go up


def test_only_what_the_record_lists_is_saved_anew_and_published(folder_of, tmp_path):
    folder, secret = folder_of("pair"), tmp_path / "secret.json"
    secret.write_text('{"password": 1}')
    student = load(folder)
    (folder / "text" / ".hidden.json").write_text("{}")  # no library opens it
    copy = save(student, tmp_path / "copy")
    assert sorted(os.listdir(copy / "text")) == sorted(json.loads((folder / "bcosify.json").read_text())["text"])
    (folder / "text" / "notes.json").symlink_to(secret)
    for touch in (lambda: save(student, tmp_path / "other"), lambda: load(folder).text.embed(["a"])):
        with pytest.raises(CheckpointError, match="notes.json, which the student's record does not list"):
            touch()
    with pytest.raises(CheckpointError, match="notes.json is a link to .*outside of the folder"):
        load(list_text(folder, ".hidden.json"))
    assert not (tmp_path / "other").exists()


def staged(folder: Path, out: Path, **options: Any) -> Any:
    out.mkdir()
    return stage(Request(folder, "org/name", "mit", "https://example.org", **options), out)


def test_a_linked_recipe_and_one_that_is_none_are_not_published(folder_of, tmp_path):
    folder, run = folder_of("vit"), tmp_path / "trap.run"
    run.mkdir()
    (tmp_path / "secret.yaml").write_text("seed: 0\n")
    (run / "recipe.yaml").symlink_to(tmp_path / "secret.yaml")
    with pytest.raises(PublishError, match="is a link out of its folder"):
        staged(folder, tmp_path / "a")
    (run / "recipe.yaml").unlink()
    for text in ("password: hunter2\n", "seed: 0\n  - b", "- 1\n"):
        (run / "recipe.yaml").write_text(text)
        with pytest.raises(PublishError, match="Move .*recipe.yaml away"):
            staged(folder, tmp_path / f"b{len(text)}")
    (run / "recipe.yaml").write_text("seed: 0  # hunter2\n")
    staged(folder, tmp_path / "c")
    assert (tmp_path / "c" / "recipe.yaml").read_text() == "seed: 0\n"


@pytest.mark.parametrize("place", ["record", "weights", "data"])
def test_what_looks_like_a_token_is_not_published(folder_of, tmp_path, place):
    folder = folder_of("vit")
    if place == "record":
        edit(folder / "bcosify.json", lambda values: values["history"]["notes"].update(note=f"use {TOKEN}"))
    elif place == "weights":
        save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", metadata={"key": TOKEN})
    with pytest.raises(PublishError, match="looks like a token or a private key") as caught:
        staged(resigned(folder), tmp_path / "out", data=TOKEN if place == "data" else None)
    assert TOKEN not in str(caught.value)


# ------------------------------------------------------------------------------------------------------- overwrite


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "pics"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (40, 40), (80 * number, 9, 9)).save(folder / f"p{number}.png")
    return folder


def test_overwrite_never_takes_an_input_or_what_holds_one(folder_of, pictures, tmp_path):
    vit = folder_of("vit")
    run: list[tuple[str, ...]] = [
        ("shards", "pics", "pics"),
        ("shards", "pics", "."),
        ("shards", "pics", str(tmp_path)),
        ("convert", f"dir:{pictures}", "--out", "pics"),
        ("explain", "trap", "pics/p0.png", "--out", "pics"),
        ("explain", "trap", "pics", "--out", "trap"),
        ("evaluate", "trap", "--data", "pics/*.tar", "--out", "pics"),
        ("align", "trap", "--data", "pics/{a,b}.tar", "--out", "trap"),
        ("export", "trap", "--format", "torch", "--out", "trap/model.safetensors"),
        ("export", "trap", "--format", "torch", "--out", "pics/p0.png"),
        ("publish", "trap", "org/name", "--out", "trap"),
        ("compare", "pics", "trap", "--out", "pics"),
        ("demo", "--out", "pics"),
    ]
    before = listing(tmp_path)
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        for words in run:
            assert main([*words, "--overwrite"]) == 1, words
            assert listing(tmp_path) == before, words
    finally:
        os.chdir(here)
    assert load(vit).method == "bcos"


def test_overwrite_takes_only_what_the_same_verb_wrote(folder_of, pictures, tmp_path):
    vit, shards, maps = folder_of("vit"), tmp_path / "shards", tmp_path / "maps"
    write: dict[Path, Callable[[Path], Any]] = {
        shards: lambda out: bcosify.shards(pictures, out, overwrite=True, progress=False),
        maps: lambda out: bcosify.explain(vit, pictures, "top1", out=out, overwrite=True),
    }
    for out, verb in write.items():
        verb(out)
        verb(out)
        for other in set(write) - {out}:
            if other.exists():
                with pytest.raises(CheckpointError, match="was not written by this command"):
                    verb(other)
        (out / "mine.txt").write_text("mine")
        with pytest.raises(CheckpointError, match="holds what this command did not write .mine.txt."):
            verb(out)
        (out / "mine.txt").unlink()
        link = out.with_name(f"{out.name}-link")
        link.symlink_to(out)
        with pytest.raises(CheckpointError, match="is a link"):
            verb(link)


@pytest.mark.parametrize("out", ["", "."])
def test_an_empty_name_is_no_place_to_write_to(out):
    with pytest.raises(CheckpointError, match="--out is empty"):
        check_free(Path(out), overwrite=True, own=files.all_of_it)
    with pytest.raises(CheckpointError, match="--out is empty"):
        check_free(Path("a\0b"))


def test_the_old_folder_is_put_back_where_the_last_rename_fails(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    rename, calls = os.rename, []

    def fail_once(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(files.os, "rename", fail_once)
    with (
        pytest.raises(CheckpointError, match="could not be written"),
        new_folder(out, True, files.all_of_it) as scratch,
    ):
        (scratch / "new").write_text("new")
    assert listing(tmp_path) == {"out/old": b"old"} and len(calls) == 3


def test_the_umask_is_honoured_and_scratch_places_are_nobody_elses(tmp_path):
    before = os.umask(0o027)
    try:
        with new_folder(tmp_path / "folder") as scratch:
            assert stat.S_IMODE(scratch.parent.stat().st_mode) == 0o700
            (scratch / "file").write_text("")
            save_file({"weight": torch.zeros(1)}, scratch / "weights")  # of mode 0600, whatever the umask is
        with new_file(tmp_path / "file") as first:
            save_file({"weight": torch.zeros(1)}, first)
        with new_file(tmp_path / "file") as second:
            second.write_text("")
    finally:
        os.umask(before)
    assert first.parent != second.parent and str(os.getpid()) not in first.parent.name.split(".")
    modes = {
        name: stat.S_IMODE((tmp_path / name).stat().st_mode)
        for name in ("folder", "folder/file", "folder/weights", "file")
    }
    assert modes == {"folder": 0o750, "folder/file": 0o640, "folder/weights": 0o640, "file": 0o640}


# ------------------------------------------------------------------------------------------------- memory and time


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in folders here")
def test_pipes_and_devices_are_not_opened(folder_of, tmp_path):
    folder = folder_of("vit")
    (folder / "probe.safetensors").unlink()
    os.mkfifo(folder / "probe.safetensors")
    with pytest.raises(CheckpointError, match="probe.safetensors is a pipe, a device or the like"):
        load(folder)
    os.mkfifo(tmp_path / "pipe.npy")
    for path in (tmp_path / "pipe.npy", Path("/dev/zero"), tmp_path):
        with pytest.raises(DataError, match="and no regular file. It is not opened"):
            check_file(path, raises=DataError)
    (tmp_path / "large").write_bytes(b"12345")
    with pytest.raises(DataError, match="has 5 bytes; such a file has at most 4"):
        check_file(tmp_path / "large", 4, DataError)


PREPROCESS = [
    {"crop_pct": 1e-4},
    {"crop_pct": float("nan")},
    {"crop_pct": "0.9"},
    {"size": [0, 32]},
    {"size": [32.0, 32]},
    {"mean": [0.5, 0.5]},
    {"mean": [0.5, 0.5, None]},
    {"std": [0, 1, 1]},
    {"interpolation": "evil"},
    {"interpolation": 3},
    {"fill": "black"},
    {"unheard_of": 1},
]


@pytest.mark.parametrize("changes", PREPROCESS, ids=str)
def test_preprocessing_that_takes_no_end_or_makes_no_sense(folder_of, changes):
    folder = folder_of("vit")
    edit(folder / "bcosify.json", lambda record: record["preprocess"].update(changes))
    edit(folder / "config.json", lambda config: config["bcosify"]["preprocess"].update(changes))
    with pytest.raises(CheckpointError, match="no record of a student"):
        load(resigned(folder))
    with pytest.raises(CheckpointError, match="does not say how pictures are prepared"):
        transformers.AutoImageProcessor.from_pretrained(folder)


def test_attention_over_more_than_any_model_compares():
    """60,000 register tokens are few numbers in a file."""
    attend = torch.nn.functional.scaled_dot_product_attention
    tokens, few = torch.empty(1, 1, 60_000, 8, device="meta"), torch.randn(1, 2, 5, 8)
    with bounded_run("here"):
        assert torch.equal(attend(few, few, few), attend(few, few, few))
        with pytest.raises(CheckpointError, match="here describes a model that compares .* more than any in use"):
            attend(tokens, tokens, tokens)


def test_near_misses_are_not_looked_for_without_end():
    assert near_miss("x" * 10**6, ["x" * 10**6]) == ""
    assert near_miss("b", (str(number) for number in itertools.chain(range(10**9), ["b"]))) == ""
    assert near_miss("tabbi", ["tabby"]) == " Did you mean 'tabby'?"


# -------------------------------------------------------------------------------------------------------- tracebacks


def weights(change: Callable[[dict[str, Any]], Any], name: str = "model.safetensors") -> Callable[[Path], None]:
    def edit_weights(folder: Path) -> None:
        save_file(change(load_file(folder / name)), folder / name)

    return edit_weights


def record(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "bcosify.json", change)


def as_kind(kind: torch.dtype) -> Callable[[dict[str, Any]], Any]:
    return lambda state: {name: one.to(kind) if one.is_floating_point() else one for name, one in state.items()}


BROKEN: dict[str, Callable[[Path], None]] = {
    "labels: too few": record(lambda values: values.update(labels=["a"])),
    "labels: numbers": record(lambda values: values.update(labels=[1] * 1000)),
    "names: NUL": record(lambda values: values["files"].update({"a\0b": ""})),
    "weights: whole numbers": weights(as_kind(torch.int64)),
    "weights: eight bits": weights(as_kind(torch.float8_e4m3fn)),
    "probe: no output": weights(lambda state: {"input": state["input"]}, "probe.safetensors"),
    "probe: truth values": weights(lambda state: {k: v.bool() for k, v in state.items()}, "probe.safetensors"),
    "history: a number": record(lambda values: values["history"].update(conversion=3)),
    "swaps: arguments": record(lambda values: values["swaps"][0].update(args={"x": 1})),
    "swaps: a name": record(lambda values: values["swaps"][0].update(name="a\0")),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_records_and_weights_are_one_line(folder_of, kind, capsys):
    folder = folder_of("vit")
    BROKEN[kind](folder)
    assert main(["inspect", str(resigned(folder))]) == 1
    said = capsys.readouterr().err
    assert said.startswith("bcosify inspect: ") and "Traceback" not in said and "\0" not in said


EVALUATION: dict[str, Any] = {"model": {}, "data": {}, "settings": {}, "curves": [], "seconds": [], "schema": 1}
ROW = {"section": "fidelity", "metric": "x", "model": "student", "value": 1.0}


@pytest.mark.parametrize(
    "changes",
    [{"value": "a"}, {"value": [1]}, {"section": ["a"]}, {"low": {}}, {"n": "many"}, {"unheard_of": 1}, {"reason": 3}],
    ids=str,
)
def test_evaluations_with_values_of_another_kind(tmp_path, changes):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        values = {**EVALUATION, "measurements": [{**ROW, **changes}]}
        (tmp_path / name / "evaluation.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match="is no evaluation of schema 1"):
        bcosify.evaluate.compare([tmp_path / "a", tmp_path / "b"], tmp_path / "out.html")
    assert not (tmp_path / "out.html").exists()


def test_labels_with_new_lines_and_terminal_codes_are_drawn_and_printed(folder_of, pictures, tmp_path, capsys):
    folder = folder_of("vit")
    edit(folder / "bcosify.json", lambda values: values.update(labels=["a\n\x1b[31mb"] * 1000))
    out = tmp_path / "maps"
    assert (
        main(["explain", str(resigned(folder)), str(pictures / "p0.png"), "--target", "top1", "--out", str(out)]) == 0
    )
    assert (out / "p0.png").is_file() and "\x1b" not in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- escapes


def test_no_terminal_obeys_the_texts_of_others(capsys):
    assert printable("a\x1b]0;x\x07b\rc\u202ed\x9be\nf\tg") == "a\\x1b]0;x\\x07b\\x0dc\\u202ed\\x9be\nf\tg"
    assert printable("Zürich, 東京, \N{GRINNING FACE}") == "Zürich, 東京, \N{GRINNING FACE}"
    assert "\x1b" not in str(DataError("\x1b[2Jx")) and "\\x1b[2Jx" in str(DataError("\x1b[2Jx"))
    assert main(["inspect", "\x1b[31mred"]) == 1
    show_table("\x1b[1mtitle", ["\x1b[2mhead"], [["\x1b[3mcell"]])
    assert "\x1b" not in capsys.readouterr().err


LINK = re.compile(r"(?<!\\)\]\(")
NASTY = "<img src=x onerror=alert(1)>[x](javascript:alert(1))\n\n# big\n| a | ![p](http://e.example/p) `c` & *b* _i_"


def test_texts_of_others_are_words_in_markdown():
    found = markdown(NASTY)
    assert "<" not in found and "\n" not in found
    assert all(found[at - 1] == "\\" for at, sign in enumerate(found) if sign in "[]*`|!~")
    assert [markdown(word) for word in ("# a", "- a", "---", "-1.5", "a_b", "_a_")] == [
        "\\# a",
        "\\- a",
        "\\---",
        "-1.5",
        "a_b",
        "\\_a\\_",
    ]
    assert markdown_code("a`b|c\n<d>") == "`a'b/c <d>`"
    assert markdown_link("https://example.org/a_b", "text") == "[text](https://example.org/a_b)"
    for address in ("javascript:alert(1)", "https://a b", "https://a) [x](y", "data:text/html,x"):
        assert not LINK.search(markdown_link(address, "text"))


def test_a_card_says_what_others_wrote_as_words(honest):
    import dataclasses

    student = load(honest["vit"])
    source = dataclasses.replace(student.source, reference=f"timm:{NASTY}`", architecture=NASTY)
    recipe = {"image_size": 32, "batch_size": 4, "seed": 0, "phases": [{"objective": NASTY, "pictures": 4}]}
    base = Base(NASTY, None, NASTY, "javascript:alert(1)", found=NASTY)
    card = card_of(
        dataclasses.replace(student, source=source),
        "org/name",
        base,
        Licence("mit", "javascript:alert(1)"),
        recipe=recipe,
        data=NASTY,
    )
    text = re.sub(r"\\.", "", card.text)  # without escaped signs
    outside = "".join(text.split("`")[::2])  # in code spans signs are plain
    assert len(text.split("`")) % 2 == 1 and "<img" not in outside and "\n# big" not in text
    assert not re.search(r"\]\((javascript|http://e.example)", outside) and "https://arxiv.org" in outside


def test_a_licence_links_to_a_page():
    with pytest.raises(PublishError, match="the address of a page is wanted"):
        choose_licence(Base("x"), "mit", "javascript:alert(1)")


def test_names_of_pictures_are_printed_safely(tmp_path, capsys):
    folder = tmp_path / "pics"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "good.png")
    (folder / "bad\x1b[31m.png").write_bytes(b"no picture")
    assert main(["shards", str(folder), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    assert "\x1b" not in said and "bad\\x1b[31m.png" in said
