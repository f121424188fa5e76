"""A page in a headless Chromium, where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest


def in_browser(page: str, check: str, folder: Path, width: int) -> dict[str, str]:
    """What a script leaves in the dataset of a page's body, at whose head it was put; the console stays empty."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium here (Debian: apt install chromium)")
    (folder / "report.html").write_text(page.replace("<head>", "<head>" + check), "utf-8")
    ended = subprocess.run(
        [
            *(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--dump-dom"),
            *("--enable-logging=stderr", "--v=0", f"--window-size={width},800"),
            *(f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=3000"),
            (folder / "report.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert "CONSOLE" not in ended.stderr, ended.stderr
    body = re.search(r"<body[^>]*>", ended.stdout)
    assert body is not None
    return dict(re.findall(r'data-(\w+)="([^"]*)"', body.group()))
