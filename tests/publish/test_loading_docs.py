"""docs/loading.md and what docs/verbs.md says of loading, run: every snippet, on a hub that is nothing but its cache.

Each in a process without a network.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bcosify.convert import convert, load_teacher, save, set_strength

from folders import write_open_clip

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SAME = """
import torch
for found in (timm_logits, transformers_logits):
    assert torch.equal(found, logits)
assert torch.allclose(folded(transform(picture)[None]), logits, rtol=1e-3, atol=1e-5)
assert torch.equal(features, headless(transform(picture)[None]))
assert torch.equal(model.forward_head(tokens), logits) and len(stages(transform(picture)[None])) == 2
clip = load("runs/clip")
assert torch.equal(pair.encode_image(preprocess(picture)[None]), clip.model(clip.preprocess.transform()(picture)[None]))
assert similarities.shape == (1, 2)
assert torch.equal(load("hf:my-org/bcos-vit@v1").model(inputs["pixel_values"]), logits)
print("all the same")
"""


def cached(student: Path, cache: Path, repository: str) -> None:
    """What the hub's cache holds of a repository: snapshots of links into blobs, and branches and tags by name."""
    place = cache / f"models--{repository.replace('/', '--')}"
    for name in ("main", "v1"):
        (place / "refs").mkdir(parents=True, exist_ok=True)
        (place / "refs" / name).write_text(COMMIT)
    (place / "blobs").mkdir()
    for number, file in enumerate(path for path in student.rglob("*") if path.is_file()):
        link = place / "snapshots" / COMMIT / file.relative_to(student)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place / "blobs" / str(number))
        link.symlink_to(os.path.relpath(place / "blobs" / str(number), link.parent))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A working folder with runs/vit and runs/clip, and a home whose cache has both as repositories."""
    place = tmp_path_factory.mktemp("user")
    torch.manual_seed(0)
    towers = write_open_clip(place / "plain", image_size=32, patch_size=8, width=32, layers=2, head_width=16)
    students = {
        "vit": convert(load_teacher("timm:test_vit", pretrained=False, image_size=64)),
        "clip": convert(load_teacher(f"open_clip:local-dir:{towers}")),
    }
    for name, student in students.items():
        set_strength(student.model, b=1.5, beta=0.5)
        cached(save(student, place / "runs" / name), place / "home" / "hub", f"my-org/bcos-{name}")
    return place


def run(place: Path, code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HOME": str(place / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("HF_HUB_CACHE", None)
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=place, env=environment, timeout=280
    )


def test_every_snippet_of_the_page_runs_and_they_agree(place):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "loading.md").read_text(), re.DOTALL)
    assert len(blocks) == 5
    picture = "from PIL import Image\nimport torch\ntorch.set_num_threads(1)\n"
    picture += "picture = Image.effect_noise((80, 90), 60).convert('RGB')\ntorch.set_grad_enabled(False)\n"
    ended = run(place, picture + "\n".join(blocks) + SAME)
    assert ended.stdout.endswith("all the same\n"), ended.stderr


def test_the_snippet_of_the_readme_opens_the_same_model_four_times(place):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "verbs.md").read_text(), re.DOTALL)
    (block,) = [block for block in blocks if "my-org/" in block]
    check = """
import torch
pictures = torch.randn(2, 3, *student.preprocess.size)
with torch.no_grad():
    logits = student.model(pictures)
    assert torch.equal(network.eval()(pictures), logits) and torch.equal(classifier(pictures).logits, logits)
    words = torch.zeros(1, clip.context_length, dtype=int)
    assert clip.encode_image(torch.randn(1, 3, 32, 32)).shape == clip.encode_text(words).shape
print("all the same")
"""
    ended = run(place, block + check)
    assert ended.stdout.endswith("all the same\n"), ended.stderr


def test_what_is_not_in_the_cache_is_said_with_what_to_do(place):
    code = """
from bcosify.convert import load
from bcosify.core.errors import CheckpointError
for name in ("my-org/other", "my-org/bcos-vit@v2", "hf-hub:runs/vit", "no such name", "../x"):
    try:
        load(name)
    except CheckpointError as error:
        print(name, "|", error)
"""
    lines = run(place, code).stdout.splitlines()
    assert len(lines) == 5
    assert all("cannot be had" in line and "HF_HOME" in line and "HF_TOKEN" in line for line in lines[:3])
    assert all("no hub repository can have that name" in line for line in lines[3:])


def test_every_variable_that_the_page_names_is_read_by_someone():
    import huggingface_hub.constants as hub
    from bcosify.core import files

    page = (ROOT / "docs" / "loading.md").read_text()
    named = set(re.findall(r"\| `((?:HF|BCOSIFY)_[A-Z_]+)", page))
    assert {"HF_HOME", "HF_HUB_OFFLINE", "BCOSIFY_CACHE"} <= named
    sources = Path(hub.__file__).read_text() + Path(files.__file__).read_text()
    auth = (Path(hub.__file__).parent / "utils" / "_auth.py").read_text()
    assert [name for name in sorted(named) if name not in sources + auth] == []
