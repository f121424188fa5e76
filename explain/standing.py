"""How a score stands among the others of its picture: its probability, its rank, and what the model decides on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..convert.libraries import LABELS
from ..convert.output import OutputKind

__all__ = ["probabilities_of", "standing", "standing_in_words"]


def probabilities_of(outputs: Tensor, output: OutputKind) -> Tensor | None:
    """Probabilities (B, D), as float64, of a classifier's logits (B, D): softmax, or of labels a sigmoid each.

    None where the output decides nothing: values, features, one class alone.
    """
    if not output.chooses or (outputs.shape[1] == 1 and output.kind != LABELS):
        return None
    return outputs.double().sigmoid() if output.kind == LABELS else outputs.double().softmax(1)


def standing(probabilities: Tensor, index: int, name: Callable[[int], str] | None = None) -> dict[str, Any]:
    """Facts of output `index` among the `probabilities` (D,) of one picture, for its ledger.

    `rank` is 1 for the most probable of `among` outputs. Where `name` says what outputs are called, that one is the
    model's `decision`.
    """
    best = int(probabilities.argmax())
    facts = {
        "probability": float(probabilities[index]),
        "rank": 1 + int((probabilities > probabilities[index]).sum()),
        "among": len(probabilities),
    }
    if name is None:
        return facts
    return facts | {"decision": {"target": best, "label": name(best), "probability": float(probabilities[best])}}


def standing_in_words(facts: Mapping[str, Any]) -> str:
    """The `standing` in a ledger as a line; empty where there is none."""
    probability, among, decision = facts.get("probability"), facts.get("among"), facts.get("decision")
    if probability is None or among is None:
        return ""
    said = f"probability {_percent(probability)}, rank {facts['rank']:,} of {among:,}"
    if decision is None:
        return said
    if decision["target"] == facts.get("target"):
        return f"{said}: this is the model's decision"
    return f"{said}; the model's decision is {decision['label']} ({_percent(decision['probability'])})"


def _percent(share: float) -> str:
    """A share in [0, 1] in percent, without calling what is not certain so."""
    if share in (0, 1) or 0.1 <= share < 0.99:
        return f"{share:.0%}"
    return "under 0.1%" if share < 0.001 else "over 99.9%" if share > 0.999 else f"{share:.1%}"
