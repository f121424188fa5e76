"""One file that computes what the student computes, run by who reads it: ONNX Runtime and torch.export."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from bcosify.cli.main import main
from bcosify.convert import (
    BcosConfig,
    CaStreamConfig,
    FaCnnConfig,
    KMeansConfig,
    Student,
    convert,
    load_teacher,
    save,
    set_strength,
)
from bcosify.core.errors import CheckpointError
from bcosify.explain import ClassTarget, explain
from bcosify.publish import formats as module
from bcosify.publish.formats import FORMATS, export
from torch import Tensor

from configs import VISION
from folders import write_hf
from tiny import tiny_teacher

SIZE = 64


@pytest.fixture(autouse=True)
def offline(monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def student() -> Callable[..., Student]:
    """student(NAME, CONFIG): a timm student with random weights that left its start."""

    def make(name: str = "test_vit", config=None) -> Student:
        teacher = tiny_teacher(name, SIZE)
        made = convert(teacher, config or BcosConfig())
        set_strength(made.model, b=1.5, beta=0.5, dampening=0.5)
        return made

    return make


def run(path: Path, format: str, *inputs: Tensor) -> list[Tensor]:
    """What other people's programs make of the file."""
    if format == "torch":
        with torch.no_grad():
            outputs = torch.export.load(path).module()(*inputs)
        return [outputs] if isinstance(outputs, Tensor) else list(outputs)
    session = onnxruntime.InferenceSession(path.read_bytes())
    named = zip((one.name for one in session.get_inputs()), (one.numpy() for one in inputs), strict=True)
    return [torch.from_numpy(one) for one in session.run(None, dict(named))]


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "format"), [("test_vit", "onnx"), ("test_vit", "torch"), ("test_efficientnet", "torch")]
)
def test_a_file_computes_what_the_student_computes(student, tmp_path, name, format):
    made = student(name)
    out = tmp_path / "model"
    exported = export(made, out, format)
    assert exported.outputs == ("logits",) and exported.error <= FORMATS[format].tolerance
    for batch in (1, 2, 5):
        pictures = torch.randn(batch, 3, SIZE, SIZE)
        (logits,) = run(out, format, pictures)
        expected = made.model(pictures)
        assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and exported.bytes == out.stat().st_size


@torch.no_grad()
def test_features_of_a_transformers_student(tmp_path):
    made = convert(load_teacher(f"hf:{write_hf(tmp_path / 'hf', 'Dinov2Model', 'Dinov2Config', **VISION)}"))
    exported = export(made, tmp_path / "model.onnx")
    pictures = torch.randn(4, 3, *made.preprocess.size)
    (features,) = run(exported.out, "onnx", pictures)
    assert exported.outputs == ("features",)
    torch.testing.assert_close(features, made.model(pictures), rtol=1e-4, atol=1e-5)


def test_the_file_says_how_pictures_are_prepared(student, tmp_path):
    made = student()
    export(made, tmp_path / "a.onnx", "onnx")
    (entry,) = [p.value for p in onnx.load(tmp_path / "a.onnx").metadata_props if p.key == "bcosify"]
    files = {"bcosify": ""}
    export(made, tmp_path / "a.pt2", "torch")
    torch.export.load(tmp_path / "a.pt2", extra_files=files)
    for facts in (json.loads(entry), json.loads(files["bcosify"])):
        assert facts["method"] == "bcos" and tuple(facts["preprocess"]["mean"]) == made.preprocess.mean


@pytest.mark.parametrize(("config", "format"), [(FaCnnConfig(), "onnx"), (KMeansConfig(), "torch")], ids=str)
def test_explanations_are_those_of_explain(student, tmp_path, config, format):
    made = student("test_resnet", config)
    exported = export(made, tmp_path / "model", format, explain=True)
    assert exported.inputs == ("pixel_values", "classes") and exported.outputs == ("logits", "contributions")
    pictures, classes = torch.randn(3, 3, SIZE, SIZE), torch.tensor([7, 7, 2])
    outputs, contributions = run(exported.out, format, pictures, classes)
    oracle = explain(made.model, pictures, ClassTarget(classes[:, None]))
    torch.testing.assert_close(outputs, oracle.outputs, rtol=1e-4, atol=1e-5)
    scale = oracle.contributions.abs().max()
    assert (contributions - oracle.contributions[:, 0]).abs().max() <= 1e-4 * scale


def test_explanations_that_cannot_be_written_are_refused(student, tmp_path):
    with pytest.raises(CheckpointError, match="--method bcos is explained by a backward pass"):
        export(student(), tmp_path / "model.pt2", "torch", explain=True)
    # Its maps ask, while they are made, which constants are 0: no graph can.
    with pytest.raises(CheckpointError, match="with explanations: .*Nothing was written; leave --explain out"):
        export(student("test_resnet", CaStreamConfig()), tmp_path / "model.pt2", "torch", explain=True)
    assert not list(tmp_path.iterdir())


def test_what_computes_something_else_gets_no_name(student, tmp_path, monkeypatch):
    written = FORMATS["torch"]
    wrong = module.Format(".pt2", written.write, lambda path: lambda x: (written.open(path)(x)[0] * 1.01,), 1e-5)
    monkeypatch.setitem(FORMATS, "torch", wrong)
    with pytest.raises(CheckpointError, match=r"as torch it computes something else \(differs by 1.0e-02"):
        export(student(), tmp_path / "model.pt2", "torch")
    assert not list(tmp_path.iterdir())


def test_failures_are_said_and_leave_nothing(student, tmp_path, monkeypatch):
    made = student()

    def missing(*_):
        raise ModuleNotFoundError("No module named 'onnxscript'", name="onnxscript")

    monkeypatch.setitem(FORMATS, "onnx", module.Format(".onnx", missing, FORMATS["onnx"].open, 1e-4))
    with pytest.raises(CheckpointError, match=r"needs onnxscript. Run: pip install 'bcosify\[export\]'"):
        export(made, tmp_path / "model.onnx", "onnx")
    monkeypatch.undo()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setitem(FORMATS, "onnx", module.Format(".onnx", full, FORMATS["onnx"].open, 1e-4))
    with pytest.raises(CheckpointError, match=r"could not be written: .*No space left on device. Nothing was left"):
        export(made, tmp_path / "model.onnx", "onnx")
    monkeypatch.undo()
    monkeypatch.setattr(module, "ONNX_LIMIT", 10)
    with pytest.raises(CheckpointError, match="one ONNX file holds 2 GB. Pass --format torch"):
        export(made, tmp_path / "model.onnx", "onnx")
    with pytest.raises(CheckpointError, match="no format 'onx'. Did you mean 'onnx'"):
        export(made, tmp_path / "model.onnx", "onx")
    assert not list(tmp_path.iterdir())
    (tmp_path / "there.pt2").touch()
    with pytest.raises(CheckpointError, match="exists already"):
        export(made, tmp_path / "there.pt2", "torch")


def test_the_command(student, tmp_path, monkeypatch, capsys):
    folder = save(student(), tmp_path / "vit")
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(folder), "--format", "torch", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert Path(result["out"]) == Path("vit.pt2") and Path("vit.pt2").is_file() and result["error"] <= 1e-5
    assert main(["export", str(folder), "--format", "torch"]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(["export", str(folder), "--format", "tflite"]) == 1
    assert "there are onnx, torch" in capsys.readouterr().err
