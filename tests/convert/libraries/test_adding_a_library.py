"""A library is one descriptor and the line that registers it: nothing else has to know of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bcosify.align.prepare import checkpoint_gradients
from bcosify.cli.main import main
from bcosify.convert import Preprocess, Source, Teacher, load, load_teacher, reload_teacher, token_grid
from bcosify.convert.libraries import (
    LIBRARIES,
    SCHEMES,
    Door,
    Features,
    FolderMark,
    Library,
    Origin,
    Scheme,
    build,
    reference_forms,
    register,
    register_schemes,
)
from bcosify.convert.output import output_kind
from bcosify.core.errors import CheckpointError, RecipeError, SourceError
from bcosify.publish.card import load_lines
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

# ---------------------------------------------------------------------------------- what would be the library's folder

CLASSES = ("cat", "dog", "bus")


class ToyNet(nn.Module):
    """Two convolutions, an average and a classifier."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, len(CLASSES))
        self.recomputes = False

    def last(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu()).relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(x).mean((2, 3)))


def load_toy(name: str, *, pretrained: bool, weights: Path | None, width: int = 8) -> Teacher:
    torch.manual_seed(0)
    model = ToyNet(width).eval()
    preprocess = Preprocess((32, 32), (0.5,) * 3, (0.5,) * 3, library="toy")
    return Teacher(model, Source(f"toy:{name}", "toy", "ToyNet", {"width": width}), preprocess, CLASSES)


def build_toy(source: Source) -> nn.Module:
    return ToyNet(**source.model_args).eval()


def toy_transform(record: Preprocess) -> Callable[[Image.Image], Tensor]:
    return lambda picture: (pil_to_tensor(picture.resize(record.size[::-1])) / 255 - 0.5) / 0.5


def toy_features(network: Any, pictures: Tensor, has_classes: bool) -> Features:
    last = network.last(pictures)
    return Features(last, last.mean((2, 3)) if has_classes else network(pictures))


def toy_checkpointing(model: Any, on: bool) -> bool:
    model.recomputes = on
    return True


TOY = Library(
    name="toy",
    schemes=(
        Scheme(
            "toy",
            ("toy:NAME",),
            "toy models",
            load_toy,
            origin=lambda name, source: Origin(f"the toy {name}", licence="mit", found="the toy's record"),
            options={"width": 8},
        ),
    ),
    build=build_toy,
    transforms={"toy": toy_transform},
    token_grid=lambda model, pictures: model.last(pictures),  # type: ignore[operator]
    class_count=lambda source, model: len(CLASSES),
    features=toy_features,
    load_options=lambda source: {"width": source.model_args["width"]},
    set_checkpointing=toy_checkpointing,
    folder=FolderMark("toy.json", lambda folder, config: (folder / "toy.json").is_file()),
    door=Door("toy.open({place!r})", 'toy.open("{repo}")\n'),
)

# --------------------------------------------------------------------------------------------------------- the line


@pytest.fixture
def toy() -> Iterator[Library]:
    register(TOY)
    yield TOY
    del LIBRARIES["toy"], SCHEMES["toy"]


@pytest.fixture
def folder(toy, tmp_path, capsys) -> Path:
    """What `bcosify convert toy:small` writes."""
    assert main(["convert", "toy:small", "--out", str(tmp_path / "toy"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["identity_error"] <= 1e-5
    return tmp_path / "toy"


@pytest.fixture
def picture(tmp_path) -> Path:
    values = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "cat.png")
    return tmp_path / "cat.png"


# -------------------------------------------------------------------------------------------------------- the verbs


def test_its_models_are_converted_saved_and_loaded(folder):
    student = load(folder)
    assert student.source == Source("toy:small", "toy", "ToyNet", {"width": 8}) and output_kind(student).count == 3
    assert json.loads((folder / "config.json").read_text())["num_classes"] == 3
    pictures = torch.randn(2, 3, 32, 32)
    teacher = reload_teacher(student.source)
    with torch.no_grad():
        torch.testing.assert_close(student.model(pictures), teacher.model(pictures))
        assert token_grid(student.source, teacher.model, pictures).shape == (2, 8, 32, 32)


def test_its_students_are_explained_and_inspected(folder, picture, tmp_path, capsys):
    assert main(["explain", str(folder), str(picture), "--out", str(tmp_path / "maps"), "--json"]) == 0
    capsys.readouterr()
    ledger = json.loads((tmp_path / "maps" / "cat.json").read_text())
    assert any(name in json.dumps(ledger) for name in CLASSES)
    assert main(["inspect", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["source"] == "toy:small"


def test_its_students_are_published_with_its_licence_and_its_lines(folder, capsys, tmp_path):
    assert main(["publish", str(folder), "org/toy", "--dry-run", "--out", str(tmp_path / "staged"), "--json"]) == 0
    card = (tmp_path / "staged" / "README.md").read_text()
    assert "license: mit" in card and 'toy.open("org/toy")' in card
    assert list(load_lines(load(folder), "org/toy")) == ["bcosify", "transformers", "toy"]
    capsys.readouterr()


@torch.no_grad()
def test_other_libraries_open_its_students_or_say_where_to_go(folder):
    import bcosify.publish  # noqa: F401 - opens the doors
    import timm
    import transformers

    student, pictures = load(folder), torch.randn(2, 3, 32, 32)
    features = transformers.AutoModel.from_pretrained(folder)(pictures)
    assert torch.equal(features.pooler_output, student.model.last(pictures).mean((2, 3)))
    assert torch.equal(features.last_hidden_state, student.model.last(pictures))
    logits = transformers.AutoModelForImageClassification.from_pretrained(folder)(pictures).logits
    assert torch.equal(logits, student.model(pictures))
    with pytest.raises(CheckpointError, match=r"from a model of toy.*Open it with toy\.open\('"):
        timm.create_model(f"local-dir:{folder}", pretrained=True)


def test_its_pictures_are_prepared_as_it_does(folder, picture):
    opened = Image.open(picture)
    assert torch.equal(load(folder).preprocess.transform()(opened), toy_transform(load(folder).preprocess)(opened))


def test_its_gradient_checkpointing_is_its_own(folder):
    student = load(folder)
    checkpoint_gradients(student.model, student.source.library)
    assert student.model.recomputes
    checkpoint_gradients(student.model, student.source.library, False)
    assert not student.model.recomputes
    with pytest.raises(RecipeError, match="ToyNet.* does not know it"):
        checkpoint_gradients(student.model, "timm")


def test_its_references_folders_and_help_are_known(toy, tmp_path, capsys):
    assert "toy:NAME" in reference_forms()
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    assert "toy:NAME" in capsys.readouterr().out
    (tmp_path / "toy.json").touch()
    assert load_teacher(f"dir:{tmp_path}").source.library == "toy"
    with pytest.raises(SourceError, match=r"Did you mean 'toy'\?.*toy:NAME"):
        load_teacher("toi:small")
    (tmp_path / "toy.json").unlink()
    with pytest.raises(SourceError, match="toy writes toy.json"):
        load_teacher(f"dir:{tmp_path}")


# ------------------------------------------------------------------------------------------------------ the options


def test_an_options_value_reaches_the_library_and_comes_back(toy):
    teacher = load_teacher("toy:small", width=16)
    assert teacher.model.first.out_channels == 16
    assert reload_teacher(teacher.source).model.first.out_channels == 16


def test_an_option_is_refused_where_it_is_misspelt_or_not_the_librarys(toy):
    with pytest.raises(SourceError, match=r"no option 'widht'\. Did you mean 'width'"):
        load_teacher("toy:small", widht=16)
    with pytest.raises(SourceError, match=r"--width 16 is for toy models \(toy:NAME\), not for timm:test_vit"):
        load_teacher("timm:test_vit", pretrained=False, width=16)
    # What asks for nothing is no wish.
    assert load_teacher("toy:small", head="auto", image_size=None).source.model_args == {"width": 8}
    with pytest.raises(SourceError, match=r"--head pooled is for transformers models \(hf:NAME\), not for toy:small"):
        load_teacher("toy:small", head="pooled")


# ----------------------------------------------------------------------------------------------------- the registry


def test_a_name_is_given_once(toy):
    with pytest.raises(ValueError, match="library 'toy': toy is registered already"):
        register(TOY)
    with pytest.raises(ValueError, match="library 'another': timm is registered already"):
        register(dataclasses.replace(TOY, name="another", schemes=(), transforms={"timm": toy_transform}))
    for name in ("timm", "bundled", "dir"):
        with pytest.raises(ValueError, match=f"the scheme '{name}' is registered already"):
            register_schemes(dataclasses.replace(TOY.schemes[0], name=name))
    assert "another" not in LIBRARIES


def test_an_unknown_library_is_named_wherever_it_is_asked(folder):
    """A folder of a version that had one more library."""
    student = load(folder)
    gone = dataclasses.replace(student, source=dataclasses.replace(student.source, library="toi"))
    for ask in (
        lambda: build(gone.source),
        lambda: token_grid(gone.source, gone.model, torch.zeros(1, 3, 32, 32)),
        lambda: output_kind(gone),
        lambda: reload_teacher(gone.source),
        lambda: checkpoint_gradients(gone.model, gone.source.library),
    ):
        with pytest.raises(SourceError, match=r"this version .* 'toi'\. Did you mean 'toy'\?"):
            ask()
