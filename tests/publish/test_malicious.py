"""Folders made to harm: refused by `load` and at every door, before anything of theirs is run or given memory."""

from __future__ import annotations

import json
import pickle
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bcosify.publish
import open_clip
import pytest
import timm
import torch
import transformers
from bcosify.convert import KMeansConfig, convert, load_teacher, save
from bcosify.convert.checkpoint import RECORD_LIMIT
from bcosify.core.errors import BcosifyError, CheckpointError
from safetensors.torch import load_file, save_file

from configs import VISION
from folders import resigned, write_hf, write_open_clip

HUGE = 10**9
MORE_MEMORY = 300 * 2**20  # bytes; the least of what is declared here would be gigabytes
DOORS: dict[str, Callable[[Path], Any]] = {
    "load": bcosify.publish.load,
    "timm": lambda folder: timm.create_model(f"local-dir:{folder}", pretrained=True),
    "transformers": lambda folder: transformers.AutoModel.from_pretrained(folder),
    "open_clip": lambda folder: open_clip.create_model_and_transforms(f"local-dir:{folder}"),
}


@pytest.fixture(autouse=True)
def offline(monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(autouse=True)
def _no_more_memory():
    """The most memory that the process ever had hardly grows in a test."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < MORE_MEMORY


@pytest.fixture(scope="module")
def _students(tmp_path_factory) -> dict[str, Path]:
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("honest")
    towers = write_open_clip(place / "clip", image_size=32, patch_size=8, width=32, layers=2, head_width=16)
    vit = write_hf(place / "vit", "ViTForImageClassification", "ViTConfig", num_labels=5, **VISION)
    students = {
        "timm": convert(load_teacher("timm:test_vit", pretrained=False, image_size=32)),
        "kmeans": convert(load_teacher("timm:test_resnet", pretrained=False, image_size=32), KMeansConfig()),
        "open_clip": convert(load_teacher(f"open_clip:local-dir:{towers}")),
        "hf": convert(load_teacher(f"hf:{vit}")),
    }
    return {kind: save(student, place / f"{kind}-student") for kind, student in students.items()}


@pytest.fixture
def folder_of(_students, tmp_path) -> Callable[[str], Path]:
    """folder_of(KIND): a student's folder, free to be turned into a trap."""
    return lambda kind: Path(shutil.copytree(_students[kind], tmp_path / "trap"))


class Bomb:
    """Leaves a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def edited(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The folder with a record that `change` changed and that is signed again."""
    record = json.loads((folder / "bcosify.json").read_text())
    change(record)
    return resigned(folder, **record)


def header(shapes: dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with this header, whatever follows it."""
    text = json.dumps(shapes).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(shape: list[int], end: int) -> dict[str, Any]:
    return {"t": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}


# ------------------------------------------------------------------------------------------------------------ files


HEADERS = {
    "more numbers than the file has bytes": header(tensor([2**60], 2**62)),
    "a product that overflows": header(tensor([2**40, 2**40], 4)),
    "a shape that its bytes do not hold": header(tensor([2**20], 4), b"\0" * 4),
    "a header longer than the file": header({}, length=2**62),
    "a header as long as memory": header({}, length=2**63 - 1),
    "sides below zero": header(tensor([-1], 4), b"\0" * 4),
    "no header": b"\0" * 4,
    "nothing": b"",
}


@pytest.mark.parametrize("door", ["load", "timm", "transformers"])
@pytest.mark.parametrize("kind", HEADERS)
@pytest.mark.parametrize("name", ["model.safetensors", "probe.safetensors"])
def test_headers_that_lie(folder_of, door, kind, name):
    folder = folder_of("timm")
    (folder / name).write_bytes(HEADERS[kind])
    with pytest.raises(CheckpointError, match=rf"{name} cannot be read as safetensors"):
        DOORS[door](resigned(folder))


@pytest.mark.parametrize("door", ["load", "timm", "transformers"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors"])
def test_pickles_are_never_opened(folder_of, tmp_path, door, name):
    folder = folder_of("timm")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    said = "cannot be read as safetensors" if name == "model.safetensors" else "pickles can run code and are never"
    with pytest.raises(CheckpointError, match=said):
        DOORS[door](resigned(folder))
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("door", ["load", "timm", "transformers"])
def test_an_index_of_weights_elsewhere_is_not_followed(folder_of, tmp_path, door):
    folder = folder_of("timm")
    outside = tmp_path / "outside.bin"
    outside.write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    index = {"metadata": {}, "weight_map": {"head.weight": "../outside.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    DOORS[door](folder)  # the weights are in one file, whatever an index says
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model.safetensors is missing"):
        DOORS[door](folder)
    assert not (tmp_path / "mark").exists()


NAMES = ["../outside.json", "/etc/hostname", "..", "text/../../outside.json", "a\\b", ""]


@pytest.mark.parametrize("door", ["load", "timm", "transformers"])
@pytest.mark.parametrize("name", NAMES)
def test_names_that_lead_out_of_the_folder(folder_of, door, name):
    folder = edited(folder_of("timm"), lambda record: record["files"].update({name: ""}))
    with pytest.raises(CheckpointError, match="no file name. Nothing outside of a model's folder is opened"):
        DOORS[door](folder)


@pytest.mark.parametrize("name", NAMES)
def test_names_of_text_files_that_lead_out_of_the_folder(folder_of, name):
    folder = edited(folder_of("open_clip"), lambda record: record["text"].update({name: ""}))
    for door in ("load", "transformers", "open_clip"):
        with pytest.raises(CheckpointError, match="no file name. Nothing outside of a model's folder is opened"):
            DOORS[door](folder)


@pytest.mark.parametrize("door", ["load", "timm", "transformers"])
@pytest.mark.parametrize("name", ["model.safetensors", "probe.safetensors", "bcosify.json", "config.json"])
def test_links_out_of_the_folder(folder_of, tmp_path, door, name):
    folder = folder_of("timm")
    (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match=rf"{name} is a link to .*outside of the folder. It is not followed"):
        DOORS[door](folder)


@pytest.mark.parametrize("name", ["text", "text/model.safetensors", "text/text.json"])
def test_links_of_the_text_tower(folder_of, tmp_path, name):
    folder = folder_of("open_clip")
    (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to(tmp_path / "outside")
    for door in ("load", "transformers", "open_clip"):
        with pytest.raises(CheckpointError, match="is a link to .*outside of the folder. It is not followed"):
            DOORS[door](folder)


def test_links_of_the_hubs_cache_are_followed(folder_of, tmp_path):
    """A snapshot there is a folder of links into the blobs beside it."""
    honest = folder_of("timm")
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "c0ffee", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in honest.iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert bcosify.publish.load(snapshot).method == "bcos"


# ---------------------------------------------------------------------------------------------------------- records


def args(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda record: record["source"]["model_args"].update(changes)


SETTINGS = {
    "width": args(embed_dim=HUGE),
    "a width that is a number the file could hold": args(embed_dim=65_536, num_heads=1),
    "depth": args(depth=HUGE),
    "a depth that is a number the file could hold": args(depth=60_000),
    "classes": args(num_classes=HUGE),
    "classes that are a number the file could hold": args(num_classes=300_000),
    "side": args(img_size=[HUGE, HUGE]),
    "below zero": args(embed_dim=-HUGE),
    "deep inside": args(block_args={"a": [{"b": HUGE}]}),
    "ratio": args(mlp_ratio=1e9),
}


@pytest.mark.parametrize("door", ["load", "timm", "transformers"])
@pytest.mark.parametrize("kind", SETTINGS)
def test_settings_of_a_model_that_is_not_in_the_file(folder_of, door, kind):
    with pytest.raises(CheckpointError, match="(Nothing was (built|loaded)|cannot be built)"):
        DOORS[door](edited(folder_of("timm"), SETTINGS[kind]))


@pytest.mark.parametrize("count", [HUGE, 60_000])
def test_settings_of_a_method_that_are_not_in_the_file(folder_of, count):
    for door in ("load", "timm", "transformers"):
        folder = folder_of("kmeans")
        with pytest.raises(CheckpointError, match="(Nothing was (built|loaded)|cannot be built)"):
            DOORS[door](edited(folder, lambda record: record["swaps"][-1]["args"].update(prototypes=count)))
        shutil.rmtree(folder)


def test_settings_of_towers_that_are_not_in_the_file(folder_of):
    def widen(record: dict[str, Any]) -> None:
        record["source"]["model_args"]["config"]["vision_cfg"].update(width=60_000, head_width=60_000)

    def deepen(record: dict[str, Any]) -> None:
        record["source"]["model_args"]["config"].update(num_hidden_layers=60_000)

    for kind, change, doors in (("open_clip", widen, ("load", "open_clip")), ("hf", deepen, ("load", "transformers"))):
        folder = edited(folder_of(kind), change)
        for door in doors:
            with pytest.raises(CheckpointError, match="Nothing was (built|loaded)"):
                DOORS[door](folder)
        shutil.rmtree(folder)


@pytest.mark.parametrize("change", [{"vocab_size": 10**12}, {"layers": HUGE}, {"width": 2**20, "heads": 1}], ids=str)
def test_a_text_tower_that_is_not_in_its_file(folder_of, change):
    folder = folder_of("open_clip")
    path = folder / "text" / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["text_cfg"].update(change)
    path.write_text(json.dumps(config))
    student = bcosify.publish.load(resigned(folder))  # it is opened with the first text
    with pytest.raises(CheckpointError, match="does not fit the model.*Nothing was loaded"):
        student.text.embed(["a"])
    with pytest.raises(CheckpointError, match="does not fit the model.*Nothing was loaded"):
        DOORS["open_clip"](folder)


def test_pictures_that_the_probe_is_none_of(folder_of):
    folder = edited(folder_of("timm"), lambda record: record["preprocess"].update(size=[10**4, 10**4]))
    for door in ("load", "timm", "transformers"):
        with pytest.raises(CheckpointError, match="probe.safetensors holds a picture .*Nothing was built"):
            DOORS[door](folder)


def test_an_image_processor_for_pictures_that_nobody_has(folder_of):
    folder = folder_of("timm")
    config = json.loads((folder / "config.json").read_text())
    config["bcosify"]["preprocess"]["size"] = [10**6, 10**6]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="does not say how pictures are prepared"):
        transformers.AutoImageProcessor.from_pretrained(folder)


FACTORY = {
    "checkpoint_path": args(checkpoint_path="evil.pth"),
    "pretrained": args(pretrained=True),
    "pretrained_cfg": args(pretrained_cfg={"file": "evil.pth"}),
    "architecture": lambda record: record["source"].update(architecture="local-dir:evil"),
    "itself": lambda record: record["source"].update(architecture="bcosify"),
}


@pytest.mark.parametrize("door", ["load", "timm", "transformers"])
@pytest.mark.parametrize("kind", FACTORY)
def test_a_skeleton_is_only_ever_built_empty(folder_of, tmp_path, monkeypatch, door, kind):
    monkeypatch.chdir(tmp_path)
    Path("evil.pth").write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    with pytest.raises(BcosifyError, match="(only ever built empty|has no architecture|no architecture of its own)"):
        DOORS[door](edited(folder_of("timm"), FACTORY[kind]))
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("key", ["auto_map", "attn_implementation", "quantization_config"])
def test_configurations_that_name_code_elsewhere(folder_of, key):
    folder = edited(folder_of("hf"), lambda record: record["source"]["model_args"]["config"].update({key: "evil/code"}))
    for door in ("load", "transformers"):
        with pytest.raises(BcosifyError, match=f"{key} in a recorded configuration could run other code"):
            DOORS[door](folder)


def test_code_that_config_json_asks_for_is_not_run(folder_of, tmp_path):
    """The class that is registered here opens it; transformers does not even ask."""
    folder = folder_of("timm")
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'mark')!r}).touch()\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    transformers.AutoModel.from_pretrained(resigned(folder))
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("door", ["load", "timm", "transformers"])
def test_another_function_and_other_keys(folder_of, door):
    folder = folder_of("timm")
    state = load_file(folder / "model.safetensors")
    save_file({**state, "norm.weight": state["norm.weight"] * 1.1}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="does not compute what it computed"):
        DOORS[door](resigned(folder))
    save_file({**state, "extra": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="does not fit the model: unknown extra.*Nothing was loaded"):
        DOORS[door](resigned(folder))
    save_file({"input": torch.zeros(1, 3, 32, 32), "output": torch.zeros(1, 7)}, folder / "probe.safetensors")
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"does not hold the \(1, 1000\) outputs"):
        DOORS[door](resigned(folder))


RECORDS = {
    "a missing key": lambda record: record.pop("preprocess"),
    "a source with more": lambda record: record["source"].update(more=1),
    "a source of no library": lambda record: record["source"].update(library="os"),
    "texts that are none": lambda record: record["source"].update(architecture=["test_vit"]),
    "arguments that are none": lambda record: record["source"].update(model_args=[]),
    "no method": lambda record: record.update(method="os.system"),
    "a method that is none": lambda record: record.update(method={}),
    "settings of another kind": lambda record: record["config"].update(scale=7),
    "a picture without sides": lambda record: record["preprocess"].update(size=[32]),
    "sides that are none": lambda record: record["preprocess"].update(size=["32", 32]),
    "labels that are none": lambda record: record.update(labels=3),
    "files that are none": lambda record: record.update(files=[]),
    "files of one's own": lambda record: record["files"].update({"evil.py": ""}),
}


@pytest.mark.parametrize("kind", RECORDS)
def test_records_of_another_form(folder_of, kind):
    folder = folder_of("timm")
    record = json.loads((folder / "bcosify.json").read_text())
    RECORDS[kind](record)
    files = record.get("files")
    (folder / "bcosify.json").write_text(json.dumps(record))
    with pytest.raises(BcosifyError):
        bcosify.publish.load(resigned(folder) if isinstance(files, dict) else folder)
    for door in ("timm", "transformers"):
        with pytest.raises(BcosifyError):
            DOORS[door](folder)


def test_records_too_deep_or_too_long(folder_of):
    folder = folder_of("timm")
    (folder / "bcosify.json").write_text("[" * 10**6)
    with pytest.raises(CheckpointError, match="bcosify.json is not JSON"):
        bcosify.publish.load(folder)
    with (folder / "bcosify.json").open("wb") as file:
        file.truncate(RECORD_LIMIT + 1)  # sparse: it takes no room
    with pytest.raises(CheckpointError, match="such a file has at most"):
        bcosify.publish.load(folder)
