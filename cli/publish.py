"""bcosify publish"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import console, show_table

if TYPE_CHECKING:
    from ..publish.hub import Published
    from ..publish.staging import Release


def publish(
    folder: Path,
    repo: str,
    evaluation: Path | None = None,
    picture: Path | None = None,
    data: str | None = None,
    license: str | None = None,
    license_link: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    endpoint: str | None = None,
    dry_run: bool = False,
    out: Path | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> dict[str, Any]:
    """Publishes a converted model with a card, so that bcosify, timm, transformers or open_clip open it in one line.

    All is put together and checked in a folder of its own first: strict loading, the probe, an explanation that adds
    up, the licence, the card, no pickle, no path of this machine. The upload is one commit, then a tag; what is on the
    hub already is not sent again, and an interrupted upload can be repeated. The token is that of `hf auth login`, or
    HF_TOKEN.
    Example: bcosify publish runs/dino/aligned my-lab/bcos-dino-s --evaluation report --picture cat.jpg

    Args:
        folder: of a converted model.
        repo: ORG/NAME; made where it does not exist.
        evaluation: folder that `bcosify evaluate` wrote for this model; without, the card says that there is none.
        picture: a photograph to explain in the card.
        data: what pictures it was aligned and measured on, for the card, in a sentence.
        license: licence to publish under, as the hub names it; needed where the base model's is not a permissive one.
        license_link: address of its text.
        private: make a new repository private.
        create_pr: propose the commit as a pull request.
        revision: branch to commit to, in place of main.
        tag: name of this release; default the next free one of v1, v2, ...
        endpoint: address of the hub, in place of HF_ENDPOINT or huggingface.co.
        dry_run: check and show everything, and send nothing.
        out: keep what is published in this folder.
        overwrite: replace that folder if it exists.
        json: print the result as JSON on stdout.
    """
    from ..publish import publish as publish_folder

    done = publish_folder(
        folder,
        repo,
        evaluation=evaluation,
        picture=picture,
        data=data,
        license=license,
        license_link=license_link,
        private=private,
        create_pr=create_pr,
        revision=revision,
        tag=tag,
        endpoint=endpoint,
        dry_run=dry_run,
        out=out,
        overwrite=overwrite,
        staged=_show,
    )
    published = done.published
    if published is None:
        console.print(f"dry run: nothing was sent{f'; all of it is in {out}' if out else ''}")
        facts: dict[str, Any] = {"dry_run": True}
    else:
        _tell(published)
        facts = {name: getattr(published, name) for name in ("url", "commit", "tag", "changed", "untouched")}
    for door, code in done.doors.items():
        console.print(f"\n{door}:\n{code.rstrip()}")
    return {
        "repo": repo,
        "files": done.files,
        "license": done.licence.card_fields(),
        "headline": done.headline,
        "doors": done.doors,
        **facts,
    }


def _show(release: Release) -> None:
    console.print(f"{release.repo}: {sum(release.files.values()) / 2**20:.1f} MiB, licence {release.licence.id}")
    show_table("what is published", ["file", "bytes"], [(name, f"{size}") for name, size in release.files.items()])
    if release.anew:
        console.print("the model was saved once more: it was of an older version, or named a folder of this machine")
    if release.left_out:
        console.print(f"not part of the model, so left out: {', '.join(release.left_out)}")


def _tell(published: Published) -> None:
    if published.changed:
        console.print(f"published {len(published.changed)} files in commit {published.commit[:8]}")
    else:
        console.print(f"all of it was there already, at commit {published.commit[:8]}: no new commit")
    if published.untouched:
        console.print(f"also in the repository, not of this release: {', '.join(published.untouched)}")
    console.print(f"{published.url}{f' (tag {published.tag})' if published.tag else ''}")
