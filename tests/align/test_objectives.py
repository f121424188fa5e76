"""Objectives, losses and rates against closed forms; optimizers and averages come back from checkpoints."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math

import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from bcosify.align import state
from bcosify.align.losses import cosine_distance, magnitude_error, pairwise_error
from bcosify.align.maps import check_maps
from bcosify.align.objectives import OBJECTIVES, base, deviations, observe
from bcosify.align.objectives.end_to_end import EndToEndConfig, WeightNorms
from bcosify.align.optimizers import OPTIMIZERS, hidden, make_optimizer
from bcosify.align.recipe import Phase, Recipe, dump, from_values
from bcosify.align.schedule import learning_rate
from bcosify.convert import convert, load, load_teacher, set_strength
from bcosify.convert.layers import scheduled_layers
from bcosify.convert.taps import channels_last, depth_taps, find_blocks
from bcosify.core.errors import RecipeError
from bcosify.evaluate.metrics.fidelity import fidelity, linear_cka
from timm.optim import muon
from torch import nn

from runs import RECIPE as SMALL
from runs import aligned

RECIPE = Recipe("B is 2", 64, 4, (Phase("end-to-end", 40, 1e-3),))


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module]:
    """A student at B = 2 without biases, and its teacher."""
    torch.manual_seed(0)
    teacher = load_teacher("timm:test_vit", pretrained=False, image_size=64)
    student = convert(teacher).model
    set_strength(student, 2.0, 0.0)
    return student, teacher.model.eval().requires_grad_(False)


def losses(pair, name, recipe=RECIPE):
    student, teacher = pair
    pictures = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    objective = OBJECTIVES[name](student, recipe)
    objective.begin()
    return objective, objective(pictures, *observe(teacher, pictures, objective.taps))


def test_what_is_seen_of_the_teacher_has_no_graph(pair):
    student, _ = pair  # even of a model that is trained
    calls, output = observe(student, torch.randn(1, 3, 64, 64), ("blocks.0",))
    assert not output.requires_grad and not calls["blocks.0"].output.requires_grad
    assert not output.is_inference()  # a loss may keep it for its backward pass


def test_losses_are_their_closed_forms():
    ours, theirs = torch.randn(5, 7), torch.randn(5, 7)
    assert cosine_distance(ours, ours * 3) == pytest.approx(0, abs=1e-6)
    assert magnitude_error(ours, ours * math.e**2) == pytest.approx(4, rel=1e-5)
    assert magnitude_error(torch.zeros(2, 3), torch.zeros(2, 3)) == 0
    cosines = F.cosine_similarity(ours[:, None], theirs[None], dim=-1)
    expected = sum(
        -math.log(1 / (1 + math.exp(-(1 if i == j else -1) * (10 * float(cosines[i, j]) - 10)))) / 5
        for i in range(5)
        for j in range(5)
    )
    assert float(pairwise_error(ours, theirs)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["block-local", "layer-local", "block-own"])
def test_local_losses_reach_their_own_part_alone(pair, name):
    objective, found = losses(pair, name)
    part = find_blocks(pair[0])[-1] if name != "layer-local" else f"{find_blocks(pair[0])[-1]}.mlp.fc2"
    found[part].backward()
    touched = {key for key, p in pair[0].named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert touched and all(key.startswith(f"{part}.") for key in touched)
    assert part in objective.taps


def test_a_block_on_its_own_input_is_the_whole_students_block(pair):
    """The inputs are those of the plain forward pass, and the hooks are gone afterwards."""
    student, _ = pair
    _, cut = losses(pair, "block-own")
    _, whole = losses(pair, "end-to-end")
    last = find_blocks(student)[-1]
    assert cut[last].item() == pytest.approx(whole[last].item(), rel=1e-6)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in student.modules())


def test_terms_for_magnitudes_and_weight_norms(pair):
    recipe = EndToEndConfig(magnitude_weight=0.5, weight_norm=2.0, output_weight=3.0)
    objective, found = losses(pair, "end-to-end", recipe)
    assert found["weight norm"].item() == 0 and found["magnitude"].item() > 0
    parts = sum(value.item() for name, value in found.items() if name != "total")
    assert found["total"].item() == pytest.approx(parts, rel=1e-6)
    assert found["output"].item() == pytest.approx(3 * losses(pair, "end-to-end")[1]["output"].item(), rel=1e-5)
    norms = WeightNorms(2.0)
    norms.begin(pair[0])
    with torch.no_grad():
        for _, layer in scheduled_layers(pair[0]):
            if getattr(layer, "weight", None) is not None:
                layer.weight.mul_(1.1)
    assert norms.penalty(pair[0]).item() == pytest.approx(2 * 0.1**2, rel=1e-4)


def test_standardised_channels_count_alike(pair):
    """Multiplying channels of both sides by any numbers changes nothing, and `none` is the plain cosine."""
    student, teacher = pair
    pictures = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    kinds = {}
    for kind in ("none", "channel", "phi-s"):
        objective = OBJECTIVES["end-to-end"](student, EndToEndConfig(centre=True, standardise=kind))
        objective.centre_on(*observe(teacher, pictures, objective.taps))
        kinds[kind] = objective
    assert not kinds["none"].deviations and OBJECTIVES["end-to-end"](student, RECIPE).asks_teacher is False
    name = find_blocks(student)[-1]
    theirs = channels_last(observe(teacher, pictures, (name,))[0][name].output)
    ours = theirs + torch.randn(theirs.shape) * theirs.std(0)
    mean, std = theirs.mean(0), theirs.std(0, correction=0)
    expected = 1 - F.cosine_similarity((ours - mean) / std, (theirs - mean) / std).mean()
    assert kinds["channel"]._distance(name, ours, theirs).item() == pytest.approx(expected.item(), rel=1e-4)
    assert kinds["channel"]._distance(name, ours, theirs) != kinds["none"]._distance(name, ours, theirs)
    # A channel without any variance does not rule: it counts as one of a tenth of the mean size.
    assert deviations(torch.tensor([[1.0, 5.0], [-1.0, 5.0]]), 0.1).tolist() == pytest.approx([1.0, 0.1 / 2**0.5])


def test_phi_s_is_the_squared_error_after_its_rotation(pair):
    """The rotation itself, written out: PCA, then Hadamard, then one scale; every channel then has variance 1."""
    torch.manual_seed(0)
    theirs, ours = (torch.randn(500, 8) @ torch.randn(8, 8) + 3 for _ in range(2))
    mean = theirs.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov((theirs - mean).T, correction=0))
    hadamard = torch.ones(1, 1)
    for _ in range(3):
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)]) / 2**0.5
    rotation = hadamard @ vectors.T / values.mean().sqrt()
    a, b = ((x - mean) @ rotation.T for x in (ours, theirs))
    assert torch.allclose(b.var(0, correction=0), torch.ones(8), atol=1e-3)
    objective = OBJECTIVES["end-to-end"](pair[0], EndToEndConfig(standardise="phi-s"))
    objective.deviations["output"] = theirs.std(0, correction=0)
    found = objective._distance("output", ours, theirs)
    assert found.item() == pytest.approx(F.mse_loss(a, b).item(), rel=1e-4)
    assert objective._distance("output", mean.expand(500, 8), theirs).item() == pytest.approx(1, rel=1e-4)
    # Cosines do not see what PHI-S does beyond taking the mean away.
    assert F.cosine_similarity(a, b).tolist() == pytest.approx(
        F.cosine_similarity(ours - mean, theirs - mean).tolist(), abs=1e-4
    )


def test_depths_are_shares_of_the_blocks():
    twelve = tuple(map(str, range(1, 13)))
    assert depth_taps(twelve) == ("4", "8", "12")
    assert depth_taps(twelve, (1.0,)) == ("12",)
    assert depth_taps(twelve, [(i + 1) / 12 for i in range(12)]) == twelve
    assert depth_taps(("1", "2")) == ("1", "2")


def test_learning_rate_rises_holds_and_falls():
    phase = Phase("end-to-end", 100, 2.0, warmup=0.1, decay=0.3, final_learning_rate=0.0)
    rates = [learning_rate(phase, k, 100) for k in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (k + 1) for k in range(10)])
    assert rates[10:71] == [2.0] * 61
    assert all(a > b for a, b in zip(rates[70:], rates[71:], strict=False)) and rates[-1] < 0.01
    assert rates[85] == pytest.approx(1.0)
    phase = dataclasses.replace(phase, decay=1.0, final_learning_rate=0.05)
    whole = [learning_rate(phase, k, 100) for k in range(100)]
    assert whole[55] == pytest.approx(2 * (0.05 + 0.95 / 2)) and whole[99] > 0.1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_come_back_from_a_checkpoint_bit_for_bit(name, tmp_path):
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5))
        phase = dataclasses.replace(RECIPE.phases[0], optimizer=name)
        return model, make_optimizer(model, phase, RECIPE, tuple(0.5 for _ in model.parameters()))

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            optimizer.zero_grad()
            model(torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
            optimizer.step()

    (whole, optimizer), (parts, first), (resumed, second) = build(), build(), build()
    steps(whole, optimizer, range(6))
    steps(parts, first, range(3))
    folder = state.write(tmp_path, parts, first, state.Progress(3, 0, "d"), average=whole)
    average = build()[0]
    state.restore(folder, resumed, average)
    state.restore_optimizer(folder, second)
    assert all(torch.equal(a, b) for a, b in zip(average.parameters(), whole.parameters(), strict=True))
    assert [group["lr"] for group in second.param_groups] == [1e-3] * 4
    steps(resumed, second, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_muon_takes_the_maps_between_channels_inside_of_blocks():
    model = timm.create_model("test_efficientnet", num_classes=3)
    taken = hidden(model)
    names = {name for name, weight in model.named_parameters() if id(weight) in taken}
    assert {"blocks.1.0.conv_exp.weight", "blocks.1.0.conv_pwl.weight"} < names
    assert not names & {"conv_stem.weight", "classifier.weight", "blocks.1.0.bn1.weight"}
    kernels = dict(model.named_parameters())
    depthwise = {name for name, weight in kernels.items() if weight.dim() == 4 and weight.shape[1] == 1}
    assert depthwise and not names & depthwise


def test_muon_on_a_cpu_orthogonalises_in_float32(monkeypatch):
    plain, seen = muon.zeropower_via_newtonschulz, []

    def spy(matrix, *args, **options):
        seen.append(options.get("dtype"))
        return plain(matrix, *args, **options)

    monkeypatch.setattr(muon, "zeropower_via_newtonschulz", spy)
    model = nn.Sequential(nn.Linear(24, 16, bias=False))
    model[0].weight.grad = torch.randn(16, 24)
    make_optimizer(model, Phase("end-to-end", 8, 1.0, "muon"), RECIPE, (1.0,)).step()
    assert seen == [torch.float32] and muon.zeropower_via_newtonschulz is spy


@pytest.mark.parametrize("model", ["run", "cnn"])
@pytest.mark.parametrize("objective", ["block-local", "layer-local", "block-own", "end-to-end"])
def test_muon_teaches_in_every_phase(model, objective, shards, tmp_path, request):
    phase = Phase(objective, 40, 5e-3, "muon", calibrate=8, batch_statistics=model == "cnn")
    folder = request.getfixturevalue(model)
    found = aligned(folder, shards, tmp_path / "out", dataclasses.replace(SMALL, phases=(phase,)))
    losses = [row["loss"] for row in found if "loss" in row]
    assert len(losses) == 10 and all(map(math.isfinite, losses))
    before, after = (dict(load(path).model.named_parameters()) for path in (folder, tmp_path / "out"))
    touched = [name for name, weight in before.items() if weight.dim() > 1 and not torch.equal(weight, after[name])]
    assert len(touched) >= len(find_blocks(load(folder).model))
    # The teacher's last norms of this CNN's blocks are zero, and so are the updates that an error is measured by.
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3]) or (model == "cnn" and objective.endswith("local"))


def test_fidelity_of_a_rotated_and_scaled_teacher():
    """Linear CKA does not see rotations and one scale; and is the textbook's HSIC ratio."""
    torch.manual_seed(0)
    teacher = torch.randn(20, 6) + 3
    rotation = torch.linalg.qr(torch.randn(6, 6)).Q
    found = fidelity(teacher @ rotation * 4 + 1, teacher)
    assert found["cka"] == pytest.approx(1, abs=1e-4) and found["neighbour_agreement"] == 1
    other = torch.randn(20, 9)
    centring = torch.eye(20) - 1 / 20
    k, m = (centring @ x @ x.T @ centring for x in (teacher, other))
    expected = torch.trace(k @ m) / torch.sqrt(torch.trace(k @ k) * torch.trace(m @ m))
    assert fidelity(other @ torch.eye(9, 6), teacher)["cka"] <= 1
    assert float(linear_cka(other, teacher)) == pytest.approx(float(expected), rel=1e-4)


# ------------------------------------------------------------------------------------------------ settings and new ones


def test_a_phase_may_have_settings_of_its_own(pair):
    """They come before those of the recipe, in what is computed, in what is checked and in what is written."""
    flat = {"pressure": "p", "image_size": 64, "batch_size": 4, "output_weight": 3.0}
    own = {"end-to-end": {"depths": [0.5], "output_weight": 2}}
    phases = [
        {"objective": own, "pictures": 8, "learning_rate": 1e-3},
        {"objective": "end-to-end", "pictures": 8, "learning_rate": 1e-3},
    ]
    recipe = from_values({**flat, "phases": phases})
    assert [phase.objective for phase in recipe.phases] == ["end-to-end"] * 2
    assert from_values(yaml.safe_load(dump(recipe))) == recipe
    assert yaml.safe_load(dump(recipe))["phases"][0]["objective"] == {
        "end-to-end": {"depths": [0.5], "output_weight": 2.0}
    }
    first, second = (OBJECTIVES[phase.objective](pair[0], recipe, phase.settings) for phase in recipe.phases)
    assert (first.output_weight, len(first.taps)) == (2, 1) and (second.output_weight, len(second.taps)) == (3, 3)
    # As a recipe that says it for all.
    whole = from_values({**flat, "output_weight": 2.0, "depths": [0.5], "phases": [phases[1]]})
    pictures = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    seen = observe(pair[1], pictures, first.taps)
    assert (
        first(pictures, *seen)["total"]
        == OBJECTIVES["end-to-end"](pair[0], whole, whole.phases[0].settings)(pictures, *seen)["total"]
    )


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ({"end-to-end": {"centr": True}}, "unknown key phases.0.objective.end-to-end.centr. Did you mean 'centre'"),
        ({"pairwise": {"anchor": 1.0}}, "unknown key phases.0.objective.pairwise.anchor"),
        ({"decisions": {"anchor": "much"}}, "phases.0.objective.decisions.anchor: must be float; got 'much'"),
        ({"decisions": 3}, "phases.0.objective.decisions: must be keys and values; got 3"),
        ("end-to-en", "phases.0.objective: must be one of .* got 'end-to-en'. Did you mean 'end-to-end'"),
        ({"pairwise": {}, "classes": {}}, "phases.0.objective: must be str"),
    ],
)
def test_settings_that_an_objective_has_not_are_refused(objective, said):
    phase = {"objective": objective, "pictures": 8, "learning_rate": 1e-3}
    with pytest.raises(RecipeError, match=said):
        from_values({"pressure": "p", "image_size": 64, "batch_size": 4, "phases": [phase]})


def test_settings_of_a_phase_are_checked_as_those_of_a_recipe(pair):
    student, teacher = pair
    phase = dataclasses.replace(RECIPE.phases[0], settings={"map_weight": 1.0, "map_share": 2.0})
    recipe = dataclasses.replace(RECIPE, phases=(phase,))
    with pytest.raises(RecipeError, match="end-to-end.map_share: must be above 0 and at most 1; got 2"):
        OBJECTIVES["end-to-end"](student, recipe, phase.settings)
    blind = dataclasses.replace(recipe, compile=True)
    with pytest.raises(RecipeError, match=r"phases\.0\.objective\.end-to-end\.map_weight: with compile"):
        check_maps(blind, student, teacher)


def test_a_new_objective_is_one_file(run, shards, tmp_path, monkeypatch):
    """The example of `objectives.base`, in a file that nothing names; a run trains with it."""
    text = inspect.getdoc(base).split("\n\n", 1)[1]
    lines = [line[4:] for line in text.splitlines() if not line or line.startswith("    ")]
    head = ["import dataclasses", "from bcosify.align.objectives.base import *"]
    head += ["from bcosify.convert.taps import first_tensor", ""]
    (tmp_path / "logits_example.py").write_text("\n".join(head + lines))
    monkeypatch.syspath_prepend(tmp_path)
    try:
        importlib.import_module("logits_example")
        values = {
            **yaml.safe_load(dump(SMALL)),
            "phases": [{"objective": {"logits": {"power": 1.5}}, "pictures": 8, "learning_rate": 1e-3}],
        }
        found = aligned(run, shards, tmp_path / "out", from_values(values))
    finally:
        OBJECTIVES.pop("logits", None)
    losses_ = [row["loss"] for row in found if "loss" in row]
    assert len(losses_) == 2 and all(loss > 0 for loss in losses_)
    assert [row["objective"] for row in found if "loss" in row] == ["logits"] * 2
