"""`explain` and `attribute`: what they return, that it adds up, and how they refuse."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from bcosify.core.errors import LedgerError, TargetError
from bcosify.explain import (
    ClassTarget,
    DirectionTarget,
    SelfTarget,
    SimilarityTarget,
    TopTarget,
    attribute,
    explain,
    gated,
    input_encoding,
)
from bcosify.explain.self_explaining import main_output
from torch import Tensor, nn


class Net(nn.Module):
    """A small CNN with everything that has a constant; `wrap` says what it returns."""

    def __init__(self, wrap=lambda y: y) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 5)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Tensor:
        return self.wrap(self.head(F.gelu(self.norm(self.stem(x))).mean((2, 3))))


@input_encoding
def encode(x: Tensor, mean: Tensor, std: Tensor, padding: tuple[int, int, int, int] = (0, 0, 0, 0)) -> Tensor:
    r = F.pad(x, padding) * std.view(-1, 1, 1) + mean.view(-1, 1, 1)
    return torch.cat([r, 1 - r], 1)


@gated
def scaled(x: Tensor, norm: Tensor) -> Tensor:
    return x * x.abs() / (norm + 1e-6)


class Converted(Net):
    """The same with six channels, and a B-cos convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(6, 6, 3)
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]))
        self.register_buffer("std", torch.tensor([0.2, 0.25, 0.3]))

    def forward(self, x: Tensor) -> Tensor:
        x = encode(x, self.mean, self.std, (1, 1, 1, 1))
        norm = (F.avg_pool2d(x.square().sum(1, keepdim=True), 3, 1) * 9).sqrt()
        return self.head(self.norm(scaled(self.stem(x), norm)).mean((2, 3)))


@pytest.fixture
def net(randomise) -> Net:
    torch.manual_seed(0)
    return randomise(Net(), torch.randn(4, 3, 6, 7))


@pytest.fixture
def converted(randomise) -> Converted:
    torch.manual_seed(0)
    return randomise(Converted(), torch.randn(4, 3, 6, 7))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 6, 7, generator=torch.Generator().manual_seed(1))


def test_what_an_explanation_holds(net, images):
    explanation = explain(net, images, targets=[4, 0])
    assert explanation.outputs.shape == (3, 5)
    assert explanation.scores.shape == explanation.residual.shape == (3, 2)
    assert explanation.contributions.shape == (3, 2, 6, 7)
    assert explanation.encoded_inputs.shape == (3, 3, 6, 7)
    assert explanation.encoded_gradients.shape == (3, 2, 3, 6, 7)
    assert set(explanation.constants) == {"stem.bias", "norm.bias", "norm.running_mean", "head.bias"}
    assert all(share.shape == (3, 2) for share in explanation.constants.values())

    torch.testing.assert_close(explanation.outputs, net(images))
    torch.testing.assert_close(explanation.scores, net(images)[:, [4, 0]])
    assert torch.equal(explanation.encoded_inputs, images)
    products = explanation.encoded_inputs[:, None] * explanation.encoded_gradients
    torch.testing.assert_close(explanation.contributions, products.sum(2))
    torch.testing.assert_close(explanation.input_part, explanation.contributions.sum((2, 3)))
    torch.testing.assert_close(explanation.input_part + explanation.constant_part, explanation.scores)
    torch.testing.assert_close(explanation.constants["head.bias"], net.head.bias[[4, 0]].expand(3, 2))
    assert explanation.residual.abs().max() < 1e-6 and explanation.balanced().all()


def test_linear_model_s_contributions_are_input_times_weight(images):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 7, 4))
    explanation = explain(model, images, 2)
    weight = model[1].weight[2].view(3, 6, 7)
    torch.testing.assert_close(explanation.contributions[:, 0], (images * weight).sum(1))


def test_what_is_returned_is_a_copy(net, images):
    first = explain(net, images, 0)
    kept = copy.deepcopy([first.contributions, first.encoded_gradients, first.encoded_inputs, first.scores])
    explain(net, images * 2, 1)
    images.zero_()
    after = [first.contributions, first.encoded_gradients, first.encoded_inputs, first.scores]
    assert all(torch.equal(a, b) for a, b in zip(kept, after, strict=True))
    assert not any(tensor.requires_grad or tensor.is_inference() for tensor in after)


@pytest.mark.parametrize(
    "target",
    [
        3,
        ClassTarget([1, 2]),
        torch.tensor([[0, 1], [2, 3], [4, 0]]),
        ClassTarget(1),
        TopTarget(2),
        DirectionTarget(torch.eye(5)[:2]),
        SimilarityTarget(torch.randn(3, 2, 5)),
        SelfTarget(),
    ],
    ids=lambda target: type(target).__name__,
)
@pytest.mark.parametrize("model", ["net", "converted"])
def test_every_target_balances_in_one_batch_or_in_several(model, target, images, request):
    model = request.getfixturevalue(model)
    whole = explain(model, images, target)
    parts = explain(model, images, target, batch_size=2)
    torch.testing.assert_close(parts.contributions, whole.contributions)
    torch.testing.assert_close(parts.scores, whole.scores)
    for name, share in whole.constants.items():
        torch.testing.assert_close(parts.constants[name], share)


def test_converted_model_is_explained_in_its_six_channels(converted, images):
    explanation = explain(converted, images, targets=[0, 1])
    assert explanation.encoded_inputs.shape == (3, 6, 6, 7)
    torch.testing.assert_close(explanation.encoded_inputs, encode(images, converted.mean, converted.std))
    assert {"padding", "norm.running_mean"} <= set(explanation.constants)
    assert explanation.residual.abs().max() < 1e-6


def test_attribute_has_the_shape_of_its_input(net, converted, images):
    for model in (net, converted):
        classes = torch.tensor([4, 0, 2])
        attribution = attribute(model, images, classes)
        explanation = explain(model, images, ClassTarget(classes[:, None]))
        assert attribution.shape == images.shape
        torch.testing.assert_close(attribution.sum(1), explanation.contributions[:, 0])
    # Channel by channel: a colour and its complement belong together.
    products = explanation.encoded_inputs * explanation.encoded_gradients[:, 0]
    torch.testing.assert_close(attribution[:, 1], products[:, 1] + products[:, 4])
    torch.testing.assert_close(attribute(net, images, 2), attribute(net, images, torch.tensor([2, 2, 2])))
    with pytest.raises(TargetError, match="one score a picture, not 2"):
        attribute(net, images, TopTarget(2))


def test_two_encodings_of_one_picture_add_up(images):
    class Twice(Converted):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 2 * super().forward(x.flip(-1))

    model = Twice().eval()
    explanation = explain(model, images, 0)
    assert explanation.residual.abs().max() < 1e-5 and explanation.encoded_inputs.shape == (3, 12, 6, 7)
    torch.testing.assert_close(attribute(model, images, 0).sum(1), explanation.contributions[:, 0])

    class Sizes(Converted):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + super().forward(x[..., 1:])

    with pytest.raises(LedgerError, match=r"encodes its input several times.*\(3, 6, 6, 7\), \(3, 6, 6, 6\)"):
        explain(Sizes().eval(), images, 0)


# ------------------------------------------------------------------------------------------------------------- refusals


class Strange(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.head = nn.Linear(126, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(x.flatten(1)))


def test_unknown_operation_is_named_with_the_amount(images):
    model = Strange(lambda x: torch.special.i0(x) + x)
    with pytest.raises(LedgerError) as error:
        explain(model, images, targets=[0, 1])
    message = str(error.value)
    explanation = explain(model, images, targets=[0, 1], check=False)
    picture, score = divmod(int(explanation.residual.abs().argmax()), 2)
    assert "Strange does not add up" in message and "No rule is known for: special_i0 (1 calls)" in message
    assert f"{explanation.residual[picture, score]:.6g} (unaccounted for)" in message
    assert f"Picture {picture}, score {score}" in message and "check=False" in message


def test_unknown_operation_that_only_gates_is_fine(images):
    assert explain(Strange(lambda x: x / torch.special.i0(x)), images, 0).balanced().all()


def test_tolerance_is_the_caller_s(images):
    model = Strange(lambda x: torch.special.i0(x * 1e-2) * 1e-3 + x)
    residual = float(explain(model, images, 0, check=False).residual.abs().max())
    assert explain(model, images, 0, tolerance=2 * residual).balanced(2 * residual).all()
    with pytest.raises(LedgerError):
        explain(model, images, 0, tolerance=residual / 100)


def test_what_does_not_show_as_a_torch_call_is_noticed(images):
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, gradient: Tensor) -> Tensor:
            return 2 * gradient * ctx.saved_tensors[0]

    with pytest.raises(LedgerError, match="autograd.Function"):
        explain(Strange(Square.apply), images, 0)
    with pytest.raises(LedgerError, match="TorchScript"):
        explain(torch.jit.trace(Strange(F.gelu), images), images, 0)


def test_rounding_is_told_from_what_is_hidden(images):
    model, grey = Strange(lambda x: (x - x.roll(1, 1)) * 1e5), 0.3 + 1e-6 * images
    with pytest.raises(LedgerError, match=r"That is rounding: parts of .* cancel\. Use float64"):
        explain(model, grey, 0, tolerance=1e-6)
    assert explain(model.double(), grey.double(), 0, tolerance=1e-6).balanced(1e-6).all()


def test_score_that_is_a_constant_is_named(images):
    with pytest.raises(LedgerError, match="it is a softmax output; explain what goes into it"):
        explain(nn.Sequential(Net().eval(), nn.Softmax(1)), images, 0)
    explanation = explain(nn.Sequential(Net().eval(), nn.Softmax(1)), images, 0, check=False)
    assert torch.equal(explanation.residual, explanation.scores) and not explanation.contributions.any()


def test_gradient_checkpointing_is_named(make, pictures):
    model = make("test_vit", 48, told=True)
    model.set_grad_checkpointing(True)
    with pytest.raises(LedgerError, match=r"model\.set_grad_checkpointing\(False\)"):
        explain(model, pictures(48), 0)


def test_half_precision_is_refused(net, images):
    with pytest.raises(LedgerError, match=r"Net cannot be explained exactly in torch.bfloat16: use float32"):
        explain(copy.deepcopy(net).bfloat16(), images.bfloat16(), 0)
    with pytest.raises(LedgerError, match="torch.float16"):
        explain(net, images.half(), 0)
    with torch.autocast("cpu", torch.bfloat16):
        explanation = explain(net, images, 0)
    torch.testing.assert_close(explanation.outputs, net(images))
    assert explain(net.double(), images.double(), 0).residual.abs().max() < 1e-14


def test_pictures_must_be_a_batch(net, images):
    for wrong in (images[0], images[:0]):
        with pytest.raises(TargetError, match="must be"):
            explain(net, wrong, 0)
    with pytest.raises(TargetError, match="no class 5: the model has 5, numbered 0 to 4"):
        explain(net, images, 5)


# --------------------------------------------------------------------------------------------------------------- states


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inside_contexts_without_gradients(net, images, context):
    expected = explain(net, images, 0)
    with context():
        explanation = explain(net, images.clone(), 0)
    assert torch.equal(explanation.contributions, expected.contributions)
    assert not explanation.contributions.is_inference()


def test_model_made_in_inference_mode(images, net):
    with torch.inference_mode():
        made = copy.deepcopy(net)
    assert made.head.weight.is_inference()
    explanation = explain(made, images, 0)
    torch.testing.assert_close(explanation.contributions, explain(net, images, 0).contributions)
    assert set(explanation.constants) == {"stem.bias", "norm.bias", "norm.running_mean", "head.bias"}


def test_train_mode_is_left_alone(net, images):
    net.train()
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    explanation = explain(net, images, 0)
    assert net.training and "batch mean" in explanation.constants
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())
    torch.testing.assert_close(explanation.outputs, copy.deepcopy(net)(images))


def test_parameters_keep_their_gradients(net, images):
    net(images).sum().backward()
    before = [parameter.grad.clone() for parameter in net.parameters()]
    images.requires_grad_()
    explain(net, images, targets=[0, 1])
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), before, strict=True)) and images.grad is None


def test_compiled_model_is_explained(net, images):
    compiled = torch.compile(net, backend="eager")
    torch.testing.assert_close(explain(compiled, images, 0).contributions, explain(net, images, 0).contributions)


def test_pictures_along_another_axis_are_explained_one_by_one(images):
    class SequenceFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 12, 2, 2)
            self.block = nn.TransformerEncoderLayer(12, 3, 20, batch_first=False, activation="gelu")
            self.head = nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block(self.stem(x).flatten(2).permute(2, 0, 1)).mean(0))

    model = SequenceFirst().eval()
    explanation = explain(model, images, targets=[0, 1])
    assert explanation.scores.shape == (3, 2) and explanation.balanced(1e-5).all()
    torch.testing.assert_close(explanation.outputs, model(images))


# ----------------------------------------------------------------------------------------------------- what they return


class Output(OrderedDict):
    """As the outputs of transformers are: a mapping that is also read by attribute."""


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: (y, y * 2),
        lambda y: [None, y],
        lambda y: {"logits": y},
        lambda y: Output(last_hidden_state=y[:, None].expand(-1, 3, -1), pooler_output=y),
        lambda y: Output(loss=None, logits=y),
        lambda y: {"x_norm_clstoken": y, "x_prenorm": y * 2},
        lambda y: ({"anything": y},),
    ],
)
def test_outputs_of_several_kinds(wrap, net, images):
    expected = explain(net, images, 0)
    net.wrap = wrap
    assert torch.equal(explain(net, images, 0).contributions, expected.contributions)


@pytest.mark.parametrize("output", [None, "logits", (), {}, {"logits": None}])
def test_no_tensor_at_all(output):
    with pytest.raises(TargetError, match="holds no tensor"):
        main_output(output)
