"""Students under torch's DistributedDataParallel: two real processes have the gradients of one over the whole batch."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bcosify.align.prepare import checkpoint_gradients
from bcosify.convert import BcosConfig, CodaConfig, convert, load_teacher, set_strength
from bcosify.convert.layers import BcosConv2d, BcosLinear, UncentredBatchNorm, batch_statistics
from bcosify.convert.methods.coda.layers import CodaConv2d, CodaLinear
from bcosify.convert.randomise import randomise
from bcosify.core.pictures import noise_pictures
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

PICTURES, SIZE = 6, 48
METHODS = {
    "bcos": (BcosConfig(), {BcosConv2d, BcosLinear, UncentredBatchNorm}),
    "coda": (CodaConfig(rank=2, basis=2), {CodaConv2d, CodaLinear, UncentredBatchNorm}),
}


@dataclasses.dataclass(frozen=True)
class Way:
    """How the copies run."""

    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    checkpointing: bool = False


# Small buckets: gradients are added up while the backward pass still runs, and while BatchNorm's processes talk too.
SMALL = {"bucket_cap_mb": 0.01}
WAYS = {
    "plain": Way(),
    "buckets": Way(SMALL | {"gradient_as_bucket_view": True}),
    "checkpointed": Way(SMALL | {"gradient_as_bucket_view": True}, checkpointing=True),
}

RANK = """
import sys
sys.path.insert(0, sys.argv[1])
from test_copies import copies
copies(sys.argv[2])
"""


def student(method: str) -> nn.Module:
    """Depthwise and other convolutions, BatchNorm and a linear head, converted and away from their start."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    teacher = load_teacher("timm:test_efficientnet", pretrained=False, image_size=SIZE)
    randomise(teacher.model, noise_pictures(2, (SIZE, SIZE)))
    config, kinds = METHODS[method]
    model = convert(teacher, config).model
    assert all(any(isinstance(layer, kind) for layer in model.modules()) for kind in kinds)
    assert any(getattr(layer, "groups", 1) > 1 for layer in model.modules())
    set_strength(model, b=1.7, beta=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * parameter.std(correction=0) * torch.randn_like(parameter))
            if not parameter.any():  # a low-rank part, where it starts
                parameter.normal_(std=0.1)
    return model.double()


def gradients(model: nn.Module, net: nn.Module, begin: int, end: int) -> dict[str, Tensor]:
    """Of the mean loss of pictures `begin` to `end` in the second of two steps; `net` is `model`, or what holds it."""
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randn(PICTURES, 3, SIZE, SIZE, generator=generator).double()[begin:end]
    labels = torch.arange(PICTURES)[begin:end]
    with batch_statistics(model):
        for _ in range(2):  # what was not used, or used twice, in the first step, is refused in the second
            model.zero_grad()
            F.cross_entropy(net(pictures), labels).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: gradient.clone() for name, gradient in found.items() if gradient is not None}


def copies(folder: str) -> None:
    """One of two processes: writes the gradients of every method and way."""
    torch.distributed.init_process_group("gloo")
    rank, share = torch.distributed.get_rank(), PICTURES // torch.distributed.get_world_size()
    assert share == PICTURES // 2
    for method in METHODS:
        for name, way in WAYS.items():
            model = student(method)
            if way.checkpointing:
                checkpoint_gradients(model, "timm")
            norms = [layer for layer in model.modules() if isinstance(layer, UncentredBatchNorm)]
            before = [int(norm.num_batches_tracked) for norm in norms]
            net = DistributedDataParallel(model, **way.options)
            save_file(gradients(model, net, rank * share, (rank + 1) * share), f"{folder}/{method}-{name}-{rank}")
            runs = {int(norm.num_batches_tracked) - count for norm, count in zip(norms, before, strict=True)}
            assert runs == ({2, 4} if way.checkpointing else {2})  # blocks run again, the stem does not
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both processes wrote."""
    folder = tmp_path_factory.mktemp("copies")
    (folder / "rank.py").write_text(RANK)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(folder / "rank.py"), str(Path(__file__).parent), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def whole() -> dict[str, dict[str, Tensor]]:
    """The gradients of one process over all pictures."""
    return {method: gradients(model := student(method), model, 0, PICTURES) for method in METHODS}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_have_the_gradients_of_one(folder, whole, method, way):
    wanted = whole[method]
    assert wanted.keys() == dict(student(method).named_parameters()).keys()
    assert all(gradient.any() for gradient in wanted.values())
    for rank in range(2):
        found = load_file(folder / f"{method}-{way}-{rank}")
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-9 * float(gradient.abs().max()))
