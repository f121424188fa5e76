"""bcosify explain"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import Incomplete
from .console import console, show_agreement, show_table

if TYPE_CHECKING:
    pass


def explain(
    model: str,
    pictures: list[Path],
    out: Path = Path("maps"),
    target: list[str] | None = None,
    text: list[str] | None = None,
    templates: str | None = None,
    like: list[Path] | None = None,
    direction: Path | None = None,
    patch: str | None = None,
    zero_shot: Path | None = None,
    labels: Path | None = None,
    head: str = "auto",
    image_size: int | None = None,
    batch_size: int = 8,
    views: str | None = None,
    max_pixels: int | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> list[dict[str, Any]]:
    """Explains scores of pictures exactly: what every pixel and every constant adds, and that it adds up.

    For each picture OUT gets NAME.png (the picture, what its pixels add, and the score as a sum), NAME.npz (the raw
    maps) and NAME.json (the ledger). Scores are logits or cosines, not probabilities.
    Example: bcosify explain runs/resnet50/aligned cat.jpg dog.jpg --target tabby 'golden retriever' --out maps

    Args:
        model: a converted model (a folder, or ORG/REPO[@rev] on the hub); or any model reference, explained as it
            is ({references}).
        pictures: picture files, or folders of them.
        out: folder for the results.
        target: what to explain: class numbers or names, `top1`, `top3`, ...; `self` for models without classes. By
            default `top1` of a classifier, the output of a regression, else `self`.
        text: texts that the pictures are compared with, for CLIP and SigLIP models: the score is the cosine.
        templates: prompts to average each text over: `imagenet` (CLIP's eighty), or a file of lines with a {}.
        like: other pictures; the score is the cosine of both embeddings.
        direction: a .npy or .safetensors file of one or more directions in feature space; the score is the projection.
        patch: ROW,COLUMN of a patch: its own feature is explained, along itself or along --direction.
        zero_shot: a file with one label a line: the best three are explained (or those of --target), all are ranked.
        labels: a file with a name for each class, one a line in their order, where the model has none of its own.
        head: which output of a transformers model: `classifier`, `embedding`, `pooled`; `auto` is its checkpoint's.
        image_size: side in pixels, where it is not the model's own.
        batch_size: pictures a forward pass.
        views: explain the mean over so many views of each picture: `9` with noise, `shift:9`, `flip`.
        max_pixels: pictures with more pixels are skipped, or read smaller if they are JPEGs; 100000000 if not given.
        overwrite: replace the folder if it exists.
        json: print one row per picture and target as JSON on stdout.
    """
    from ..explain import explain as explain_pictures

    ledgers = explain_pictures(
        model,
        pictures,
        targets=target or None,
        out=out,
        text=text,
        templates=templates,
        like=like,
        direction=direction,
        patch=patch,
        zero_shot=zero_shot,
        labels=labels,
        head=head,
        image_size=image_size,
        batch_size=batch_size,
        views=views,
        max_pixels=max_pixels,
        overwrite=overwrite,
    )
    rows = [ledger.row() for ledger in ledgers]
    parts = ("direct", "carried") if any("direct" in row for row in rows) else ("input",)
    shown = [*(["probability"] if any("probability" in row for row in rows) else []), "score", *parts]
    show_table(
        f"{model}: scores and where they come from",
        ["picture", "target", *shown, "constants", "residual"],
        [
            (
                Path(row["image"]).name,
                row["label"],
                *(row[name] for name in shown),
                sum(row["constants"].values()),
                f"{row['residual']:.0e}",
            )
            for row in rows
        ],
    )
    if ledgers.agreement is not None:
        show_agreement(ledgers.agreement)
        if ledgers.agreement.unchanged:
            share = f"Constants make {ledgers.constant_share:.0%} of its scores"
            console.print(f"{share}; next: bcosify align {model} --data SHARDS", soft_wrap=True)
    console.print(f"wrote {len(list(out.glob('*.npz')))} x (.png, .npz, .json) to {out}")
    if ledgers.skipped:
        count = len(ledgers.skipped) + len({ledger.image for ledger in ledgers})
        said = f"{len(ledgers.skipped)} of {count} pictures were skipped; {out / 'skipped.jsonl'} lists them."
        raise Incomplete(said, rows)
    return rows
