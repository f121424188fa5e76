"""Fits the prototypes of a converted classifier to pictures without labels, in closed form or convex, not by descent.

The class of a picture is what the linear classifier, the teacher's own, decides on it. Per class, k-means of its
features; a class gets one prototype for every five pictures. With m the mean feature, c_ch a centre with n_ch pictures:

    a_ch = n_ch / (n_ch + n_0)    mu_ch = m + (1 - a_ch) w_c / tau + a_ch (c_ch - m)

A prototype moves from where the linear classifier has it to where the data has it, the further the more pictures speak
for it; a class without any keeps the linear classifier's and is flagged. tau and one offset a prototype are fitted to
the teacher's soft decisions (KL, L-BFGS; convex with one prototype a class). n_0 is the smallest of a ladder with which
held-out decisions agree with the teacher's as often as the recipe asks: the pressure is towards the data, the floor
holds against it. Deterministic for a seed. (Ours, after KMEx, arXiv 2312.07822, and arXiv 2603.28466.)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from ...convert.methods.kmeans.layers import PrototypeLinear, PrototypeMaps, joined_stages
from ...convert.output import OutputKind
from ...core.errors import DataError, RecipeError
from ...core.files import new_file
from ...core.hooks import captured_inputs
from ...core.ranges import SEED, SHARE
from ...data.index import ShardIndex
from ...data.pictures import decode
from ..kmeans import kmeans
from ..losses import class_divergence
from .base import fit

__all__ = ["PrototypeFit", "write_prototypes"]

PICTURES_PER_PROTOTYPE = 5
LADDER = tuple(2.0**power for power in range(-2, 13))
CALIBRATION_ROWS = 4096
PLACES_PER_PICTURE, CONCEPT_ROWS = 16, 8192
THUMBNAIL = 96  # pixels, of a picture on the sheet


@dataclasses.dataclass(frozen=True)
class PrototypesConfig:
    """Attributes:
    min_agreement: least held-out agreement with the teacher, in [0, 1].
    """

    min_agreement: Annotated[float, SHARE] = 0.0
    seed: Annotated[int, SEED] = 0


@fit("prototypes", PrototypesConfig)
def _solver(student: nn.Module, config: PrototypesConfig) -> PrototypeFit:
    return PrototypeFit(student, config.min_agreement, config.seed)


class PrototypeFit:
    """Gathers features batch by batch, then solves for prototypes and concepts, and writes them into `model`."""

    def __init__(self, model: nn.Module, floor: float, seed: int) -> None:
        """Args: floor: least held-out agreement with the teacher, in [0, 1]; RecipeError for another kind of model."""
        heads = [module for module in model.modules() if isinstance(module, PrototypeLinear)]
        if len(heads) != 1:
            raise RecipeError("objective prototypes: the model has no prototypes. Convert it with --method kmeans.")
        self.model, self.head, self.floor, self.seed = model, heads[0], floor, seed
        self.features: list[Tensor] = []
        self.places: dict[str, list[Tensor]] = {"b4": [], "b234": []}
        self.scales: Tensor | None = None

    # ------------------------------------------------------------------------------------------------------ gathering

    @torch.no_grad()
    def gather(self, pictures: Tensor) -> None:
        """Takes note of what the classifier is fed on pictures (B, 3, H, W), and of some places of the last stages."""
        pooled, stages = self._seen(pictures)
        if not pooled.isfinite().all():
            raise DataError("some features are not finite, so they have no mean. Look for the picture that makes them.")
        self.features.append(pooled)
        if not stages:
            return
        if self.scales is None:  # of the first batch: it only weighs the stages against each other
            self.scales = torch.stack([stage.square().mean().sqrt() for stage in stages]).clamp_min(1e-12)
        joined = joined_stages(stages, self.scales)
        for name, features in (("b4", stages[-1]), ("b234", joined)):
            if features is not None:
                self.places[name].append(self._some_places(features))

    def join(self, gathered: Callable[[Tensor], Any]) -> None:
        """What all processes gathered, in the same order in each; `gathered` is accelerate's."""
        self.features = [gathered(torch.cat(self.features))]
        self.places = {name: [gathered(torch.cat(parts))] if parts else [] for name, parts in self.places.items()}

    def _seen(self, pictures: Tensor) -> tuple[Tensor, list[Tensor]]:
        if isinstance(self.model, PrototypeMaps):
            return self.model.pooled_and_stages(pictures)
        with captured_inputs(self.head) as given:
            self.model(pictures)
        return given[0], []

    def _some_places(self, features: Tensor) -> Tensor:
        """(B * some, d): the same places of every batch, spread evenly over the map."""
        flat = features.flatten(2)
        step = max(1, flat.shape[-1] // PLACES_PER_PICTURE)
        return flat[..., step // 2 :: step].transpose(1, 2).flatten(0, 1)

    # -------------------------------------------------------------------------------------------------------- solving

    @torch.no_grad()
    def solve(self, held_out: list[Tensor]) -> dict[str, Any]:
        """Fits and writes everything; `held_out` are batches of pictures that choose n_0. Returns what was found."""
        features = torch.cat(self.features)
        decided = self.head.linear_logits(features).argmax(1)
        generator = torch.Generator().manual_seed(self.seed)
        mean = features.mean(0)
        centres, counts = self._cluster(features, decided, mean, generator)
        seen = [self._seen(batch) for batch in held_out]
        measured = torch.cat([pooled for pooled, _ in seen])
        rungs, tried = len(LADDER), {}
        low, high = 0, rungs - 1
        while low < high:  # agreement rises with n_0
            middle = (low + high) // 2
            tried[middle] = self._fitted(LADDER[middle], features, centres, counts, mean, measured)
            low, high = (low, middle) if tried[middle]["agreement"] >= self.floor else (middle + 1, high)
        found = tried.get(low) or self._fitted(LADDER[low], features, centres, counts, mean, measured)
        self._write(found, centres, counts, mean)
        return {
            "pictures": len(features),
            "pictures_for_half": LADDER[low],
            "temperature": float(found["temperature"]),
            "held_out_agreement": round(found["agreement"], 4),
            "kl_before_calibration": round(found["before"], 4),
            "kl_after_calibration": round(found["after"], 4),
            "classes_from_data": int((counts[:, 0] > 0).sum()),
            "classes_flagged": int((counts[:, 0] == 0).sum()),
            "concepts": self._concepts(seen, generator),
            "prototypes": self._described(features, counts, LADDER[low]),
        }

    def _cluster(
        self, features: Tensor, decided: Tensor, mean: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Centres (C, H, d) around the mean, zero where there is none, and how many pictures each has (C, H)."""
        classes, most = self.head.offsets.shape
        centres = features.new_zeros(classes, most, features.shape[1])
        counts = features.new_zeros(classes, most)
        for label in decided.unique().tolist():
            points = features[decided == label]
            wanted = min(most, max(1, len(points) // PICTURES_PER_PROTOTYPE))
            means, assigned = kmeans(points, wanted, generator)
            centres[label, : len(means)] = means - mean
            counts[label, : len(means)] = assigned.bincount(minlength=len(means)).to(counts)
        return centres, counts

    def _fitted(
        self, half: float, features: Tensor, centres: Tensor, counts: Tensor, mean: Tensor, measured: Tensor
    ) -> dict[str, Any]:
        """Temperature and offsets at n_0 = `half`, and how they do on features that were not fitted."""
        share = counts / (counts + half)
        absent = (counts == 0) & (torch.arange(counts.shape[1], device=counts.device) > 0)
        bias = 0 if self.head.bias is None else self.head.bias
        step = -(-len(features) // CALIBRATION_ROWS)

        def parts(rows: Tensor) -> tuple[Tensor, Tensor]:
            """What the linear classifier's share and the data's share say, (N, C, H) each; the latter at tau = 1."""
            linear = (rows @ self.head.weight.T + 0).unsqueeze(-1) * (1 - share)
            moved = (centres * share.unsqueeze(-1)).flatten(0, 1)
            data = ((rows - mean) @ moved.T).unflatten(-1, counts.shape)
            return (linear + torch.as_tensor(bias).reshape(-1, 1)).masked_fill(absent, -math.inf), data

        rows = features[::step]
        target = self.head.linear_logits(rows).log_softmax(1)
        linear, data = parts(rows)
        # Start where the data's share is as loud as what it replaces.
        wanted = ((rows @ self.head.weight.T).unsqueeze(-1) * share).std()
        scale = (wanted / data.std().clamp_min(1e-12)).clamp(1e-6, 1e6)
        log_temperature = scale.log().clone()
        offsets = torch.zeros_like(counts)
        before = divergence(target, linear, data, log_temperature, offsets)
        log_temperature, offsets = calibrated(target, linear, data, log_temperature, offsets)
        after = divergence(target, linear, data, log_temperature, offsets)
        linear, data = parts(measured)
        logits = (linear + log_temperature.exp() * data + offsets).amax(-1)
        agreement = (logits.argmax(1) == self.head.linear_logits(measured).argmax(1)).float().mean()
        return {
            "share": share,
            "temperature": log_temperature.exp(),
            "offsets": (offsets + torch.as_tensor(bias).reshape(-1, 1)).masked_fill(absent, -math.inf),
            "before": float(before),
            "after": float(after),
            "agreement": float(agreement),
        }

    def _write(self, found: dict[str, Any], centres: Tensor, counts: Tensor, mean: Tensor) -> None:
        head, tau, share = self.head, found["temperature"], found["share"].unsqueeze(-1)
        prototypes = mean + (1 - share) * head.weight.unsqueeze(1) / tau + share * centres
        # What tau mu.f has beside the parts that were fitted: of the shift, and of centres around the mean.
        constants = found["offsets"] - tau * (share * centres) @ mean
        head.prototypes.copy_(prototypes)
        head.offsets.copy_(constants + tau * prototypes.square().sum(-1) / 2)
        head.temperature.copy_(tau)
        head.shift.copy_(tau * mean)
        head.from_data.copy_(counts[:, 0] > 0)

    def _described(self, features: Tensor, counts: Tensor, half: float) -> list[dict[str, Any]]:
        """One entry for every prototype from data: its class, pictures, share of the data, nearest gathered picture."""
        described = []
        for label, number in counts.nonzero().tolist():
            prototype = self.head.prototypes[label, number]
            nearest = (features - prototype).square().sum(1).argmin()
            count = int(counts[label, number])
            described.append(
                {
                    "class": label,
                    "pictures": count,
                    "share": round(count / (count + half), 3),
                    "thin": count < PICTURES_PER_PROTOTYPE,
                    "nearest": int(nearest),
                }
            )
        return described

    def _concepts(self, seen: list[tuple[Tensor, list[Tensor]]], generator: torch.Generator) -> dict[str, Any]:
        """Fits B4 and B234; for B4 how often the classifier decides the same on features that only name the concept."""
        if not isinstance(self.model, PrototypeMaps) or self.scales is None:
            return {}
        concepts, found = self.model.concepts, {}
        concepts.scales.copy_(self.scales)
        for name, parameter in (("b4", concepts.b4), ("b234", concepts.b234)):
            parameter.zero_()
            if self.places[name]:
                rows = torch.cat(self.places[name])
                centres, _ = kmeans(rows[:: -(-len(rows) // CONCEPT_ROWS)], len(parameter), generator)
                parameter[: len(centres)] = centres
                # Fewer than asked for: the first again, which as the lowest of a tie is the one that is assigned.
                parameter[len(centres) :] = centres[0]
                found[name] = len(centres)
        named = torch.cat([self._quantised(stages[-1]) for _, stages in seen])
        features = torch.cat([pooled for pooled, _ in seen])
        same = self.head(named).argmax(1) == self.head(features).argmax(1)
        return {**found, "b4_fidelity": round(float(same.float().mean()), 4)}

    def _quantised(self, stage: Tensor) -> Tensor:
        """(B, d): the average over places of each one's concept."""
        assert isinstance(self.model, PrototypeMaps)
        centres = self.model.concepts.b4
        return centres[self.model.concepts.assigned(stage, centres)].mean((1, 2))


def divergence(target: Tensor, linear: Tensor, data: Tensor, log_temperature: Tensor, offsets: Tensor) -> Tensor:
    """Mean KL(teacher || prototypes): log probabilities (N, C), and max_h of linear + tau data + offsets (N, C, H)."""
    return class_divergence((linear + log_temperature.exp() * data + offsets).amax(-1), target)


@torch.enable_grad()
def calibrated(
    target: Tensor, linear: Tensor, data: Tensor, log_temperature: Tensor, offsets: Tensor, ridge: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """log tau and offsets that bring `divergence` down; `ridge` holds the offsets of classes that no picture shows."""
    log_temperature, offsets = (value.clone().requires_grad_() for value in (log_temperature, offsets))
    optimizer = torch.optim.LBFGS([log_temperature, offsets], max_iter=30, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = divergence(target, linear, data, log_temperature, offsets) + ridge * offsets.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return log_temperature.detach(), offsets.detach()


# ------------------------------------------------------------------------------------------------------------ the sheet


def write_prototypes(work: Path, output: OutputKind, index: object, found: dict[str, Any]) -> Path | None:
    """Writes `work`/prototypes.html of what a fit of prototypes `found`; nothing of streamed shards, which are gone."""
    if not isinstance(index, ShardIndex):
        return None
    from ...evaluate.report import data_url, render_page  # loads jinja2

    def card(prototype: dict[str, Any]) -> dict[str, Any]:
        picture = decode(index.read(prototype["nearest"]))
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        return {**prototype, "label": output.name(prototype["class"]), "url": data_url(picture.convert("RGB"), "JPEG")}

    facts = {name.replace("_", " "): value for name, value in found.items() if name != "prototypes"}
    page = render_page("prototypes.html", facts=facts, cards=[card(prototype) for prototype in found["prototypes"]])
    with new_file(work / "prototypes.html") as scratch:
        scratch.write_text(page)
    return work / "prototypes.html"
