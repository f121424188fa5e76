"""A device that is not there is one line."""

from __future__ import annotations

import pytest
import torch
from bcosify.core.devices import find_device
from bcosify.core.errors import OptionError


def test_the_cpu_is_there_and_auto_takes_what_there_is(monkeypatch):
    assert find_device("cpu") == torch.device("cpu")
    for there, kind in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert find_device("auto").type == kind


@pytest.mark.parametrize("name", ["cuda", "cuda:99", "gpu", "meta", ""])
def test_what_is_not_there_is_one_line_that_says_what_is(name):
    if name == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(OptionError) as caught:
        find_device(name)
    said = caught.value.wrong["device"]
    assert said.startswith("must be one of auto, cpu") and f"got {name!r}" in said and "\n" not in said
    assert torch.cuda.is_available() or "finds no CUDA GPU" in said
