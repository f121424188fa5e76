"""Published, fetched and opened by the real libraries and tools, as their users do it, in processes of their own."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from bcosify.convert import convert, load, load_teacher, save, set_strength
from PIL import Image
from safetensors.torch import save_file

from configs import VISION
from folders import write_hf, write_open_clip
from loopback_hub import TOKEN, Hub

TERMS = ("--license", "mit", "--license-link", "https://opensource.org/license/mit")
CLASSIFIER, PAIR, FEATURES = "my-lab/bcos-efficientnet-lite0", "my-lab/bcos-clip", "my-lab/bcos-vit"
DOORS = {
    CLASSIFIER: {"bcosify", "timm", "transformers"},
    PAIR: {"bcosify", "transformers", "open_clip"},
    FEATURES: {"bcosify", "transformers"},
}
# Publishes as often as there are lists of arguments; one process, as an import of torch costs seconds.
PUBLISH = "import json, sys; from bcosify.cli.main import main; sys.exit(max(map(main, json.loads(sys.argv[1]))))"
# Runs blocks of code as they stand, and compares what they opened with what the student said before.
OPEN = """
import json, sys, torch
from PIL import Image
from safetensors.torch import load_file
torch.set_num_threads(1)
OUTPUTS = {
    "student": lambda opened, x: opened.model(x),
    "logits": lambda opened, x: opened(x).logits,
    "features": lambda opened, x: (opened(x).image_embeds, opened(x).pooler_output)[opened(x).image_embeds is None],
    "pair": lambda opened, x: opened.encode_image(x),
    "network": lambda opened, x: opened.eval()(x),
}
PREPARED = {
    "picture": lambda found, picture: found["picture"],
    "processor": lambda found, picture: found["processor"](picture)["pixel_values"],
    "preprocess": lambda found, picture: found["preprocess"](picture)[None],
}
differences = {}
for name, repo, kind, code in json.loads(sys.argv[1]):
    found, known = {}, load_file(repo.replace("/", "-") + ".safetensors")
    exec(compile(code, name, "exec"), found)
    opened = found["student" if "student" in found else "model"]
    with torch.no_grad():
        output = OUTPUTS[kind](opened, known["input"])
    assert output.shape == known["output"].shape, (name, output.shape)
    differences[name] = [float((output - known["output"]).abs().max())]
    for what in set(PREPARED) & set(found):
        prepared = PREPARED[what](found, Image.open("cat.png").convert("RGB"))
        differences[name].append(float((prepared - known["prepared"]).abs().max()))
    if "explanation" in found:
        assert bool(found["explanation"].balanced().all()), name
print(json.dumps(differences))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a photograph, where everything runs."""
    place = tmp_path_factory.mktemp("round-trip")
    skimage = find_spec("skimage")
    assert skimage is not None and skimage.submodule_search_locations
    Image.open(Path(skimage.submodule_search_locations[0]) / "data" / "chelsea.png").save(place / "cat.png")
    return place


def environment(hub: Hub, place: Path, **more: str) -> dict[str, str]:
    """As a user's: HF_ENDPOINT, a token, and caches of its own; and nothing of the test's."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS"))
    }
    own = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(place / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    return {**kept, **own, "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1", **more}


def run(*command: str, hub: Hub, place: Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=place, env=environment(hub, place, **more), capture_output=True, text=True)


def save_students(place: Path) -> dict[str, Path]:
    """A real CNN with classes from timm, and tiny models with random weights from the other two libraries."""
    from transformers import ViTImageProcessor

    pair = write_open_clip(place / "clip", image_size=32, patch_size=8, width=32, layers=2, head_width=16)
    features = write_hf(place / "vit", "ViTModel", "ViTConfig", **VISION)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(features)
    references = {
        CLASSIFIER: "bundled:efficientnet_lite0",
        PAIR: f"open_clip:local-dir:{pair}",
        FEATURES: f"hf:{features}",
    }
    folders = {}
    for repo, reference in references.items():
        student = convert(load_teacher(reference))
        set_strength(student.model, b=1.5, beta=0.5)
        folders[repo] = save(student, place / "students" / repo.partition("/")[2])
        pictures = torch.randn(2, 3, *student.preprocess.size)
        with torch.no_grad():
            known = {"input": pictures, "output": student.model(pictures)}
        known["prepared"] = student.preprocess.transform()(Image.open(place / "cat.png"))[None].contiguous()
        save_file(known, place / f"{repo.replace('/', '-')}.safetensors")
    return folders


@pytest.fixture(scope="module")
def shelf(place: Path) -> Iterator[Hub]:
    """A hub on which a process has published a student of each library."""
    folders = save_students(place)
    hub = Hub()
    options = {CLASSIFIER: ["--picture", "cat.png"], PAIR: [*TERMS], FEATURES: [*TERMS, "--out", "staged"]}
    arguments = [["publish", str(folder), repo, *options[repo]] for repo, folder in folders.items()]
    ended = run(sys.executable, "-c", PUBLISH, json.dumps(arguments), hub=hub, place=place)
    assert ended.returncode == 0, ended.stderr[-3000:]
    yield hub
    hub.close()


def blocks_of(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def kind_of(repo: str, code: str) -> str:
    if "load(" in code:
        return "student"
    if "transformers" in code:
        return "logits" if "ForImageClassification" in code else "features"
    return "pair" if "open_clip" in code else "network"


def test_every_snippet_of_the_cards_opens_the_same_function(shelf, place):
    blocks = []
    for repo, doors in DOORS.items():
        card = shelf.repos[repo].files()["README.md"].data
        found = blocks_of((card or b"").decode())
        assert len(found) == len(doors)
        blocks += [(f"{repo} card {i}", repo, kind_of(repo, code), code) for i, code in enumerate(found)]
    ended = run(sys.executable, "-c", OPEN, json.dumps(blocks), hub=shelf, place=place)
    assert ended.returncode == 0, ended.stderr[-3000:]
    differences = json.loads(ended.stdout.splitlines()[-1])
    assert set(differences) == {name for name, *_ in blocks}
    assert not any(any(found) for found in differences.values()), differences


def test_the_hf_tool_fetches_what_was_staged_and_its_own_upload_opens(shelf, place):
    hf = Path(sys.executable).with_name("hf")
    command = (str(hf),) if hf.is_file() else (sys.executable, "-m", "huggingface_hub.cli.hf")
    ended = run(*command, "download", FEATURES, "--local-dir", "fetched", hub=shelf, place=place)
    assert ended.returncode == 0, ended.stderr[-2000:]
    staged = {path.name: path.read_bytes() for path in (place / "staged").iterdir()}
    assert {name: (place / "fetched" / name).read_bytes() for name in staged} == staged
    ended = run(*command, "upload", "my-lab/by-hand", "staged", hub=shelf, place=place)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert {name: file.data for name, file in shelf.repos["my-lab/by-hand"].files().items() if name in staged} == staged
    load(place / "fetched")


def test_xet_carries_the_weights_and_no_log_or_file_holds_the_token(shelf, hub, place, tmp_path):
    """The client asks for an address of the Xet storage; this one is a folder, which hf_xet writes to by itself."""
    pytest.importorskip("hf_xet")
    hub.xet = tmp_path / "xet"
    hub.xet.mkdir()
    student = place / "students" / "bcos-vit"
    talkative = {"HF_DEBUG": "1", "HF_HUB_VERBOSITY": "debug", "RUST_LOG": "debug", "HF_HUB_DISABLE_XET": "0"}
    own = {"HF_HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path)}
    arguments = [["publish", str(student), "my-lab/by-xet", *TERMS, "--out", str(tmp_path / "out"), "--json"]]
    ended = run(sys.executable, "-c", PUBLISH, json.dumps(arguments), hub=hub, place=place, **talkative, **own)
    assert ended.returncode == 0, ended.stderr[-3000:]
    weights = hub.repos["my-lab/by-xet"].files()["model.safetensors"]
    assert weights.oid == hashlib.sha256((tmp_path / "out" / "model.safetensors").read_bytes()).hexdigest()
    assert weights.data is None and "GET /api/models/my-lab/by-xet/xet-write-token/main" in hub.asked
    assert sum(path.stat().st_size for path in hub.xet.rglob("*") if path.is_file()) > 0.3 * weights.size
    assert "curl" in ended.stderr  # the requests themselves are in the log
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert TOKEN not in ended.stdout + ended.stderr
    assert not any(TOKEN.encode() in path.read_bytes() for path in written)
