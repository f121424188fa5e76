"""Models are built without weights first, and get those of a file once."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import timm
import torch
from bcosify.convert import convert, load, load_teacher, save, set_strength
from bcosify.convert.libraries.weights import (
    assign_weights,
    build_on_meta,
    check_plain,
    is_whole,
    load_weights,
    prefix_of,
    with_weights,
)
from bcosify.convert.trace import trace_forward
from bcosify.core.errors import CheckpointError, SourceError
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn
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


# --------------------------------------------------------------------------------------------- what training leaves

PICTURES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def trained(name: str = "test_resnet", **args) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **args).eval()


def opened(state: dict[str, Tensor], folder: Path, name: str = "test_resnet") -> nn.Module:
    save_file(state, folder / "own.safetensors")
    return load_teacher(f"timm:{name}", weights=folder / "own.safetensors", image_size=64).model


@pytest.mark.parametrize("prefix", ["module.", "model.", "backbone.", "_orig_mod.", "module._orig_mod.", "state_dict."])
def test_prefixes_are_recognised_and_said(tmp_path, prefix):
    model = trained()
    with pytest.warns(UserWarning, match=f"own.safetensors: names are taken without '{prefix}' in front"):
        found = opened({f"{prefix}{name}": value for name, value in model.state_dict().items()}, tmp_path)
    assert torch.equal(found(PICTURES), model(PICTURES))


def test_an_average_is_taken_before_the_last_step_and_what_is_left_out_is_counted(tmp_path):
    last, average = trained(), trained()
    with torch.no_grad():
        average.get_parameter("fc.bias").add_(1)
    state = {
        f"{kind}.{name}": v for kind, m in (("model", last), ("ema", average)) for name, v in m.state_dict().items()
    }
    state |= {"optimizer.0.exp_avg": torch.zeros(3)}
    with pytest.warns(
        UserWarning, match=rf"without 'ema\.' in front; {len(last.state_dict()) + 1} tensors .* left out"
    ):
        assert torch.equal(opened(state, tmp_path)(PICTURES), average(PICTURES))


def test_bare_names_are_taken_before_others(tmp_path):
    model = trained()
    assert prefix_of(["ema.a", "a", "ema.b", "b"], ["a", "b"]) == ""
    assert prefix_of(["deep.a.x"], ["a", "b", "c"]) == "" and prefix_of([], ["a"]) == ""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(opened(model.state_dict(), tmp_path)(PICTURES), model(PICTURES))


def test_counters_of_batches_may_be_missing(tmp_path):
    model = trained()
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    assert len(state) < len(model.state_dict()) and torch.equal(opened(state, tmp_path)(PICTURES), model(PICTURES))


def test_what_does_not_fit_is_still_refused(tmp_path):
    state = {f"module.{name}": value for name, value in trained().state_dict().items()}
    del state["module.conv1.0.weight"]
    with pytest.raises(SourceError, match=r"does not fit ResNet: missing conv1\.0\.weight"):
        opened(state, tmp_path)
    with pytest.raises(SourceError, match="unknown nobody.weight"):
        opened({**trained().state_dict(), "nobody.weight": torch.ones(1)}, tmp_path)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_timms_position_tables_are_resampled_as_timm_does(tmp_path, prefix):
    small = trained("test_vit", img_size=64)
    torch.nn.init.normal_(small.get_parameter("pos_embed"))
    own = {name: value.detach() for name, value in small.state_dict().items()}
    wanted = timm.create_model("test_vit", num_classes=5).eval()
    wanted.load_state_dict(checkpoint_filter_fn(dict(own), wanted))
    grid = tuple(wanted.get_parameter("pos_embed").shape)
    with pytest.warns(UserWarning, match=f"pos_embed is resampled from .* to {re.escape(str(grid))}"):
        found = opened({f"{prefix}{name}": value for name, value in own.items()}, tmp_path, "test_vit")
    torch.testing.assert_close(found.get_parameter("pos_embed"), wanted.get_parameter("pos_embed"))


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model


CHECKPOINTS = {
    "bare": lambda model: model.state_dict(),
    "state_dict": lambda model: {"state_dict": Wrapper(model).state_dict(), "epoch": 3, "arch": "resnet"},
    "model": lambda model: {"model": model.state_dict(), "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
    "ema": lambda model: {"ema": {"module": model.state_dict()}, "best": 0.5},
    "shared": lambda model: {"model": {**model.state_dict()}, "again": model.get_parameter("fc.weight")},
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_the_line_that_the_hint_shows_works_for_all_wrappers(tmp_path, monkeypatch, kind):
    model = trained()
    torch.save(CHECKPOINTS[kind](model), tmp_path / "own.pth")
    with pytest.raises(SourceError, match="only .safetensors is read") as error:
        load_teacher("timm:test_resnet", weights=tmp_path / "own.pth")
    line = str(error.value).partition('python -c "')[2].removesuffix('"')
    monkeypatch.chdir(tmp_path)
    exec(line, {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = load_teacher("timm:test_resnet", weights=tmp_path / "weights.safetensors", image_size=64).model
    assert torch.equal(found(PICTURES), model(PICTURES))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path, value):
    state = Tied().state_dict()
    state["first.bias"] = torch.full_like(state["first.bias"], value)
    save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "own.safetensors")
    with pytest.raises(SourceError, match=r"own\.safetensors: first\.bias holds NaN or infinity\. Pass"):
        load_weights(Tied(), tmp_path / "own.safetensors")
    model = Tied()
    model.load_state_dict(state)
    with pytest.raises(SourceError, match=r"^tied: first\.bias holds NaN or infinity\."):
        check_plain(model, "tied")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_told(tmp_path, dtype):
    save_file({name: tensor.to(dtype) for name, tensor in Table().state_dict().items()}, tmp_path / "own.safetensors")
    model = Table()
    with pytest.warns(UserWarning, match=f"its {str(dtype)[6:]} numbers become float32"):
        load_weights(model, tmp_path / "own.safetensors")
    assert model.linear.weight.dtype == torch.float32
