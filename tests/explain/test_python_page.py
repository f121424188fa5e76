"""docs/python.md, run: every block in order, on real weights and a real photo."""

from __future__ import annotations

import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import bcosify

PAGE = Path(__file__).resolve().parents[2] / "docs" / "python.md"


def test_every_block_of_the_page_runs_and_says_what_it_shows(tmp_path, monkeypatch, capsys):
    spec = find_spec("skimage")
    assert spec is not None and spec.submodule_search_locations
    shutil.copy(Path(spec.submodule_search_locations[0]) / "data" / "chelsea.png", tmp_path / "cat.jpg")
    monkeypatch.chdir(tmp_path)
    shown: list[object] = []
    monkeypatch.setattr("bcosify.explain.explained._notebook", lambda: shown.append)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 7
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)
        for line, comment in re.findall(r"^print\((\w+)\)  # (.*)$", block, re.MULTILINE):
            # What the page says that a line prints, but for numbers that it leaves out.
            assert re.fullmatch(re.escape(comment).replace(r"\.\.\.", ".*"), str(names[line]))
    assert len(shown) == 1 and Image.open("overlay.png").size == names["photo"].size
    assert {path.name for path in Path("maps").iterdir()} == {"cat.png", "cat.npz", "cat.json"}
    assert names["scores"].shape == (1, 1000) and names["contributions"].shape == (2, 3, 224, 224)
    assert [one.label for one in names["each"].ledgers] == ["tabby, tabby cat", "tiger cat"]
    torch.testing.assert_close(names["both"].scores[0], names["each"].scores[:, 0], rtol=1e-4, atol=1e-4)
    assert names["sensitivity"].shape == (2,)
    trained = bcosify.load("runs/mine").explain("cat.jpg", "tabby")
    assert trained.agreement.words.startswith("The student was trained")
