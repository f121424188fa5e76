"""Every method on models whose answer is known, against captum's own where it has one, and where it does not apply."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from bcosify.convert import convert
from bcosify.convert.methods.bcos import BcosConfig
from bcosify.convert.randomise import randomise
from bcosify.core.errors import NotApplicable, TargetError
from bcosify.evaluate.baselines import METHODS, AttentionWeights, find_method, maps_of, rollout
from bcosify.evaluate.decisions import ClassDecisions, DirectionDecisions, interleaved
from torch import nn

from tiny import tiny_teacher
from toys import Linear

captum = pytest.importorskip("captum.attr")
NEEDS_TOKENS = {"grad-cam", "attention", "rollout", "chefer", "legrad", "grad-eclip", "attn-lrp"}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def linear(subject_of):
    """A linear model of 14 x 14 pictures that looks at a corner, its pictures and their decisions."""
    weights = torch.zeros(2, 3, 14, 14)
    weights[0, :, :4, :4] = weights[1, :, 10:, 10:] = draw(3, 4, 4).abs() + 0.5
    images = draw(3, 3, 14, 14, seed=1).abs() + 0.2
    return subject_of(Linear(weights, draw(2))), images, ClassDecisions(torch.tensor([0, 1, 0])), weights


@pytest.mark.parametrize("name", sorted({*METHODS} - NEEDS_TOKENS - {"centre", "edges"}))
def test_methods_find_the_corner_that_a_linear_model_looks_at(linear, name):
    subject, images, decisions, weights = linear
    maps = maps_of(find_method(name), subject, images, decisions)
    assert maps.shape == (3, 14, 14)
    inside = (weights[decisions.classes].abs().sum(1) > 0).float()
    positive = maps.clamp_min(0)
    share = (positive * inside).sum((1, 2)) / positive.sum((1, 2))
    # RISE's masks are smooth: they cannot say it as sharply.
    assert share.min() > (0.15 if name == "rise" else 0.95) and (maps * inside).sum((1, 2)).min() > 0


@pytest.mark.parametrize("name", ["explanation", "input-x-gradient", "integrated-gradients"])
def test_gradient_methods_of_a_linear_model_are_its_contributions(linear, name):
    subject, images, decisions, weights = linear
    wanted = (weights[decisions.classes] * images).sum(1)
    torch.testing.assert_close(maps_of(find_method(name), subject, images, decisions), wanted, atol=1e-5, rtol=1e-4)


def test_smoothgrad_of_a_square_is_its_mean_under_noise(subject_of):
    """x times the gradient of x squared is 2 x squared, and 2 (x squared + variance) on average under noise."""

    class Square(nn.Module):
        def forward(self, images):
            return images.pow(2).flatten(1).sum(1, keepdim=True)

    images = draw(2, 3, 24, 24) * torch.tensor([1.0, 3.0])[:, None, None, None]
    maps = maps_of(find_method("smoothgrad"), subject_of(Square()), images, ClassDecisions(torch.zeros(2).long()))
    more = (maps - 2 * images.pow(2).sum(1)).mean((1, 2))
    deviation = 0.15 * (images.amax((1, 2, 3)) - images.amin((1, 2, 3)))
    torch.testing.assert_close(more, 6 * deviation**2, atol=0, rtol=0.15)


def test_occlusion_and_lime_of_a_linear_model_are_the_squares_drops(linear):
    """Both compare with grey, and spread a square's drop over its pixels."""
    subject, images, decisions, weights = linear
    grey = subject.normalised(torch.full_like(images, 0.5))
    drops = F.avg_pool2d((weights[decisions.classes] * (images - grey)).sum(1, keepdim=True), 2)
    wanted = drops.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, 0]
    found = maps_of(find_method("occlusion"), subject, images, decisions)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    lime = maps_of(find_method("lime"), subject, images, decisions)
    assert F.cosine_similarity(lime.flatten(1), wanted.flatten(1)).min() > 0.97  # its ridge pulls towards 0


def test_occlusion_of_several_decisions_about_one_picture_shares_its_passes(linear):
    subject, images, decisions, _ = linear
    images, decisions = images[[0, 0, 1]], decisions.rows(torch.tensor([0, 1, 1]))
    alone = [
        maps_of(find_method("occlusion"), subject, images[[i]], decisions.rows(torch.tensor([i]))) for i in range(3)
    ]
    seen: list[int] = []
    handle = subject.model.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    together = maps_of(find_method("occlusion"), subject, images, decisions)
    handle.remove()
    torch.testing.assert_close(together, torch.cat(alone))
    assert not torch.equal(together[0], together[1])
    assert sum(seen) == 2 * 50  # two pictures, whole and without each of 7 x 7 squares


@pytest.mark.parametrize("name", sorted(METHODS))
def test_maps_do_not_depend_on_the_batch_and_leave_nothing_behind(tiny_subject, name):
    images, decisions = draw(3, 3, 64, 64), ClassDecisions(torch.tensor([1, 2, 3]))
    subject = tiny_subject("test_vit", batch_size=16)
    if find_method(name).passes > 100:
        images, decisions = images[:1], decisions.rows(torch.arange(1))
    state = torch.random.get_rng_state()
    together = maps_of(find_method(name), subject, images, decisions, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(module._forward_hooks for module in subject.model.modules())
    assert all(parameter.grad is None for parameter in subject.model.parameters())
    single = maps_of(find_method(name), dataclasses.replace(subject, batch_size=1), images, decisions, seed=3)
    if name != "rise":  # its masks are drawn in groups of the batch's size
        torch.testing.assert_close(single, together, atol=1e-4 * float(together.abs().max()), rtol=1e-3)


def test_grad_cam_of_a_cnn_is_captums(tiny_subject):
    subject = tiny_subject("test_resnet")
    images, decisions = draw(2, 3, 64, 64), ClassDecisions(torch.tensor([1, 2]))
    from bcosify.convert.taps import find_blocks

    layer = subject.model.get_submodule(find_blocks(subject.model)[-1])
    theirs = captum.LayerGradCam(subject.model, layer).attribute(
        images, target=decisions.classes, relu_attributions=True
    )
    wanted = F.interpolate(theirs, (64, 64), mode="bilinear")[:, 0]
    torch.testing.assert_close(
        maps_of(find_method("grad-cam"), subject, images, decisions), wanted, atol=1e-6, rtol=1e-4
    )


@pytest.mark.parametrize("fused", [True, False])
def test_attention_is_read_fused_or_not(fused):
    torch.manual_seed(0)
    layer = timm.layers.Attention(16, num_heads=2)
    layer.fused_attn = fused
    tokens = draw(2, 5, 16)
    with torch.no_grad(), AttentionWeights() as mode:
        layer(tokens)
    q, k, _ = layer.qkv(tokens).reshape(2, 5, 3, 2, 8).permute(2, 0, 3, 1, 4)
    (found,) = mode.found
    torch.testing.assert_close(found, (q @ k.transpose(-1, -2) / math.sqrt(8)).softmax(-1))


def test_torchs_own_attention_is_read():
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(16, 2, batch_first=True).train()
    tokens = draw(2, 5, 16)
    with AttentionWeights() as mode:
        _, weights = layer(tokens, tokens, tokens, need_weights=True)
    torch.testing.assert_close(torch.stack(mode.found).mean((0, 2)), weights)


def test_rollout_in_closed_form():
    one = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])
    half = torch.tensor([[[0.5, 0.5], [0.0, 1.0]]])
    torch.testing.assert_close(rollout([one]), half)
    torch.testing.assert_close(rollout([one, one]), half @ half)
    rows = rollout([draw(1, 6, 6, seed=s).softmax(-1) for s in range(3)]).sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows))


def test_raw_attention_shows_the_patch_that_the_class_token_looks_at(tiny_subject):
    """The last layer's keys are those of one patch only, whatever the picture."""
    subject = tiny_subject("test_vit")
    layer = subject.model.blocks[-1].attn
    width = layer.qkv.in_features
    patch = 1 + 5  # after the class token

    def look(module, args, output):
        output = output.clone()
        output[..., : 2 * width] = 0
        output[..., :width] = output[:, patch, width : 2 * width] = 5
        return output

    with torch.no_grad():
        hook = layer.qkv.register_forward_hook(look)
        maps = maps_of(find_method("attention"), subject, draw(1, 3, 64, 64), ClassDecisions(torch.tensor([0])))
        hook.remove()
    rows = subject.tokens(subject.model, draw(1, 3, 64, 64)).shape[-1]  # type: ignore[misc]
    top, left = divmod(int(maps[0].argmax()), 64)
    size = 64 // rows
    assert (top // size) * rows + left // size == 5


@pytest.fixture(scope="module")
def unfused(tiny_subject):
    """A ViT's subject, and (blocks to keep, images, classes) -> its matrices and the score's gradients by autograd.

    Nothing that the methods use: the layers' own unfused products, with a zero added to each matrix.
    """
    subject = tiny_subject("test_vit")

    def slow(depth, images, classes):
        model = copy.deepcopy(subject.model)
        model.blocks = model.blocks[:depth]
        seen, zeros = [], []

        def add(module, args, output):
            seen.append(output.detach())
            zeros.append(torch.zeros_like(output, requires_grad=True))
            return output + zeros[-1]

        for block in model.blocks:
            block.attn.fused_attn = False
            block.attn.attn_drop.register_forward_hook(add)
        score = sum(row[c] for row, c in zip(model(images), classes, strict=True))
        return seen, torch.autograd.grad(score, zeros)

    return subject, slow


def enlarged(rows, prefix=1):
    """A token's value (B, N) on every pixel of a picture of 64, as all methods enlarge grids."""
    side = math.isqrt(rows.shape[1] - prefix)
    return F.interpolate(rows[:, prefix:].reshape(-1, 1, side, side), (64, 64), mode="bilinear")[:, 0]


def test_chefers_relevance_is_the_recursion_of_the_paper(unfused):
    subject, slow = unfused
    images, classes = draw(2, 3, 64, 64), torch.tensor([1, 3])
    weights, gradients = slow(None, images, classes)
    wanted = []
    for picture in range(2):
        relevance = torch.eye(weights[0].shape[-1])
        for attention, gradient in zip(weights, gradients, strict=True):
            heads = [(g * a).clamp(min=0) for g, a in zip(gradient[picture], attention[picture], strict=True)]
            relevance = relevance + sum(heads) / len(heads) @ relevance
        wanted.append(relevance[0])
    found = maps_of(find_method("chefer"), subject, images, ClassDecisions(classes))
    torch.testing.assert_close(found, enlarged(torch.stack(wanted)), atol=0, rtol=1e-3)


def test_legrad_is_the_mean_over_models_that_end_at_each_layer(unfused):
    subject, slow = unfused
    images, classes = draw(2, 3, 64, 64), torch.tensor([1, 3])
    depth = len(subject.model.blocks)
    total = torch.zeros(2, 17)
    for layers in range(1, depth + 1):
        _, gradients = slow(layers, images, classes)
        total += gradients[-1].clamp(min=0).mean((1, 2)) / depth
    wanted = enlarged(total)
    low, high = wanted.amin((1, 2), keepdim=True), wanted.amax((1, 2), keepdim=True)
    found = maps_of(find_method("legrad"), subject, images, ClassDecisions(classes))
    torch.testing.assert_close(found, (wanted - low) / (high - low), atol=1e-4, rtol=1e-3)


def test_grad_eclip_is_the_papers_equation(tiny_subject):
    """By hooks on the last layer's own linear maps, and a loop over pictures and patches."""
    subject = tiny_subject("test_vit")
    model = copy.deepcopy(subject.model)
    images, direction = draw(2, 3, 64, 64), F.normalize(draw(2, 1000), dim=1)
    kept = {}

    def keep(name):
        return lambda module, args, output: kept.update({name: output if name == "qkv" else args[0]})

    model.blocks[-1].attn.qkv.register_forward_hook(keep("qkv"))
    model.blocks[-1].attn.proj.register_forward_hook(keep("seen"))
    scores = (model(images.clone().requires_grad_()) * direction).sum()
    (gradient,) = torch.autograd.grad(scores, kept["seen"])
    query, key, value = kept["qkv"].detach().chunk(3, -1)
    wanted = torch.zeros(2, 17)
    for picture in range(2):
        alike = torch.stack([F.cosine_similarity(query[picture, 0], key[picture, i], 0) for i in range(1, 17)])
        alike = (alike - alike.min()) / (alike.max() - alike.min())
        for i in range(1, 17):
            wanted[picture, i] = (alike[i - 1] * (gradient[picture, 0] @ value[picture, i])).clamp(min=0)
    found = maps_of(find_method("grad-eclip"), subject, images, DirectionDecisions(direction, torch.zeros(1000)))
    assert wanted.max() > 0
    torch.testing.assert_close(found, enlarged(wanted), atol=1e-6, rtol=1e-3)


def test_where_patches_are_averaged_chefers_row_is_theirs_and_grad_eclip_does_not_apply(tiny_subject):
    subject = tiny_subject("test_vit", model=copy.deepcopy(tiny_subject("test_vit").model))
    subject.model.global_pool = "avg"
    images, decisions = draw(1, 3, 64, 64), ClassDecisions(torch.tensor([1]))
    with pytest.raises(NotApplicable, match="does not depend on what the class token sees"):
        maps_of(find_method("grad-eclip"), subject, images, decisions)
    # A patch that is only relevant for itself has its own 1 in the mean row of 16.
    assert maps_of(find_method("chefer"), subject, images, decisions).min() >= 1 / 16


class _Torchs(nn.Module):
    """timm's attention as torch's own layer, with the same weights."""

    def __init__(self, attention):
        super().__init__()
        width = attention.proj.in_features
        self.layer = nn.MultiheadAttention(width, attention.num_heads, batch_first=True)
        state = {"in_proj_weight": attention.qkv.weight, "in_proj_bias": attention.qkv.bias}
        more = {f"out_proj.{name}": tensor for name, tensor in attention.proj.state_dict().items()}
        self.layer.load_state_dict({**state, **more})

    def forward(self, x, **_):
        return self.layer(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("name", ["attention", "rollout", "chefer", "legrad", "grad-eclip", "attn-lrp", "libragrad"])
def test_a_models_map_is_the_same_with_torchs_own_attention(tiny_subject, name):
    subject = tiny_subject("test_vit")
    model = copy.deepcopy(subject.model)
    for block in model.blocks:
        block.attn = _Torchs(block.attn)
    other = tiny_subject("test_vit", model=model)
    images, decisions = draw(2, 3, 64, 64), ClassDecisions(torch.tensor([1, 3]))
    wanted = maps_of(find_method(name), subject, images, decisions)
    found = maps_of(find_method(name), other, images, decisions)
    torch.testing.assert_close(found, wanted, atol=1e-4 * float(wanted.abs().max()), rtol=1e-3)


def _through(value, share):
    return share * value + (1 - share) * value.detach()


def slow_relevance(model, images, classes, key, value):
    """A ViT written out, of whose gradient these shares go to keys and queries, and to values."""

    def norm(layer, x):
        deviation = (x.var(-1, correction=0, keepdim=True) + layer.eps).sqrt().detach()
        return (x - x.mean(-1, keepdim=True)) / deviation * layer.weight + layer.bias

    images = images.clone().requires_grad_()
    tokens = model._pos_embed(model.patch_embed(images))
    for block in model.blocks:
        x = norm(block.norm1, tokens)
        q, k, v = block.attn.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = _through(q, key), _through(k, key), _through(v, value)
        seen = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
        tokens = tokens + block.attn.proj(seen.transpose(1, 2).flatten(2))
        x = block.mlp.fc1(norm(block.norm2, tokens))
        tokens = tokens + block.mlp.fc2(x * (F.gelu(x) / x).detach())
    logits = model.head(norm(model.norm, tokens)[:, 0])
    torch.testing.assert_close(logits, model(images))
    (gradient,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), images)
    return (images * gradient).sum(1).detach()


@pytest.mark.parametrize(("name", "key", "value"), [("attn-lrp", 1 / 4, 1 / 2), ("libragrad", 0, 1)])
@pytest.mark.parametrize("fused", [True, False])
def test_relevance_rules_of_a_vit_are_those_of_one_written_out(tiny_subject, name, key, value, fused):
    subject = tiny_subject("test_vit", model=copy.deepcopy(tiny_subject("test_vit").model))
    for block in subject.model.blocks:
        block.attn.fused_attn = fused
    images, classes = draw(2, 3, 64, 64), torch.tensor([1, 3])
    wanted = slow_relevance(subject.model, images, classes, key, value)
    found = maps_of(find_method(name), subject, images, ClassDecisions(classes))
    torch.testing.assert_close(found, wanted, atol=1e-4 * float(wanted.abs().max()), rtol=1e-3)


def test_libragrad_of_an_unconverted_model_is_our_explanation_and_attn_lrp_is_not(tiny_subject):
    subject, decisions = tiny_subject("test_vit"), ClassDecisions(torch.tensor([1, 3]))
    ours, libra, attn = (
        maps_of(find_method(name), subject, draw(2, 3, 64, 64), decisions)
        for name in ("explanation", "libragrad", "attn-lrp")
    )
    torch.testing.assert_close(libra, ours, atol=1e-4 * float(ours.abs().max()), rtol=1e-3)
    assert (attn - ours).abs().mean() > 0.1 * ours.abs().mean()


def test_relevance_rules_leave_weights_as_they_asked_for_gradients(tiny_subject):
    model = copy.deepcopy(tiny_subject("test_vit").model)
    subject = tiny_subject("test_vit", model=model)  # freezes it
    images, decisions = draw(1, 3, 64, 64), ClassDecisions(torch.tensor([1]))
    frozen = maps_of(find_method("attn-lrp"), subject, images, decisions)
    model.requires_grad_(True)
    torch.testing.assert_close(maps_of(find_method("attn-lrp"), subject, images, decisions), frozen)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_relevance_rules_say_where_they_do_not_apply(tiny_subject):
    images, decisions = draw(1, 3, 64, 64), ClassDecisions(torch.tensor([1]))
    with pytest.raises(NotApplicable, match="no attention was seen"):
        maps_of(find_method("attn-lrp"), tiny_subject("test_resnet"), images, decisions)
    student = tiny_subject("test_vit", model=convert(tiny_teacher(), BcosConfig()).model, name="student")
    for name in ("attn-lrp", "libragrad"):
        with pytest.raises(NotApplicable, match="its layers are converted"):
            maps_of(find_method(name), student, images, decisions)


def test_torchs_own_attention_has_a_gradient():
    """Against the gradient by hand: what each token adds to the output, times what the score asks of it."""
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(16, 2, batch_first=True).eval().requires_grad_(False)
    tokens, asked = draw(2, 5, 16).requires_grad_(), draw(2, 5, 16, seed=1)
    plain, none = layer(tokens, tokens, tokens, need_weights=False)
    with AttentionWeights(follow=True) as mode:
        output, hidden = layer(tokens, tokens, tokens, need_weights=False)
    assert none is None and hidden is None
    torch.testing.assert_close(output, plain)
    (found,) = mode.gradients((output * asked).sum())
    values = F.linear(tokens, layer.in_proj_weight[32:], layer.in_proj_bias[32:]).unflatten(-1, (2, 8))
    wanted = torch.einsum("bihd,bjhd->bhij", (asked @ layer.out_proj.weight).unflatten(-1, (2, 8)), values)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", ["attention", "rollout", "chefer", "legrad", "grad-eclip"])
def test_attention_of_a_cnn_does_not_apply(tiny_subject, name):
    with pytest.raises(NotApplicable, match="attention .* was seen"):
        maps_of(find_method(name), tiny_subject("test_resnet"), draw(1, 3, 64, 64), ClassDecisions(torch.tensor([0])))


def test_nan_maps_are_said(subject_of):
    model = Linear(torch.full((2, 3, 8, 8), torch.nan))
    with pytest.raises(NotApplicable, match="3 of 3 maps hold NaN"):
        maps_of(
            find_method("input-x-gradient"), subject_of(model), draw(3, 3, 8, 8), ClassDecisions(torch.zeros(3).long())
        )


def test_an_unknown_method_is_told_the_near_one():
    with pytest.raises(TargetError, match="Did you mean 'occlusion'"):
        find_method("oclusion")


def test_features_without_classes_are_explained_along_their_direction(tiny_subject):
    torch.manual_seed(0)
    model = randomise(timm.create_model("test_vit", num_classes=0, img_size=64), draw(2, 3, 64, 64))
    subject = tiny_subject("test_vit", model=model, classifier=False)
    images = draw(2, 3, 64, 64, seed=4)
    decisions = DirectionDecisions(F.normalize(draw(2, model.num_features)), torch.zeros(model.num_features))
    for name in ("explanation", "input-x-gradient", "grad-cam", "occlusion"):
        maps = maps_of(find_method(name), subject, images, decisions)
        assert maps.shape == (2, 64, 64) and maps.abs().max() > 0


@pytest.mark.parametrize("name", ["explanation", "grad-cam", "averaged", "rollout", "edges", "input-x-gradient"])
def test_several_decisions_about_a_picture_are_those_of_each_alone(name, tiny_subject):
    """And they share its forward pass where the method can; where it knows no decision, its map."""
    subject, images = tiny_subject(), draw(5, 3, 64, 64)
    asked = [ClassDecisions(torch.tensor(classes)) for classes in ([1, 2, 3, 4, 5], [9, 8, 7, 6, 5], [0, 5, 0, 5, 0])]
    alone = [maps_of(find_method(name), subject, images, one, seed=1) for one in asked]
    seen = []
    handle = subject.model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    together = maps_of(find_method(name), subject, images, interleaved(asked), seed=1)
    handle.remove()
    torch.testing.assert_close(together.unflatten(0, (5, 3)), torch.stack(alone, 1), atol=1e-5, rtol=1e-4)
    assert sum(seen) == {"averaged": 9 * 5, "edges": 0, "input-x-gradient": 3 * 5}.get(name, 5)


def test_decisions_without_classes_are_interleaved_too(tiny_subject):
    subject, images = tiny_subject(classifier=False), draw(3, 3, 64, 64)
    own, other = (
        DirectionDecisions(torch.randn(3, 1000, generator=torch.Generator().manual_seed(s)), torch.zeros(1000))
        for s in (1, 2)
    )
    maps = maps_of(find_method("explanation"), subject, images, interleaved([own, other]))
    for one, found in zip((own, other), (maps[::2], maps[1::2]), strict=True):
        torch.testing.assert_close(
            found, maps_of(find_method("explanation"), subject, images, one), atol=1e-5, rtol=1e-4
        )
