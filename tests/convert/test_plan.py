"""Planning: pure, complete, and a clear refusal of all that it does not know."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import timm
import torch
from bcosify.convert import BcosConfig, convert, plan_for
from bcosify.convert.methods import find_method
from bcosify.convert.trace import trace_forward
from bcosify.core.errors import PlanError, SourceError
from bcosify.core.pictures import noise_pictures
from bcosify.explain import explain
from torch import nn

CONFIG = BcosConfig()


class Net(nn.Module):
    """A stem, one layer of choice, a head."""

    def __init__(self, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.middle = nn.Conv2d(4, 4, 3, padding=1) if layer is None else layer
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.middle(self.stem(x)).mean((2, 3)))


class MyConv(nn.Conv2d):
    """A subclass: who knows what its forward does."""


class Scan(nn.LSTM):
    """Over the pixels, row by row."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, batch_first=True)
        self.__class__ = nn.LSTM  # the class that libraries use, run over pixels by the forward below
        self.forward = lambda x: nn.LSTM.forward(self, x.flatten(2).mT)[0].mT.unflatten(2, x.shape[2:])


def becomes(plan) -> dict[str, str | None]:
    return {step.name: step.becomes for step in plan.steps}


def hooks_left(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_efficientnet_ln"])
def test_planning_changes_nothing(tiny, name):
    teacher = tiny(name)
    teacher.model.train()
    before, classes = copy.deepcopy(teacher.model.state_dict()), [type(m) for m in teacher.model.modules()]
    teacher.model.eval()
    plan_for(teacher, CONFIG)
    assert [type(m) for m in teacher.model.modules()] == classes and hooks_left(teacher.model) == 0
    after = teacher.model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    assert all(parameter.grad is None for parameter in teacher.model.parameters())


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext", "test_efficientnet"])
def test_every_layer_has_a_line_with_a_reason(tiny, name):
    teacher = tiny(name)
    plan = plan_for(teacher, CONFIG)
    names = [step.name for step in plan.steps]
    wanted = [n for n, m in teacher.model.named_modules() if n and (not [*m.children()] or [*m.parameters(False)])]
    assert len(names) == len(set(names)) and set(wanted) <= set(names)
    assert all(
        step.reason and step.found == type(teacher.model.get_submodule(step.name)).__name__ for step in plan.steps
    )
    assert sum(plan.counts().values()) == len(plan.swaps) > 5


def test_a_transformer_gets_what_the_method_says(tiny):
    plan = becomes(plan_for(tiny("test_vit"), CONFIG))
    assert plan["patch_embed.proj"] == "SixChannelBcosConv2d"
    assert plan["blocks.0.attn.qkv"] == plan["blocks.0.norm1"] == plan["norm"] == "BiasScheduled"
    assert (
        plan["blocks.0.attn.proj"]
        == plan["blocks.0.mlp.fc1"]
        == plan["blocks.0.mlp.fc2"]
        == plan["head"]
        == "BcosLinear"
    )
    assert plan["blocks.0.mlp.act"] is None


@pytest.mark.parametrize("part", ["q", "k", "v", "kv", "qkv", "q_proj", "k_proj", "v_proj", "query", "key", "value"])
def test_query_key_and_value_stay_linear(teach, part):
    model = Net(nn.ModuleDict({part: nn.Conv2d(4, 4, 1)}))
    model.middle = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(2), nn.Sequential())
    model.middle.add_module(part, nn.Linear(1, 1))
    model.middle.append(nn.Unflatten(2, (1, 1)))
    assert becomes(plan_for(teach(model), CONFIG))[f"middle.{part}"] == "BiasScheduled"


class Adapted(nn.Module):
    """y = base(x) + up(down(x)), as low-rank adapters are put around a layer."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer, self.dropout = base, nn.Dropout(0.1)
        self.down = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.up = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.up["default"](self.down["default"](self.dropout(x)))


@pytest.mark.parametrize("wrap", [Adapted, nn.Sequential], ids=["adapter", "sequential"])
def test_what_is_in_the_place_of_query_key_and_value_stays_linear(teach, wrap):
    """Whatever the layers in it are called."""
    model = timm.create_model("test_vit", img_size=32)
    model.blocks[0].attn.qkv = wrap(model.blocks[0].attn.qkv)
    plan = becomes(plan_for(teach(model, size=32), CONFIG))
    inside = {name: found for name, found in plan.items() if name.startswith("blocks.0.attn.qkv.") and found}
    assert len(inside) == (3 if wrap is Adapted else 1) and set(inside.values()) == {"BiasScheduled"}
    assert plan["blocks.0.attn.proj"] == "BcosLinear"


def test_adapters_of_layers_that_respond_are_to_be_merged_first(teach):
    model = timm.create_model("test_vit", img_size=32)
    model.blocks[1].mlp.fc1 = Adapted(model.blocks[1].mlp.fc1)
    with pytest.raises(PlanError, match=r"blocks\.1\.mlp\.fc1 \(Adapted\), a low-rank adapter\. Merge the adapters"):
        plan_for(teach(model, size=32), CONFIG)
    plan = becomes(plan_for(teach(model, size=32), BcosConfig(keep=("blocks.1.mlp.fc1",))))
    assert plan["blocks.1.mlp.fc1.base_layer"] is None and plan["blocks.1.mlp.fc2"] == "BcosLinear"


def test_a_bottleneck_with_a_shortcut_is_no_adapter(teach):
    class Bottleneck(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.short, self.down, self.up = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)
            self.act = nn.ReLU()

        def forward(self, x):
            return self.short(x) + self.up(self.act(self.down(x)))

    assert becomes(plan_for(teach(Net(Bottleneck())), CONFIG))["middle.down"] == "BcosConv2d"


def test_layers_inside_a_gate_stay(tiny):
    plan = plan_for(tiny("test_efficientnet"), CONFIG)
    inside = [step for step in plan.steps if ".se." in step.name and "Conv" in step.found]
    assert inside and all(step.becomes is None and "gate" in step.reason for step in inside)


def test_layers_that_never_run_and_norms_without_a_bias_stay(teach):
    model = Net(nn.GroupNorm(2, 4, affine=False))
    model.spare = nn.Linear(4, 4)
    plan = {step.name: step for step in plan_for(teach(model), CONFIG).steps}
    assert plan["spare"].becomes is None and "never calls it" in plan["spare"].reason
    assert plan["middle"].becomes is None and "without a bias" in plan["middle"].reason


REFUSED = {
    "subclass": (lambda: MyConv(4, 4, 3, padding=1), "MyConv"),
    "recurrent": (lambda: Scan(4), "LSTM"),
    "instance norm": (lambda: nn.InstanceNorm2d(4, track_running_stats=True), "InstanceNorm2d"),
    "no statistics": (lambda: nn.BatchNorm2d(4, track_running_stats=False), "BatchNorm2d"),
    "parametrised": (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), "ParametrizedConv2d"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_unknown_layers_are_refused_by_name_and_can_be_kept(teach, kind):
    make, found = REFUSED[kind]
    teacher = teach(Net(make()))
    with pytest.raises(
        PlanError, match=rf"(?s)1 layer\(s\).*nothing was changed.*middle \(\S*{found}\).*pass --keep NAME"
    ):
        convert(teacher)
    student = convert(teacher, BcosConfig(keep=("middle",)))
    assert type(student.model.middle) is type(teacher.model.middle)


def test_all_refused_layers_are_listed_up_to_ten(teach):
    model = Net(nn.Sequential(*[MyConv(4, 4, 1) for _ in range(12)]))
    with pytest.raises(PlanError, match=r"(?s)12 layer\(s\).*middle\.0 .*middle\.9 .*and 2 more"):
        plan_for(teach(model), CONFIG)


class Twice(nn.Module):
    """The picture for one stem, a smaller one for another."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small = Net(), Net()

    def forward(self, x):
        return self.large(x) + self.small(nn.functional.interpolate(x, scale_factor=0.5))


OTHER_WAYS = {
    "grouped": lambda: nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    "reflected": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ),
    "batch norm": lambda: nn.Sequential(nn.BatchNorm2d(3), Net()),
    "group norm": lambda: nn.Sequential(nn.GroupNorm(1, 3), Net()),
    "patches": lambda: nn.Sequential(nn.PixelUnshuffle(4), nn.Flatten(2), nn.Linear(16, 5), nn.Flatten()),
    "folded": lambda: nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    "twice": Twice,
}


@pytest.mark.parametrize("way", OTHER_WAYS)
def test_a_picture_that_no_stem_can_encode_is_encoded_at_the_entrance(teach, way):
    torch.manual_seed(0)
    teacher = teach(OTHER_WAYS[way]())
    plan = {step.name: step.becomes for step in plan_for(teacher, CONFIG).swaps}
    assert plan[""] == "SixChannelInput" and not any(str(kind).startswith("SixChannelBcos") for kind in plan.values())
    student = convert(teacher)
    assert student.history.conversion.identity_error <= 1e-6
    explanation = explain(student.model, noise_pictures(2, (16, 16)), targets=[0, 1])
    assert explanation.encoded_inputs.shape == (2, 6, 16, 16)
    torch.testing.assert_close(explanation.encoded_inputs.unflatten(1, (2, 3)).sum(1), torch.ones(2, 3, 16, 16))
    assert "literal" not in explanation.constants


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        (("blocks.0",), {"blocks.0.attn.qkv", "blocks.0.mlp.fc1"}),
        (("blocks.0.mlp.fc1", "head"), {"blocks.0.mlp.fc1", "head"}),
        ((r"re:blocks\.\d\.mlp\.fc1",), {f"blocks.{i}.mlp.fc1" for i in range(6)}),
    ],
)
def test_kept_layers_stay(tiny, keep, kept):
    teacher = tiny("test_vit")
    plan = {step.name: step for step in plan_for(teacher, BcosConfig(keep=keep)).steps}
    assert {plan[name].reason for name in kept} == {"kept as asked"}
    assert plan["blocks.1.attn.proj"].becomes == "BcosLinear" and plan["blocks.1.mlp.fc2"].becomes == "BcosLinear"
    student = convert(teacher, BcosConfig(keep=keep))
    assert all(type(student.model.get_submodule(name)) is nn.Linear for name in kept if "attn" not in name)


def test_a_name_is_no_prefix_of_another(teach):
    model = Net()
    model.middle2 = nn.Linear(5, 5)
    model.forward = lambda x: model.middle2(Net.forward(model, x))
    assert becomes(plan_for(teach(model), BcosConfig(keep=("middle",))))["middle2"] == "BcosLinear"


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("headd", "Did you mean 'head'"),
        ("re:heads", "--keep re:heads names no module"),
        ("re:(", r"--keep re:\( is no regular"),
    ],
)
def test_a_pattern_that_names_nothing_is_an_error(tiny, pattern, said):
    with pytest.raises(PlanError, match=said):
        plan_for(tiny("test_vit"), BcosConfig(keep=(pattern,)))


def test_nothing_to_convert_is_an_error(teach):
    model = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.ReLU())
    with pytest.raises(
        PlanError, match="nothing in Sequential matches --method bcos. It has: AvgPool2d, Flatten, ReLU"
    ):
        plan_for(teach(model), CONFIG)
    with pytest.raises(PlanError, match="nothing in Net matches"):
        plan_for(teach(Net()), BcosConfig(keep=("re:.*",)))


def test_a_converted_model_is_not_converted_again(teach):
    student = convert(teach(Net()))
    with pytest.raises(PlanError, match="SixChannelBcosConv2d"):
        plan_for(teach(student.model), CONFIG)


@pytest.mark.parametrize("size", [33, 8, 0, -3])
def test_a_size_that_the_model_cannot_take_is_an_error_and_leaves_no_hooks(tiny, size):
    teacher = tiny("test_vit")
    teacher = dataclasses.replace(teacher, preprocess=teacher.preprocess.at(size))
    with pytest.raises(PlanError, match=f"VisionTransformer does not run on a picture of {size}x{size}.*--image-size"):
        plan_for(teacher, CONFIG)
    assert hooks_left(teacher.model) == 0


def test_a_picture_of_other_channels_is_an_error(teach):
    with pytest.raises(PlanError, match="does not run"):
        plan_for(teach(nn.Sequential(nn.Conv2d(1, 4, 3))), CONFIG)


def test_trace_knows_what_runs_and_what_reads_the_picture(teach):
    model = Net()
    model.spare = nn.Linear(4, 4)
    trace = trace_forward(model, (16, 16))
    assert trace.called == ("stem", "middle", "head") and trace.readers == {"stem"}


def test_noise_pictures_are_the_same_everywhere():
    a, b = noise_pictures(2, (32, 48)), noise_pictures(2, (32, 48))
    assert a.shape == (2, 3, 32, 48) and torch.equal(a, b) and not torch.equal(a, noise_pictures(2, (32, 48), seed=1))


def test_plans_are_told_apart_by_their_swaps_and_arguments(tiny):
    teacher = tiny("test_vit")
    same, kept, unbounded = (
        plan_for(teacher, config) for config in (CONFIG, BcosConfig(keep=("head",)), BcosConfig(scale="unbounded"))
    )
    assert plan_for(tiny("test_vit"), CONFIG) == same
    assert kept.swaps != same.swaps != unbounded.swaps and same.counts() == unbounded.counts()


def test_settings_and_methods_are_checked():
    with pytest.raises(PlanError, match="no method 'bcoss'. Did you mean 'bcos'"):
        find_method("bcoss")
    with pytest.raises(PlanError, match="no scale 'cosin'. Did you mean 'cosine'"):
        BcosConfig(scale="cosin")  # type: ignore[arg-type]


@pytest.mark.parametrize("channels", [1, 4])
def test_a_model_of_other_channels_is_told_so_and_not_to_change_the_size(teach, channels):
    model = Net()
    model.stem = nn.Conv2d(channels, 4, 3, padding=1)
    with pytest.raises(
        PlanError, match=rf"Net does not run on pictures of three channels, .*: its stem reads {channels}\. In Python"
    ) as caught:
        plan_for(teach(model), CONFIG)
    assert "image-size" not in str(caught.value)
    explanation = explain(model, torch.randn(2, channels, 16, 16), 0)
    assert explanation.balanced(1e-5).all()


@pytest.mark.parametrize(
    ("after", "found", "way"),
    [
        (lambda y: {"logits": y}, "a dict", "its logits or its pooled feature alone"),
        (lambda y: (y, y), "a tuple", "its logits or its pooled feature alone"),
        (lambda y: y[:, 0], r"a tensor \(2,\)", r"y\[:, None\]"),
    ],
    ids=["dict", "tuple", "one value"],
)
def test_a_model_that_returns_no_vector_is_told_what_to_return(teach, after, found, way):
    class Other(Net):
        def forward(self, x):
            return after(super().forward(x))

    with pytest.raises(SourceError, match=rf"Other returns {found}; .*Let its forward return {way}"):
        convert(teach(Other()), CONFIG)
