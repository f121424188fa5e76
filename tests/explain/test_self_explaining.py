"""Models that say themselves what each place adds: `explain` without a backward pass through them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bcosify.core.errors import LedgerError
from bcosify.explain import (
    ClassTarget,
    DirectionTarget,
    Explanation,
    SelfExplaining,
    SelfTarget,
    SimilarityTarget,
    TopTarget,
    ZeroShotTarget,
    attribute,
    explain,
    ledger_parts,
    panel,
)
from bcosify.explain.attribution import _spread
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn


class NoBackward(torch.autograd.Function):
    """Identity through which no gradient gets."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> Tensor:
        raise AssertionError("a backward pass went through the model")


class Mapped(nn.Module):
    """Strided features, one map for each of 5 outputs, their mean plus a bias."""

    def __init__(self, claim: float = 1.0) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 8, 3, stride=3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 5, 1, bias=False)
        self.bias = nn.Parameter(torch.randn(5))
        self.claim = claim
        self.runs = 0

    def maps(self, x: Tensor) -> Tensor:
        self.runs += 1
        return self.head(F.relu(self.norm(NoBackward.apply(self.features(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return self.maps(x).mean((2, 3)) + self.bias

    def output_maps(self, images: Tensor, weights=None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        maps = self.maps(images)
        shares, outputs = self.claim * maps / maps[0, 0].numel(), maps.mean((2, 3)) + self.bias
        if weights is None:
            return outputs, shares, {"bias": self.bias}
        wanted = weights(outputs.detach())
        return outputs, torch.einsum("bkd,bdhw->bkhw", wanted, shares), {"bias": wanted @ self.bias}


@pytest.fixture
def net() -> Mapped:
    torch.manual_seed(0)
    return Mapped().eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 10, 13, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def expected(net: Mapped, images: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(B, K, h, w) and (B, K): the parts of the scores weights (B, K, D) . outputs, written out by hand."""
    maps = net.maps(images) / net.maps(images)[0, 0].numel()
    return (weights[..., None, None] * maps[:, None]).sum(2), (weights * net.bias).sum(2)


def test_it_is_asked_once_and_no_backward_pass_goes_through_it(net, images):
    assert isinstance(net, SelfExplaining) and not isinstance(net.features, SelfExplaining)
    explanation = explain(net, images, targets=[4, 0])
    assert net.runs == 1
    assert explanation.contributions.shape == (3, 2, 10, 13)
    assert explanation.encoded_inputs is explanation.encoded_gradients is None
    with torch.no_grad():
        assert torch.equal(explanation.outputs, net(images))
    assert torch.equal(explanation.scores, explanation.outputs[:, [4, 0]])
    torch.testing.assert_close(explanation.constants["bias"], net.bias.detach()[[4, 0]].expand(3, 2))
    assert list(explanation.constants) == ["bias"] and explanation.residual.abs().max() < 1e-6
    assert not any(tensor.requires_grad for tensor in vars(explanation).values() if isinstance(tensor, Tensor))
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize(
    ("target", "weights"),
    [
        (ClassTarget(2), lambda y: torch.eye(5)[[2]].expand(3, 1, 5)),
        (TopTarget(2), lambda y: torch.eye(5)[y.topk(2, 1).indices]),
        (DirectionTarget(torch.arange(10.0).view(2, 5)), lambda y: torch.arange(10.0).view(2, 5).expand(3, 2, 5)),
        (SelfTarget(), lambda y: F.normalize(y, dim=1)[:, None]),
        (
            SimilarityTarget(torch.ones(1, 5)),
            lambda y: torch.full((3, 1, 5), 5**-0.5) / y.norm(dim=1)[:, None, None],
        ),
        (
            ZeroShotTarget(torch.eye(5)[:3], TopTarget(1)),
            lambda y: torch.eye(5)[:3][y[:, :3].argmax(1)][:, None] / y.norm(dim=1)[:, None, None],
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_target_weighs_the_maps(net, images, target, weights):
    explanation = explain(net, images, target)
    with torch.no_grad():
        maps, bias = expected(net, images, weights(net(images)))
    torch.testing.assert_close(explanation.constants["bias"], bias)
    torch.testing.assert_close(explanation.contributions.sum((2, 3)), maps.sum((2, 3)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(explanation.contributions, _spread(maps, (10, 13)), atol=1e-6, rtol=1e-5)
    assert explanation.balanced(1e-5).all()


def test_a_batch_is_explained_as_its_pictures_are(net, images):
    whole, parts = explain(net, images, TopTarget(2)), explain(net, images, TopTarget(2), batch_size=2)
    torch.testing.assert_close(parts.contributions, whole.contributions)
    torch.testing.assert_close(parts.constants["bias"], whole.constants["bias"])
    assert parts.encoded_inputs is None


def test_the_model_is_left_as_it_was(net, images):
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    explain(net, images, 1)
    assert net.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_maps_that_do_not_add_up_are_refused(images):
    torch.manual_seed(0)
    with pytest.raises(LedgerError, match="does not add up"):
        explain(Mapped(claim=0.5).eval(), images, 0)
    wrong = explain(Mapped(claim=0.5).eval(), images, 0, check=False)
    assert isinstance(wrong, Explanation) and not wrong.balanced().any()


def test_a_score_that_is_not_linear_is_refused(net, images):
    class Squared(ClassTarget):
        def scores(self, output: Tensor) -> Tensor:
            return super().scores(output).exp()

    with pytest.raises(LedgerError, match="not linear"):
        explain(net, images, Squared(0))


def test_attribute_has_the_shape_of_the_picture_and_the_sum_of_the_map(net, images):
    given = attribute(net, images, 3)
    explanation = explain(net, images, 3)
    assert given.shape == images.shape
    torch.testing.assert_close(given.sum(1), explanation.contributions[:, 0])


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 40), st.integers(1, 40))
def test_spread_keeps_every_cell_s_sum_and_place(h, w, height, width):
    maps = torch.randn(1, 2, h, w, dtype=torch.float64, generator=torch.Generator().manual_seed(h * 100 + w))
    spread = _spread(maps, (height, width))
    assert spread.shape == (1, 2, height, width)
    torch.testing.assert_close(spread.sum((2, 3)), maps.sum((2, 3)))
    # Independent: the same on a grid so fine that every cell and every pixel is whole, then summed over pixels.
    fine = maps.repeat_interleave(height, 2).repeat_interleave(width, 3) / (height * width)
    torch.testing.assert_close(spread, fine.unflatten(2, (height, h)).unflatten(4, (width, w)).sum((3, 5)))


def test_its_panel_shows_the_map_over_the_picture(net, images):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (10, 13, 3), dtype=np.uint8))
    explanation = explain(net, images, 0)
    drawn = np.asarray(panel(photo, explanation, "class 0"))
    assert drawn.ndim == 3 and len(np.unique(drawn.reshape(-1, 3), axis=0)) > 50
    with pytest.raises(ValueError, match="pass the image"):
        panel(None, explanation)


def test_it_says_from_how_many_places(net, images):
    h, w = net.maps(images).shape[-2:]
    for found in (
        explain(net, images, 0),
        explain(net, images, 0, batch_size=1),
        explain(net, images, 0, views="flip"),
    ):
        assert found.places == (h, w)
    names = [part.name for part in ledger_parts(explain(net, images, 0))]
    assert names == [f"from {h * w} places: for", f"from {h * w} places: against", "from constants"]
    assert explain(nn.Sequential(nn.Flatten(), nn.Linear(12, 1)), torch.randn(1, 3, 2, 2), 0).places is None


# ------------------------------------------------------------------------------------------------------------- wrappers


class Wrapped(nn.Module):
    """A model in another, `before` its pictures and `after` its outputs."""

    def __init__(self, inside: nn.Module, before=lambda x: x, after=lambda y, x: y) -> None:
        super().__init__()
        self.inside, self.before, self.after = inside, before, after

    def forward(self, x: Tensor) -> object:
        return self.after(self.inside(self.before(x)), x)


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "Sequential": nn.Sequential,
    "deeper": lambda net: nn.Sequential(nn.Identity(), Wrapped(net)),
    "averaged": lambda net: torch.optim.swa_utils.AveragedModel(net).eval(),
    "a dict": lambda net: Wrapped(net, after=lambda y, x: {"loss": None, "logits": y}),
    "several outputs": lambda net: Wrapped(net, after=lambda y, x: (y, x)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_model_explains_as_the_model_inside(net, images, wrap):
    wanted = explain(net, images, TopTarget(2))
    found = explain(wrap(net), images, TopTarget(2))
    torch.testing.assert_close(found.contributions, wanted.contributions)
    torch.testing.assert_close(found.outputs, wanted.outputs)
    torch.testing.assert_close(found.constant_part, wanted.constant_part)
    assert found.encoded_gradients is None and "forward" not in vars(net)


def test_what_a_wrapper_makes_of_the_output_is_linearised(net, images):
    """A choice among outputs with a scale: the map is the model's own, through both."""
    wrapped = Wrapped(net, after=lambda y, x: 2 * y[:, [3, 1]])
    found, wanted = explain(wrapped, images, targets=[0, 1]), explain(net, images, targets=[3, 1])
    torch.testing.assert_close(found.contributions, 2 * wanted.contributions)
    torch.testing.assert_close(found.scores, 2 * wanted.scores)
    assert found.outputs.shape == (3, 2) and found.balanced(1e-5).all()


def test_a_wrapper_may_normalise_what_it_is_given(net, images):
    wrapped = Wrapped(net, before=lambda x: (x - 0.5) / 0.25)
    found, wanted = explain(wrapped, images, 2), explain(net, (images - 0.5) / 0.25, 2)
    torch.testing.assert_close(found.contributions, wanted.contributions)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda net: Wrapped(net, before=lambda x: x.flip(-1)),
        lambda net: Wrapped(net, before=lambda x: F.interpolate(x, scale_factor=2)),
        lambda net: Wrapped(net, after=lambda y, x: y + x.mean((1, 2, 3))[:, None]),
        lambda net: Wrapped(net, after=lambda y, x: y + net(x.flip(-1))),
    ],
    ids=["mirrored", "enlarged", "a way around it", "called twice"],
)
def test_a_map_of_other_pictures_is_refused_by_name(net, images, wrap):
    with pytest.raises(LedgerError, match=r"holds inside \(Mapped\), which explains itself.*get_submodule\('inside'\)"):
        explain(wrap(net), images, 2)
    assert "forward" not in vars(net)
