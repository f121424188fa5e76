"""Models are built without weights first, and get those of a file once."""

from __future__ import annotations

import pytest
import torch
from bcosify.convert import convert, load, save, set_strength
from bcosify.convert.libraries.weights import assign_weights, build_on_meta, is_whole, load_weights, with_weights
from bcosify.convert.trace import trace_forward
from bcosify.core.errors import CheckpointError, SourceError
from safetensors.torch import save_file
from torch import Tensor, nn


class Table(nn.Module):
    """Has a buffer that no state dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("table", torch.arange(4.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.table


class Derived(nn.Module):
    """Its constructor reads a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("size", self.linear.weight.norm().detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * 0 + self.size


class Stubborn(Table):
    """Its constructor cannot go on without the value of a weight."""

    def __init__(self) -> None:
        super().__init__()
        assert float(self.linear.weight.abs().sum()) > 0


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@pytest.mark.parametrize("kind", [Table, Stubborn])
def test_a_model_gets_the_weights_of_its_file(tmp_path, kind):
    source = kind()
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    model = with_weights(kind, tmp_path / "weights.safetensors")
    x = torch.randn(3, 4)
    assert is_whole(model) and torch.equal(model(x), source(x))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_a_constructor_makes_of_weights_is_there(tmp_path):
    save_file(Derived().state_dict(), tmp_path / "weights.safetensors")
    model = with_weights(Derived, tmp_path / "weights.safetensors")
    assert is_whole(model) and float(model.size) > 0


def test_without_memory_there_are_shapes_ties_and_buffers():
    state = torch.get_rng_state()
    model = build_on_meta(Tied)
    assert model.second.weight is model.first.weight and model.first.weight.is_meta
    assert not build_on_meta(Table).table.is_meta
    assert nn.Linear(2, 2).weight.device.type == "cpu"  # nothing of the building stays
    torch.set_rng_state(state)


def test_a_refusal_is_not_asked_for_twice():
    asked = []

    def refuse() -> nn.Module:
        asked.append(1)
        raise CheckpointError("too large")

    with pytest.raises(CheckpointError, match="too large"):
        build_on_meta(refuse)
    assert len(asked) == 1


def test_what_a_library_cannot_build_without_memory_is_built_whole():
    asked = []

    def build() -> nn.Module:
        layer = nn.Linear(2, 2)
        asked.append(layer.weight.is_meta)
        if layer.weight.is_meta:
            raise SourceError("timm cannot build it: Cannot copy out of meta tensor; no data!")
        return layer

    assert is_whole(build_on_meta(build)) and asked == [True, False]


def test_tied_weights_stay_tied():
    source, model = Tied(), build_on_meta(Tied)
    assign_weights(model, {name: tensor for name, tensor in source.state_dict().items() if name != "second.weight"})
    assert model.second.weight is model.first.weight
    x = torch.randn(2, 4)
    assert torch.equal(model(x), source(x))


def test_the_file_and_the_model_share_nothing(tmp_path):
    """A model that is trained must not write into the file, nor the file into the model."""
    path = tmp_path / "weights.safetensors"
    save_file(Table().state_dict(), path)
    before = path.read_bytes()
    model = with_weights(Table, path)
    with torch.no_grad():
        model.linear.weight.zero_()
    assert path.read_bytes() == before
    model = with_weights(Table, path)
    wanted = model.linear.weight.clone()
    path.write_bytes(b"\0" * len(before))
    assert torch.equal(model.linear.weight, wanted)


def test_another_models_file_is_refused(tmp_path):
    save_file({"linear.weight": torch.zeros(3, 3)}, tmp_path / "weights.safetensors")
    with pytest.raises(SourceError, match=r"missing linear.bias; linear.weight is \(3, 3\), should be \(4, 4\)"):
        with_weights(Table, tmp_path / "weights.safetensors")


def test_the_precision_is_the_models(tmp_path):
    save_file(Table().half().state_dict(), tmp_path / "weights.safetensors")
    model = Table()
    load_weights(model, tmp_path / "weights.safetensors")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_plan_needs_no_weights(tiny):
    teacher = tiny("test_vit")
    wanted = trace_forward(teacher.model, teacher.preprocess.size)
    assert trace_forward(teacher.model.to("meta"), teacher.preprocess.size) == wanted


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet"])
def test_a_student_is_loaded_without_random_weights(tiny, tmp_path, name):
    student = convert(tiny(name))
    set_strength(student.model, 1.5, 0.5)
    save(student, tmp_path / "out")
    state = torch.get_rng_state()
    opened = load(tmp_path / "out").model
    assert torch.equal(torch.get_rng_state(), state)
    assert is_whole(opened)
    for key, tensor in student.model.state_dict().items():
        assert torch.equal(opened.state_dict()[key], tensor), key
    for key, buffer in student.model.named_buffers():  # those too that no file holds
        assert torch.equal(dict(opened.named_buffers())[key], buffer), key
