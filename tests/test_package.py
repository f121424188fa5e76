"""What `import bcosify` gives, and what it costs."""

from __future__ import annotations

import subprocess
import sys

import pytest
from bcosify.publish import load

import bcosify


def test_load_is_at_hand_and_imports_nothing_before_its_first_use():
    assert bcosify.load is load
    code = "import sys, bcosify; print('torch' in sys.modules, callable(bcosify.load), 'timm' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["False", "True", "True"]
    with pytest.raises(AttributeError, match="'lode'"):
        _ = bcosify.lode
