"""One folder, four libraries, the same numbers to the last bit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import bcosify.publish
import numpy as np
import open_clip
import pytest
import timm
import torch
import transformers
from bcosify.convert import (
    BcosConfig,
    CaStreamConfig,
    CodaConfig,
    FaCnnConfig,
    KMeansConfig,
    Student,
    convert,
    load,
    load_teacher,
    save,
    set_strength,
)
from bcosify.convert.layers import BcosLinear, scheduled_layers
from bcosify.convert.libraries.timm.models import load as load_timm
from bcosify.convert.randomise import randomise
from bcosify.core.errors import CheckpointError
from bcosify.core.pictures import noise_pictures
from PIL import Image
from torch import Tensor

from configs import VISION
from folders import resigned, write_hf, write_hf_clip, write_open_clip

SIZE = 64
# A timm architecture of every kind of head, with each method that fits it.
TIMM = {
    "bcos vit": ("test_vit", BcosConfig()),
    "bcos mobile": ("test_efficientnet", BcosConfig()),
    "bcos nhwc": ("test_convnext", BcosConfig()),
    "coda": ("test_resnet", CodaConfig()),
    "fa-cnn": ("test_resnet", FaCnnConfig()),
    "ca-stream of a token": ("test_vit", CaStreamConfig()),
    "ca-stream of an average": ("test_resnet", CaStreamConfig()),
    "kmeans": ("test_resnet", KMeansConfig()),
    "headless": ("test_vit3", BcosConfig()),
}


@pytest.fixture(autouse=True)
def offline(monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def pictures(size: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(3))


def moved(student: Student) -> Student:
    """Not at the start any more, so that every layer's strengths have to come back too."""
    if any(layer.strength_names for _, layer in scheduled_layers(student.model)):
        set_strength(student.model, b=1.5, beta=0.5, dampening=0.5)
    return student


@pytest.fixture(scope="module")
def timm_students(tmp_path_factory) -> dict[str, Path]:
    place, found = tmp_path_factory.mktemp("timm"), {}
    for kind, (name, config) in TIMM.items():
        torch.manual_seed(0)
        args = {"num_classes": 0} if kind == "headless" else {"num_classes": 10}
        teacher = load_teacher(f"timm:{name}", pretrained=False, image_size=SIZE)
        if args["num_classes"] != teacher.model.num_classes:
            teacher = load_timm(name, pretrained=False, **args)
        randomise(teacher.model, noise_pictures(2, (SIZE, SIZE)))
        teacher = type(teacher)(teacher.model, teacher.source, teacher.preprocess.at(SIZE), teacher.labels)
        found[kind] = save(moved(convert(teacher, config)), place / kind.replace(" ", "-"))
    return found


@pytest.fixture(scope="module")
def hf_students(tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("hf")
    siglip = {"text_config": {**VISION, "vocab_size": 32, "max_position_embeddings": 12}, "vision_config": VISION}
    folders = {
        "classifier": write_hf(place / "vit", "ViTForImageClassification", "ViTConfig", num_labels=5, **VISION),
        "pooled": write_hf(place / "dinov2", "Dinov2Model", "Dinov2Config", **VISION),
        "clip": write_hf_clip(place / "clip"),
        "siglip": write_hf(place / "siglip", "SiglipModel", "SiglipConfig", **siglip),
    }
    return {
        kind: save(moved(convert(load_teacher(f"hf:{folder}"))), place / f"{kind}-student")
        for kind, folder in folders.items()
    }


@pytest.fixture(scope="module")
def open_clip_students(tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("open_clip")
    own = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
    trunk = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 160}
    folders = {
        "vit": write_open_clip(place / "vit", **own),
        "custom": write_open_clip(place / "custom", model={"custom_text": True, "init_logit_bias": -10}, **own),
        "trunk": write_open_clip(place / "trunk", model={"custom_text": True}, **trunk),
    }
    return {
        kind: save(moved(convert(load_teacher(f"open_clip:local-dir:{folder}"))), place / f"{kind}-student")
        for kind, folder in folders.items()
    }


def wanted(folder: Path) -> tuple[Student, Tensor, Tensor]:
    """The student, pictures, and what it says of them."""
    student = load(folder)
    x = pictures(student.preprocess.size[0])
    with torch.no_grad():
        return student, x, student.model(x)


# ------------------------------------------------------------------------------------------------------------- timm


@torch.no_grad()
@pytest.mark.parametrize("kind", TIMM)
def test_timm_opens_the_same_function(timm_students, kind):
    student, x, expected = wanted(timm_students[kind])
    model: Any = timm.create_model(f"local-dir:{timm_students[kind]}", pretrained=True).eval()
    assert torch.equal(model(x), expected)
    config = timm.data.resolve_model_data_config(model)
    assert tuple(config["input_size"]) == (3, SIZE, SIZE) and tuple(config["mean"]) == student.preprocess.mean
    picture = Image.fromarray((np.random.default_rng(0).random((90, 120, 3)) * 255).astype("uint8"))
    transform = timm.data.create_transform(**config, is_training=False)
    assert torch.equal(transform(picture), student.preprocess.transform()(picture))


@torch.no_grad()
@pytest.mark.parametrize("kind", [kind for kind in TIMM if "ca-stream" not in kind and kind != "fa-cnn"])
def test_timm_features_and_heads_are_parts_of_the_same_function(timm_students, kind):
    _, x, expected = wanted(timm_students[kind])
    place = f"local-dir:{timm_students[kind]}"
    model: Any = timm.create_model(place, pretrained=True).eval()
    features = model.forward_features(x)
    assert torch.equal(model.forward_head(features), expected)
    headless: Any = timm.create_model(place, pretrained=True, num_classes=0).eval()
    assert headless.num_classes == 0
    assert torch.equal(headless(x), model.forward_head(features, pre_logits=True))


@torch.no_grad()
@pytest.mark.parametrize("kind", TIMM)
def test_timm_shows_the_stages_that_it_shows_of_the_source(timm_students, kind):
    """At the start a student is its teacher, so timm's own feature network of the source is the oracle."""
    name, _ = TIMM[kind]
    folder = timm_students[kind]
    student, x, _ = wanted(folder)
    set_strength(student.model, b=1.0, beta=1.0, dampening=0.0)
    start = save(student, folder.with_name(f"{folder.name}-start"), overwrite=True)
    ours: Any = timm.create_model(f"local-dir:{start}", pretrained=True, features_only=True).eval()
    oracle: Any = timm.create_model(name, features_only=True, **student.source.model_args).eval()
    assert ours.feature_info.channels() == oracle.feature_info.channels()
    assert ours.feature_info.reduction() == oracle.feature_info.reduction()
    assert [f.shape for f in ours(x)] == [f.shape for f in oracle(x)]
    stages = load(start).model.forward_intermediates(x, indices=ours.out_indices, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(ours(x), stages, strict=True))
    last: Any = timm.create_model(f"local-dir:{start}", pretrained=True, features_only=True, out_indices=(1,)).eval()
    assert len(last(x)) == 1


def test_a_new_timm_head_is_a_layer_of_the_method(timm_students):
    model: Any = timm.create_model(f"local-dir:{timm_students['bcos vit']}", pretrained=True, num_classes=3)
    assert model(pictures(SIZE)).shape == (2, 3) and model.num_classes == 3
    assert isinstance(model.head, BcosLinear) and model.head.strengths() == {"b": 1.5, "beta": 0.5, "carry": 0}


def test_timm_scripts_pass_arguments_that_ask_for_nothing(timm_students):
    place = f"local-dir:{timm_students['bcos vit']}"
    timm.create_model(place, pretrained=True, num_classes=10, in_chans=3, global_pool=None, drop_rate=0.0)
    with pytest.raises(CheckpointError, match="in_chans=1, img_size=96.*timm's arguments that it takes"):
        timm.create_model(place, pretrained=True, in_chans=1, img_size=96)
    empty: Any = timm.create_model(place, pretrained=False)
    empty.load_state_dict(load(timm_students["bcos vit"]).model.state_dict(), strict=True)
    with pytest.raises(CheckpointError, match="no architecture of its own"):
        timm.create_model("bcosify")


def test_the_clash_on_num_classes_is_avoided(timm_students):
    """transformers passes num_classes itself, and dies where timm's own export wrote it into model_args."""
    config = json.loads((timm_students["bcos vit"] / "config.json").read_text())
    assert "num_classes" not in config["model_args"] and config["num_classes"] == 10
    model = transformers.AutoModelForImageClassification.from_pretrained(timm_students["bcos vit"])
    assert model.config.num_labels == 10


# ----------------------------------------------------------------------------------------------------- transformers


@torch.no_grad()
@pytest.mark.parametrize("kind", [kind for kind in TIMM if kind != "headless"])
def test_transformers_opens_timm_students(timm_students, kind):
    _, x, expected = wanted(timm_students[kind])
    folder = timm_students[kind]
    model = transformers.AutoModelForImageClassification.from_pretrained(folder)
    assert not model.training and torch.equal(model(x).logits, expected)
    assert torch.equal(model(x, return_dict=False)[0], expected)
    labelled = model(x, labels=torch.tensor([1, 2]))
    assert torch.equal(labelled.loss, torch.nn.functional.cross_entropy(expected, torch.tensor([1, 2])))
    features = transformers.AutoModel.from_pretrained(folder)(x)
    headless: Any = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    assert torch.equal(features.pooler_output, headless(x))


@torch.no_grad()
def test_transformers_opens_students_without_classes(timm_students, hf_students, open_clip_students):
    for folder in (timm_students["headless"], hf_students["pooled"], *open_clip_students.values()):
        _, x, expected = wanted(folder)
        assert torch.equal(transformers.AutoModel.from_pretrained(folder)(x).pooler_output, expected)
        with pytest.raises(CheckpointError, match=r"has no classes.*AutoModel\.from_pretrained"):
            transformers.AutoModelForImageClassification.from_pretrained(folder)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["classifier", "pooled", "clip", "siglip"])
def test_transformers_opens_its_own(hf_students, kind):
    student, x, expected = wanted(hf_students[kind])
    output = transformers.AutoModel.from_pretrained(hf_students[kind])(x)
    own: Any = student.model
    if kind == "classifier":
        model = transformers.AutoModelForImageClassification.from_pretrained(hf_students[kind])
        assert torch.equal(model(x).logits, expected) and model.config.num_labels == 5
        assert torch.equal(own.model.classifier(output.last_hidden_state[:, 0]), expected)
    elif kind == "pooled":
        assert torch.equal(output.pooler_output, expected)
        assert torch.equal(output.last_hidden_state, own.model(x).last_hidden_state)
    else:
        assert torch.equal(output.image_embeds, expected)


def test_precision_and_device_are_asked_for_as_usual(timm_students):
    folder = timm_students["bcos vit"]
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.network.head.strengths() == {"b": 1.5, "beta": 0.5, "carry": 0}
    assert next(transformers.AutoModel.from_pretrained(folder, dtype="auto").parameters()).dtype == torch.float32
    with pytest.raises(CheckpointError, match="not opened with quantization_config"):
        transformers.AutoModel.from_pretrained(folder, quantization_config={"load_in_8bit": True})
    with pytest.raises(CheckpointError, match="stays on one device"):
        transformers.AutoModel.from_pretrained(folder, device_map="balanced")


def test_transformers_saves_a_student_that_opens(timm_students, tmp_path):
    folder = timm_students["bcos vit"]
    transformers.AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "again")
    _, x, expected = wanted(folder)
    assert torch.equal(load(tmp_path / "again").model(x), expected)
    with pytest.raises(CheckpointError, match="exists already"):
        transformers.AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "again")
    with pytest.raises(CheckpointError, match="no configuration to be built from"):
        transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(folder))


@pytest.mark.parametrize("source", ["timm", "hf", "open_clip"])
def test_the_image_processor_is_the_students_transform(timm_students, hf_students, open_clip_students, source):
    folder = {"timm": timm_students["bcos vit"], "hf": hf_students["clip"], "open_clip": open_clip_students["vit"]}
    student = load(folder[source])
    values = (np.random.default_rng(0).random((50, 70, 3)) * 255).astype("uint8")
    picture = Image.fromarray(values)
    expected = student.preprocess.transform()(picture)
    processor = transformers.AutoImageProcessor.from_pretrained(folder[source])
    for given in (picture, values, [picture, picture]):
        pixels = processor(given, return_tensors="pt")["pixel_values"]
        assert torch.equal(pixels, expected.expand(len(pixels), -1, -1, -1))
    assert json.loads(processor.to_json_string())["image_processor_type"] == "BcosifyImageProcessor"


# -------------------------------------------------------------------------------------------------------- open_clip


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit", "custom", "trunk"])
def test_open_clip_opens_its_own_pairs(open_clip_students, kind):
    student, x, expected = wanted(open_clip_students[kind])
    place = f"local-dir:{open_clip_students[kind]}"
    model, _, transform = open_clip.create_model_and_transforms(place)
    assert torch.equal(model.encode_image(x), expected)
    texts = ["a red bus", "a cat"]
    assert torch.equal(model.encode_text(open_clip.get_tokenizer(place)(texts)), student.text.embed(texts))
    assert model.logit_scale.exp().item() == pytest.approx(student.text.logit_scale)
    picture = Image.fromarray((np.random.default_rng(0).random((50, 70, 3)) * 255).astype("uint8"))
    assert torch.equal(transform(picture), student.preprocess.transform()(picture))
    model, _ = open_clip.create_model_from_pretrained(place)
    assert torch.equal(model.encode_image(x), expected)


def test_open_clip_goes_on_as_before_with_other_models(tmp_path):
    folder = write_open_clip(tmp_path / "plain", image_size=32, patch_size=8, width=32, layers=2, head_width=16)
    model = open_clip.create_model(f"local-dir:{folder}")
    assert model.encode_image(pictures(32)).shape == (2, 16)
    with pytest.raises(RuntimeError, match="not found in built-ins"):
        open_clip.create_model("no-such-model")


def test_open_clip_arguments_that_cannot_be_honoured_are_named(open_clip_students):
    place = f"local-dir:{open_clip_students['vit']}"
    with pytest.raises(CheckpointError, match="not opened with force_image_size, precision"):
        open_clip.create_model(place, precision="fp16", force_image_size=64)
    model, _, transform = open_clip.create_model_and_transforms(place, image_mean=(0.0, 0.0, 0.0), output_dict=True)
    assert model.output_dict and model.visual.preprocess_cfg["mean"] == (0.0, 0.0, 0.0)


# ------------------------------------------------------------------------------------------------------ wrong doors


def test_students_at_the_wrong_door_are_sent_to_the_right_one(timm_students, hf_students, open_clip_students):
    with pytest.raises(CheckpointError, match=r"from a model of transformers.*AutoModel\.from_pretrained\('"):
        timm.create_model(f"local-dir:{hf_students['clip']}", pretrained=True)
    with pytest.raises(
        CheckpointError, match=r"model of open_clip.*open_clip\.create_model_and_transforms\('local-dir"
    ):
        timm.create_model(f"local-dir:{open_clip_students['vit']}", pretrained=True)
    for folder in (timm_students["bcos vit"], hf_students["clip"]):
        with pytest.raises(CheckpointError, match=r"no pair of open_clip's towers.*AutoModel\.from_pretrained\('"):
            open_clip.create_model(f"local-dir:{folder}")


# ---------------------------------------------------------------------------------------------------- older folders


def older(folder: Path) -> Path:
    """The folder as it was written before there were doors: config.json in timm's words for the source."""
    config = {"architecture": "test_vit", "num_classes": 10, "model_args": {}, "pretrained_cfg": {"num_classes": 10}}
    (folder / "config.json").write_text(json.dumps(config))
    return resigned(folder)


def test_older_folders_still_load_and_open_at_the_doors_once_saved_again(timm_students, tmp_path):
    _, x, expected = wanted(timm_students["bcos vit"])
    old = older(save(load(timm_students["bcos vit"]), tmp_path / "old"))
    assert torch.equal(load(old).model(x), expected)
    again = save(load(old), tmp_path / "new")
    assert torch.equal(timm.create_model(f"local-dir:{again}", pretrained=True).eval()(x), expected)


# ----------------------------------------------------------------------------------------- nothing but one import


SNIPPETS: dict[str, Callable[[Path], str]] = {
    "timm": lambda folder: f"import timm; model = timm.create_model('local-dir:{folder}', pretrained=True).eval()",
    "transformers": lambda folder: (
        "import transformers; model = transformers.AutoModelForImageClassification.from_pretrained("
        f"{str(folder)!r}); model = (lambda m: lambda x: m(x).logits)(model)"
    ),
}


@pytest.mark.parametrize("library", SNIPPETS)
def test_one_import_opens_the_doors(timm_students, library):
    """In a process of its own, where nothing else was imported; without it the library says that it does not know."""
    folder = timm_students["bcos vit"]
    _, x, expected = wanted(folder)
    code = f"""
import torch
torch.set_num_threads(1)
{SNIPPETS[library](folder)}
x = torch.randn(2, 3, {SIZE}, {SIZE}, generator=torch.Generator().manual_seed(3))
print(model(x).double().sum().item())
"""
    opened = run(f"import bcosify.publish\n{code}")
    assert float(opened.stdout) == expected.double().sum().item(), opened.stderr
    closed = run(code)
    assert closed.returncode and "bcosify" in closed.stderr


def test_open_clip_without_the_import_does_not_make_one_up(open_clip_students):
    place = f"local-dir:{open_clip_students['vit']}"
    code = f"import open_clip; open_clip.create_model_and_transforms({place!r}); print('opened')"
    assert run(f"import bcosify.publish\n{code}").stdout == "opened\n"
    closed = run(code)
    assert closed.returncode and "bcosify" in closed.stderr


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())


def environment() -> dict[str, str]:
    import os

    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


# ----------------------------------------------------------------------------------------------------- real weights


@torch.no_grad()
def test_a_real_model_opens_everywhere(tmp_path):
    student = convert("bundled:efficientnet_lite0")
    set_strength(student.model, b=1.3, beta=0.7)
    folder = save(student, tmp_path / "lite0")
    spec = find_spec("skimage")
    assert spec is not None and spec.submodule_search_locations
    picture = Image.open(Path(spec.submodule_search_locations[0]) / "data" / "chelsea.png")
    x = student.preprocess.transform()(picture)[None]
    expected = bcosify.publish.load(folder).model(x)
    assert torch.equal(timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(x), expected)
    model = transformers.AutoModelForImageClassification.from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    pixels = processor(picture)["pixel_values"]
    assert torch.equal(pixels, x) and torch.equal(model(pixels).logits, expected)
    assert model.config.id2label[281].startswith("tabby")
    stages = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True).eval()(x)
    oracle = timm.create_model("tf_efficientnet_lite0", features_only=True).eval()(x)
    assert [stage.shape for stage in stages] == [stage.shape for stage in oracle]
