"""What `bcosify explain` can be asked: texts, zero-shot labels, another picture, a patch, a direction."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from bcosify.cli.main import main
from bcosify.convert import load
from bcosify.explain.render import FRAME
from PIL import Image
from safetensors.torch import save_file

LABELS = ("a cat", "a cup of coffee", "a rocket", "a bus")


@pytest.fixture
def run(capsys, tmp_path):
    """run(WORD, ...) -> (exit code, rows on stdout, stderr) of `explain`, with a folder of its own to write."""

    def call(*words: object) -> tuple[int, list[dict], str]:
        shutil.rmtree(tmp_path / "maps", ignore_errors=True)
        code = main(["explain", *map(str, words), "--out", str(tmp_path / "maps"), "--json"])
        printed = capsys.readouterr()
        assert code == 0 or not (tmp_path / "maps").exists()
        return code, json.loads(printed.out) if printed.out else [], printed.err

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An open_clip pair with random weights."""
    place = tmp_path_factory.mktemp("pair") / "pair"
    place.mkdir()
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    vision = {"image_size": 64, "timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear"}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text, "custom_text": True}
    (place / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    state = open_clip.create_model(f"local-dir:{place}", load_weights=False).state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, place / "open_clip_model.safetensors")
    return place


@pytest.fixture(scope="module")
def student(folder) -> Path:
    """The pair, converted; not to be changed."""
    assert main(["convert", f"open_clip:local-dir:{folder}", "--out", str(folder.parent / "student")]) == 0
    return folder.parent / "student"


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A classifier without a text tower, converted."""
    out = tmp_path_factory.mktemp("plain") / "student"
    assert main(["convert", "timm:test_vit", "--no-pretrained", "--image-size", "64", "--out", str(out)]) == 0
    return out


def photograph(name: str) -> Path:
    spec = find_spec("skimage")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "data" / name


CAT, COFFEE = photograph("chelsea.png"), photograph("coffee.png")


def balanced(row: dict, tolerance: float = 1e-5) -> bool:
    return abs(row["input"] + sum(row["constants"].values()) - row["score"]) <= tolerance


def cosine(student: Path, text: str, picture: Path) -> float:
    opened = load(student)
    with torch.no_grad():
        image = opened.model(opened.preprocess.transform()(Image.open(picture))[None])
    return float(torch.nn.functional.cosine_similarity(image, opened.text.embed([text]))[0])


@pytest.mark.parametrize(
    "words", [("--text", "a red bus", "a cat"), ("--text", "a red bus", "--text", "a cat")], ids=["list", "repeated"]
)
def test_texts_are_cosines_that_add_up(run, student, words):
    code, rows, err = run(student, CAT, COFFEE, *words)
    assert code == 0 and [row["label"] for row in rows] == ["a red bus", "a cat"] * 2 and all(map(balanced, rows))
    assert rows[0]["score"] == pytest.approx(cosine(student, "a red bus", CAT), abs=1e-5)
    assert rows[3]["score"] == pytest.approx(cosine(student, "a cat", COFFEE), abs=1e-5)
    assert rows[0]["probability"] + rows[1]["probability"] == pytest.approx(1) and "probability" in err
    assert sorted(row["rank"] for row in rows[:2]) == [1, 2] and rows[0]["among"] == 2 and "decision" not in rows[0]


def test_an_unconverted_pair_takes_texts_too(run, folder):
    code, rows, _ = run(f"open_clip:local-dir:{folder}", CAT, "--text", "a cat")
    assert code == 0 and balanced(rows[0])


@pytest.mark.parametrize("kind", ["imagenet", "file"])
def test_templates_change_the_score(run, student, tmp_path, kind):
    (tmp_path / "templates.txt").write_text("a photo of {}\na drawing of {}\n")
    templates = "imagenet" if kind == "imagenet" else tmp_path / "templates.txt"
    code, rows, _ = run(student, CAT, "--text", "a cat", "--templates", templates)
    assert (
        code == 0 and balanced(rows[0]) and rows[0]["score"] != pytest.approx(cosine(student, "a cat", CAT), abs=1e-6)
    )


@pytest.mark.parametrize(
    ("words", "count"), [((), 3), (("--target", "top1"), 1), (("--target", "rocket", "bus"), 2)], ids=str
)
def test_zero_shot_explains_some_labels_and_ranks_all(run, student, tmp_path, words, count):
    (tmp_path / "labels.txt").write_text("\n".join(LABELS) + "\n\n")
    code, rows, _ = run(student, CAT, COFFEE, "--zero-shot", tmp_path / "labels.txt", *words)
    assert code == 0 and len(rows) == 2 * count and all(map(balanced, rows))
    ranking = rows[0]["zero_shot"]
    assert sorted(entry["label"] for entry in ranking) == sorted(LABELS)
    assert sum(entry["probability"] for entry in ranking) == pytest.approx(1, abs=1e-5)
    similarities = [entry["similarity"] for entry in ranking]
    assert similarities == sorted(similarities, reverse=True)
    for row in rows[:count]:
        (entry,) = [entry for entry in ranking if entry["label"] == row["label"]]
        assert row["score"] == pytest.approx(entry["similarity"], abs=1e-6)
        assert row["probability"] == pytest.approx(entry["probability"], abs=1e-6)
        assert row["decision"] == {"target": LABELS.index(ranking[0]["label"]), **_said(ranking[0])}
        assert ranking[row["rank"] - 1]["label"] == row["label"] and row["among"] == len(LABELS)
    if "bus" in words:
        assert [row["label"] for row in rows[:2]] == ["a rocket", "a bus"]


def _said(entry: dict) -> dict:
    return {"label": entry["label"], "probability": pytest.approx(entry["probability"], abs=1e-6)}


def test_a_class_stands_among_the_model_s_own(run, plain):
    opened = load(plain)
    with torch.no_grad():
        shares = opened.model(opened.preprocess.transform()(Image.open(CAT))[None])[0].softmax(0)
    order = shares.argsort(descending=True).tolist()
    code, rows, err = run(plain, CAT, "--target", order[0], order[4])
    assert code == 0 and [row["rank"] for row in rows] == [1, 5] and "probability" in err
    assert [row["probability"] for row in rows] == pytest.approx(shares[[order[0], order[4]]].tolist(), rel=1e-3)
    assert all(row["decision"]["target"] == order[0] and row["among"] == len(shares) for row in rows)


def test_a_picture_is_like_itself(run, plain):
    code, rows, _ = run(plain, CAT, "--like", CAT, COFFEE)
    assert code == 0 and all(balanced(row) for row in rows)
    assert (
        rows[0]["score"] == pytest.approx(1, abs=1e-5)
        and rows[1]["score"] < 1
        and rows[1]["label"] == "like coffee.png"
    )


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_a_direction_is_a_projection(run, student, tmp_path, suffix, count):
    directions = torch.randn(count, 16) if count > 1 else torch.randn(16)
    file = tmp_path / f"direction{suffix}"
    np.save(file, directions.numpy()) if suffix == ".npy" else save_file({"d": directions}, file)
    code, rows, _ = run(student, CAT, "--direction", file)
    opened = load(student)
    with torch.no_grad():
        image = opened.model(opened.preprocess.transform()(Image.open(CAT))[None])
    assert code == 0 and all(map(balanced, rows))
    expected = (torch.atleast_2d(directions) @ image[0]).tolist()
    assert [row["score"] for row in rows] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("place", ["0,0", "3,2"])
def test_a_patchs_own_feature_is_explained_by_its_surroundings(run, plain, tmp_path, place):
    code, rows, _ = run(plain, CAT, "--patch", place)
    opened = load(plain)
    row, column = map(int, place.split(","))
    with torch.no_grad():
        tokens = opened.model.forward_features(opened.preprocess.transform()(Image.open(CAT))[None])
    feature = tokens[0, opened.model.num_prefix_tokens :].unflatten(0, (4, 4))[row, column]
    assert code == 0 and rows[0]["score"] == pytest.approx(float(feature.norm()), rel=1e-4)
    assert rows[0]["patch"] == [row, column, 4, 4] and "probability" not in rows[0]
    drawn = np.asarray(Image.open(tmp_path / "maps" / "chelsea.png"))
    framed = (drawn == FRAME).all(-1).nonzero()[1]  # in the first tile, 336 pixels wide
    assert framed.min() == 20 + 84 * column - 2 * (column > 0)
    assert balanced(rows[0], 1e-4 * rows[0]["score"]) and "pos_embed" in rows[0]["constants"]
    np.save(tmp_path / "direction.npy", feature.numpy())
    _, along, _ = run(plain, CAT, "--patch", place, "--direction", tmp_path / "direction.npy")
    assert along[0]["score"] == pytest.approx(float(feature.square().sum()), rel=1e-4)
    assert along[0]["label"] == f"patch {place}, direction.npy"


def test_a_model_is_explained_at_another_size(run, plain, student):
    for model in (plain, student):
        code, _, _ = run(model, CAT, "--like", COFFEE, "--image-size", 96)
        assert code == 0


def test_convert_says_that_the_text_tower_is_kept(folder, tmp_path, capsys):
    assert main(["convert", f"dir:{folder}", "--out", str(tmp_path / "out")]) == 0
    assert "text tower: kept unchanged" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "kept, unchanged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("which", "words", "said"),
    [
        ("plain", ("--text", "a cat"), "timm:test_vit has no text tower"),
        ("plain", ("--zero-shot", "{tmp}/labels.txt"), "no text tower"),
        ("pair", ("--zero-shot", "{tmp}/empty.txt"), "empty.txt is empty"),
        ("pair", ("--zero-shot", "{tmp}/none.txt"), "none.txt: cannot be read"),
        ("pair", ("--zero-shot", "{tmp}/twice.txt"), "has 'a cat' twice"),
        ("pair", ("--zero-shot", "{tmp}/labels.txt", "--target", "rokcet"), "Did you mean"),
        ("pair", ("--zero-shot", "{tmp}/labels.txt", "--target", "top9"), "no top 9 of 4"),
        ("pair", ("--text", " "), "an empty text says nothing"),
        ("pair", ("--text", "cat", "--templates", "{tmp}/labels.txt"), "'a cat' has no {}"),
        ("plain", ("--templates", "imagenet"), "--templates is for --text and --zero-shot"),
        ("pair", ("--text", "cat", "--like", str(CAT)), "--text and --like are different questions"),
        ("plain", ("--patch", "4,0"), "no patch 4,0: a picture of 64x64 has 4 rows and 4 columns"),
        ("plain", ("--patch", "4"), "no ROW,COLUMN"),
        ("plain", ("--patch", "0,-1"), "no ROW,COLUMN"),
        ("plain", ("--patch", "0,0", "--like", str(CAT)), "--patch goes alone or with --direction"),
        ("pair", ("--direction", "{tmp}/seven.npy"), "Directions have 7 entries, but the model's output has 16"),
        ("pair", ("--direction", "{tmp}/zero.npy"), "finite and not 0"),
        ("pair", ("--direction", "{tmp}/pickled.npy"), "cannot be read"),
        ("pair", ("--direction", "{tmp}/labels.txt"), "never a pickle"),
        ("pair", ("--direction", "{tmp}/none.safetensors"), "none.safetensors"),
        ("pair", ("--like", "{tmp}/none.png"), "none.png"),
        ("plain", ("--image-size", "9"), "does not run on a picture of 9x9"),
    ],
)
def test_what_cannot_be_asked_is_told_and_nothing_is_written(run, student, plain, tmp_path, which, words, said):
    (tmp_path / "labels.txt").write_text("\n".join(LABELS))
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "twice.txt").write_text("a cat\na cat\n")
    np.save(tmp_path / "seven.npy", np.ones(7, "float32"))
    np.save(tmp_path / "zero.npy", np.zeros(16, "float32"))
    np.save(tmp_path / "pickled.npy", np.array([{"run": "me"}], dtype=object), allow_pickle=True)
    code, rows, err = run(
        plain if which == "plain" else student, CAT, *(word.replace("{tmp}", str(tmp_path)) for word in words)
    )
    assert (code, rows) == (1, []) and said in err and "Traceback" not in err


def test_a_word_is_a_text_to_a_model_that_compares_texts(student):
    opened = load(student)
    by_word, by_option = opened.explain(CAT, "a cat"), opened.explain(CAT, text="a cat")
    assert list(by_word) == list(by_option) and by_word[0].label == "a cat"
    assert opened.explain(CAT, "self")[0].target == "self"
