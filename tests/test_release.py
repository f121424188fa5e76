"""What is released works without the source beside it: a wheel in a virtual environment, and every block of README."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import skimage.data
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
MOST = 15 * 2**20  # bytes of a wheel
STUDENT = "bcosify/students/bcos-efficientnet-lite0"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the wheel and the sdist."""
    out = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)], out)
    return out


@pytest.fixture(scope="module")
def python(built, tmp_path_factory) -> Path:
    """The Python of an environment with the wheel alone; its dependencies are those of this one."""
    home = tmp_path_factory.mktemp("venv")
    run([sys.executable, "-m", "venv", "--without-pip", str(home)], home)
    (wheel,) = built.glob("*.whl")
    found = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(found), "install", "--quiet", "--no-deps", str(wheel)]
    run(pip, home)
    place = home / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    # All of them: what a .pth file adds to a path is not looked into for further ones.
    ours = [folder for folder in sys.path if folder.endswith("site-packages")]
    (place / "zz_dependencies.pth").write_text("\n".join([*ours, ""]))
    return found


def run(command: list[str], folder: Path, **more: str) -> str:
    given = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    given |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", **more}
    ended = subprocess.run(command, cwd=folder, env=given, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


def test_the_wheel_is_small_and_whole(built):
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert wheel.name == f"bcosify-{version}-py3-none-any.whl" and wheel.stat().st_size < MOST
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
    names = set(zipfile.ZipFile(wheel).namelist())
    student = {f"{STUDENT}/{name}" for name in ("bcosify.json", "model.safetensors", "probe.safetensors", "README.md")}
    assert {"bcosify/py.typed", "bcosify/recipes/demo.yaml", "bcosify/evaluate/report/demo.html", *student} <= names
    assert {f"bcosify-{version}.dist-info/licenses/{name}" for name in ("LICENSE", "NOTICE")} <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "bcosify/tests"))]
    packed = {name.partition("/")[2] for name in tarfile.open(sdist).getnames()}
    assert {"NOTICE", "README.md", "students/bcos-efficientnet-lite0/model.safetensors"} <= packed


def test_every_block_of_readme_runs_as_it_is_written(python, tmp_path):
    """In an empty folder with a photograph and a folder of photographs."""
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert {kind for kind, _ in blocks} == {"sh", "python"}
    cat = Image.fromarray(skimage.data.chelsea())
    cat.save(tmp_path / "cat.jpg")
    (tmp_path / "photos").mkdir()
    for number in range(48):
        cat.crop((number, number, number + 200, number + 200)).save(tmp_path / "photos" / f"{number}.jpg")
    where = run([str(python), "-c", "import bcosify; print(bcosify.__file__)"], tmp_path).strip()
    assert Path(where).is_relative_to(python.parent.parent)
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    for kind, block in blocks:
        if kind == "sh":
            run(["bash", "-euc", block], tmp_path, PATH=path)
        else:
            assert "Egyptian cat" in run([str(python), "-c", block], tmp_path)
    assert {"maps/cat.png", "runs/eff/aligned/bcosify.json", "why.png"} <= {
        str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()
    }


DOORS = """
import sys, torch
import bcosify.publish, timm, transformers
from bcosify.convert.hub import student_folder
name = "bundled:bcos-efficientnet-lite0"
student, folder = bcosify.load(name), str(student_folder(name))
torch.manual_seed(0)
pictures = torch.randn(2, 3, *student.preprocess.size)
network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
classifier = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
with torch.no_grad():
    wanted = student.model(pictures)
    assert torch.equal(network(pictures), wanted) and torch.equal(classifier(pictures).logits, wanted)
assert {parameter.dtype for parameter in classifier.parameters()} == {torch.float32}
explanation = bcosify.explain.explain_scores(student.model, pictures, 0)
assert explanation.balanced(1e-4).all()
"""


def test_the_shipped_student_opens_through_three_doors_to_equal_outputs(python, tmp_path):
    run([str(python), "-c", DOORS], tmp_path)
