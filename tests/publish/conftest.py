"""A tiny student that could be anyone's, a loopback hub, and the command line against it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bcosify.cli.main import main
from bcosify.convert import convert, load_teacher, save, set_strength
from bcosify.evaluate.record import Evaluation, Measurement
from bcosify.evaluate.subject import weights_digest
from PIL import Image

from loopback_hub import TOKEN, Hub

# timm's record says apache-2.0 of it; its real weights are on a hub, so that random ones stand in for them.
REFERENCE = "timm:test_vit.r160_in1k"


@pytest.fixture(autouse=True)
def here_only(monkeypatch, tmp_path_factory) -> None:
    """No hub but the loopback's can be reached: everything that a test starts may look for one there."""
    for name in ("HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(f"{constants}.HF_HUB_DISABLE_XET", True)
    look_at("http://127.0.0.1:9", monkeypatch)
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub-cache")))
    monkeypatch.setattr("bcosify.publish.hub.PAUSE", 0.01)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)


def look_at(url: str, monkeypatch) -> None:
    """What HF_ENDPOINT does where it is set before huggingface_hub is imported."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def default_hub(hub: Hub, monkeypatch) -> Hub:
    """The loopback's hub, in the place of huggingface.co."""
    look_at(hub.url, monkeypatch)
    return hub


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.close()


@pytest.fixture(scope="session")
def student(tmp_path_factory) -> Path:
    """A converted folder: B = 2, no biases, ImageNet's classes."""
    torch.manual_seed(0)
    teacher = load_teacher(REFERENCE, pretrained=False, image_size=64)
    teacher = dataclasses.replace(teacher, source=dataclasses.replace(teacher.source, weights=None))
    made = convert(teacher)
    set_strength(made.model, b=2.0, beta=0.0)
    return save(made, tmp_path_factory.mktemp("publish") / "student")


@pytest.fixture
def evaluated(student: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes an evaluation of the student with the measurements that are passed, or a few."""
    from bcosify.convert import load

    def write(*measurements: Measurement, **model: Any) -> Path:
        digest = weights_digest(load(student, check=False).model)
        facts = {"reference": REFERENCE, "method": "bcos", "size": [64, 64], "student_weights": digest, **model}
        folder = tmp_path / "report"
        folder.mkdir(exist_ok=True)
        data = {"pictures": 12, "explained": 7, "data": "d" * 64, "masks": "e" * 64}
        Evaluation(facts, data, {"seed": 0}, measurements or FEW).write(folder)
        return folder

    return write


FEW = (
    Measurement("fidelity", "centred_cosine", "both", "", "output", 0.4321, 0.4, 0.5, 12),
    Measurement("fidelity", "top1_agreement", "both", "", "", 0.25, 0.1, 0.4, 12),
    Measurement("localisation", "energy_in_mask", "teacher", "explanation", "", 0.3579, 0.3, 0.4, 7),
    Measurement("localisation", "energy_in_mask", "student", "explanation", "", 0.2468, 0.2, 0.3, 7),
    Measurement("localisation", "gridpg", "student", "explanation", "native 2x2", reason="no grids could be made"),
    Measurement("faithfulness", "bias_share", "student", "explanation", "", 0.0123, 0.01, 0.02, 7),
)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (80, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "cat.png")
    return tmp_path / "cat.png"


@pytest.fixture
def publish(hub: Hub, student: Path, capsys) -> Callable[..., dict[str, Any]]:
    """`bcosify publish STUDENT org/name ...` against the loopback: {"code", "out", "err"} and what --json printed."""

    def run(*options: Any, folder: Path = student, repo: str = "org/name") -> dict[str, Any]:
        given = [str(folder), repo, "--endpoint", hub.url, "--json", *map(str, options)]
        code = main(["publish", *given])
        told = capsys.readouterr()
        return {"code": code, "out": told.out, "err": told.err, **(json.loads(told.out) if told.out else {})}

    return run
