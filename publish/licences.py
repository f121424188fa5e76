"""Whose licence a converted model is under: that of the weights it was made from.

What the base model's own card says is carried over where anyone may do so (`PERMISSIVE`). Other terms - non-commercial,
research only, with an agreement to sign (gated), or unknown - bind whoever publishes, so they must be said out loud:
`--license ID --license-link URL`. A licence that is known is never replaced by a laxer one.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ..convert import Source
from ..convert.libraries import origin_of
from ..core.errors import PublishError
from ..core.words import ADDRESS

__all__ = ["PERMISSIVE", "Base", "Licence", "base_of", "choose_licence"]

# The hub's identifiers of licences that ask for no more than the notice.
PERMISSIVE = frozenset(
    "apache-2.0 mit bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear isc zlib unlicense cc0-1.0 cc-by-2.0 cc-by-2.5 "
    "cc-by-3.0 cc-by-4.0 cdla-permissive-1.0 cdla-permissive-2.0 bsl-1.0 ncsa postgresql pddl wtfpl".split()
)
# Others that the hub knows by their identifier; of any further one it wants `other`, its name and a link.
KNOWN = PERMISSIVE | frozenset(
    "cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 "
    "cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 agpl-3.0 gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 mpl-2.0 "
    "epl-2.0 eupl-1.2 osl-3.0 openrail openrail++ apple-ascl apple-amlr fair-noncommercial-research-license "
    "intel-research h-research gemma llama2 llama3 llama3.1 llama3.2 llama3.3 ms-pl afl-3.0 artistic-2.0".split()
)
UNSAID = (None, "unknown", "other")


@dataclasses.dataclass(frozen=True)
class Base:
    """What is known of the weights that a student was made from.

    Attributes:
        name: how the card names it; `repo` is its repository on the hub, where it has one.
        licence: the hub's identifier or the licence's own name; None where nobody says.
        link: the licence's text, where the base's card links it.
        gated: it is handed out against an agreement.
        found: where that was read, in words.
    """

    name: str
    repo: str | None = None
    licence: str | None = None
    link: str | None = None
    gated: bool = False
    found: str = ""

    @property
    def permissive(self) -> bool:
        return self.licence in PERMISSIVE and not self.gated


@dataclasses.dataclass(frozen=True)
class Licence:
    """The licence that a model is published under."""

    id: str
    link: str | None = None

    def card_fields(self) -> dict[str, str]:
        """As the hub's cards spell it."""
        link = {"license_link": self.link} if self.link else {}
        return (
            {"license": self.id, **link} if self.id in KNOWN else {"license": "other", "license_name": self.id, **link}
        )


def choose_licence(base: Base, given: str | None, link: str | None) -> Licence:
    """The licence to publish under; raises PublishError where it must be said, or contradicts the base's."""
    if link is not None and not ADDRESS.fullmatch(link):
        raise PublishError(f"--license-link {link}: the address of a page is wanted: https://...")
    known = base.licence not in UNSAID
    if base.permissive and given is None:
        return Licence(str(base.licence), link or base.link)
    if not base.permissive:
        _check_restricted(base, given, link, known)
    if given in KNOWN or link is not None:
        return Licence(str(given), link)
    raise PublishError(
        f"--license {given}: the hub does not know this licence, so it needs its text: --license-link URL."
    )


def _check_restricted(base: Base, given: str | None, link: str | None, known: bool) -> None:
    why = f"is under {base.licence}" if known else "says nothing of its licence"
    why = f"{why} and is handed out against an agreement only (gated)" if base.gated else why
    name = base.licence if known else "ID"
    said = f"{base.name} {why}{f' ({base.found})' if base.found else ''}"
    if given is None or link is None:
        raise PublishError(
            f"{said}: its terms bind what is made from it, and are not carried over without your word. Read "
            f"{base.link or 'them'}, and if you may publish: --license {name} --license-link {base.link or 'URL'}. "
            "Nothing was uploaded."
        )
    if known and given != base.licence:
        raise PublishError(
            f"--license {given}: {said}, and what is made from these weights stays under that licence. Pass --license "
            f"{base.licence} --license-link {base.link or 'URL'}. Nothing was uploaded."
        )


# ----------------------------------------------------------------------------------------------------- where it is said


def base_of(source: Source) -> Base:
    """What the card of the base model, or else its library, says of it; asks the hub, or its cache."""
    if source.weights is not None:
        what = "random weights" if source.weights == "random" else f"weights of your own (sha256 {source.weights[:12]})"
        return Base(f"{source.architecture} with {what}")
    origin = origin_of(source)
    if origin.licence not in UNSAID:
        return Base(origin.name, origin.repo, origin.licence, found=origin.found)
    if origin.folder is not None:
        return _folder(origin.folder)
    return _hub(origin.repo, origin.revision) if origin.repo else Base(origin.name)


def _folder(folder: Path) -> Base:
    card = folder / "README.md"
    named = f"the folder {folder.name}"
    return _read(card, named, None) if card.is_file() else Base(named)


def _hub(name: str, revision: str | None) -> Base:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    repo, _, tagged = name.partition("@")
    try:
        card = HfApi().hf_hub_download(repo, "README.md", revision=tagged or revision)
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        return Base(repo, repo, found="its card could not be fetched")
    except EntryNotFoundError:
        return Base(repo, repo, found="it has no card")
    except HfHubHTTPError as error:
        refused = error.response.status_code
        return Base(repo, repo, gated=refused in (401, 403), found=f"the hub refused its card, {refused}")
    return _read(Path(card), repo, repo)


def _read(card: Path, name: str, repo: str | None) -> Base:
    """What a card's header says; keys that begin with `extra_gated` are of an agreement to sign."""
    from huggingface_hub import ModelCard

    facts: dict[str, Any] = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    licence = facts.get("license")
    licence = facts.get("license_name", licence) if licence == "other" else licence
    link = facts.get("license_link")
    link = link if isinstance(link, str) else None
    if link and repo and "://" not in link:
        link = f"https://huggingface.co/{repo}/blob/main/{link}"
    gated = any(key.startswith("extra_gated") for key in facts)
    link = link if link and ADDRESS.fullmatch(link) else None
    return Base(name, repo, None if licence in UNSAID else str(licence), link, gated, "its card")
