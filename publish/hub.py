"""Release -> repository: one commit, checked on the hub afterwards, then a tag. Run again, it goes on or does nothing.

All requests go through one explicit `HfApi(endpoint=, token=)`. What is on the hub is compared first: only files that
differ are committed, and a commit that somebody else made in between is not built upon but reported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, RepoFile, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils.sha import git_hash

from ..core.errors import PublishError, translated
from ..core.files import file_digest
from ..core.versions import versions
from .staging import Release

__all__ = ["Published", "Target", "upload"]

# A server's own fault may be over in a moment; the client itself tries uploads again, but not commits and tags.
TRIES, PAUSE = 3, 1.0
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Target:
    """Where a release goes.

    Attributes:
        private: whether a new repository is.
        create_pr: propose the commit as a pull request instead.
        revision: branch to commit to; made from main where there is none.
        tag: name of the release; by default the next free of v1, v2, ...
    """

    repo: str
    private: bool = False
    create_pr: bool = False
    revision: str | None = None
    tag: str | None = None


@dataclasses.dataclass(frozen=True)
class Published:
    """What is on the hub now.

    Attributes:
        changed: files of the new commit; empty where all were there already, and no commit was made.
        untouched: files in the repository that are not of this release.
    """

    url: str
    commit: str
    changed: tuple[str, ...]
    tag: str | None = None
    untouched: tuple[str, ...] = ()


def upload(release: Release, target: Target, endpoint: str | None = None) -> Published:
    """Uploads `release`.

    Args:
        endpoint: of the hub; default HF_ENDPOINT, or huggingface.co.

    Raises:
        PublishError: says what failed, what is on the hub now, and what to do.
    """
    if target.create_pr and (target.revision or target.tag):
        raise PublishError(
            "--create-pr proposes a commit to main: it goes with neither --revision nor --tag. Tag after the merge."
        )
    token = get_token()
    if token is None:
        raise PublishError(
            "there is no token. `hf auth login` keeps one, or set HF_TOKEN. It must be allowed to write."
        )
    api = HfApi(endpoint=endpoint, token=token, library_name="bcosify", library_version=versions()["bcosify"])
    with _publish_errors(target, token, "The hub has confirmed no commit; what it has of the files is not sent again."):
        sent, tags = _send(api, release, target)
    after = f"Commit {sent.commit[:8]} was made, and not tagged yet: do not use it before the same command has ended."
    with _publish_errors(target, token, after if sent.changed else "There was nothing to commit."):
        there = _files(api, target.repo, sent.commit)
        _check_arrived(release, sent.changed, there, f"{target.repo} at commit {sent.commit[:8]}")
        tag = None if target.create_pr else _tag(api, target.repo, sent.commit, target.tag, tags)
    untouched = sorted(set(there) - set(release.files) - {".gitattributes"})
    return dataclasses.replace(sent, tag=tag, untouched=tuple(untouched))


def _send(api: HfApi, release: Release, target: Target) -> tuple[Published, dict[str, str]]:
    """Compares and commits; also the tags that were there, name -> commit."""
    branch = target.revision or "main"
    repo = api.create_repo(target.repo, private=target.private or None, exist_ok=True).repo_id
    _check_private(api, repo, target)
    if target.revision:
        api.create_branch(repo, branch=branch, exist_ok=True)
    refs = api.list_repo_refs(repo)
    tags = {tag.name: tag.target_commit for tag in refs.tags}
    head = next((ref.target_commit for ref in refs.branches if ref.name == branch), None)

    there = {} if head is None else _files(api, repo, head)
    changed = tuple(name for name in release.files if not _same(release.folder / name, there.get(name)))
    if target.tag in tags and (changed or tags[target.tag] != head):
        raise PublishError(
            f"the tag {target.tag} of {repo} is there already, at commit {tags[target.tag][:8]}, and is not moved. "
            "Pass another --tag. Nothing was uploaded."
        )
    commit, url = head, f"{api.endpoint}/{repo}"
    if changed:
        made = _again(
            lambda: api.create_commit(
                repo,
                [CommitOperationAdd(name, release.folder / name) for name in changed],
                commit_message=f"Publish with bcosify {versions()['bcosify']}",
                revision=branch,
                parent_commit=head,
                create_pr=target.create_pr,
            )
        )
        commit, url = made.oid, made.pr_url or url
    return Published(url, str(commit), changed), tags


def _check_private(api: HfApi, repo: str, target: Target) -> None:
    if target.private and not api.repo_info(repo).private:
        raise PublishError(
            f"{repo} exists and is public, but --private was asked for. Make it private in its settings, or name "
            "another repository. Nothing was uploaded."
        )


def _tag(api: HfApi, repo: str, commit: str, wanted: str | None, tags: dict[str, str]) -> str:
    """The tag of `commit`: the one asked for, or one that it has, or the next number."""
    of_commit = sorted(name for name, sha in tags.items() if sha == commit)
    if wanted in of_commit or (wanted is None and of_commit):
        return wanted or of_commit[-1]
    numbers = [int(found[1]) for name in tags if (found := re.fullmatch(r"v(\d+)", name))]
    tag = wanted or f"v{max(numbers, default=0) + 1}"
    _again(lambda: api.create_tag(repo, tag=tag, revision=commit, exist_ok=True))
    return tag


# --------------------------------------------------------------------------------------------------------------- files


def _files(api: HfApi, repo: str, revision: str) -> dict[str, RepoFile]:
    found = api.list_repo_tree(repo, recursive=True, revision=revision)
    return {file.path: file for file in found if isinstance(file, RepoFile)}


def _same(path: Path, file: RepoFile | None) -> bool:
    """Whether the hub's file has the bytes of `path`, by the digest that the hub keeps of it."""
    if file is None or file.size != path.stat().st_size:
        return False
    return file.lfs.sha256 == file_digest(path) if file.lfs else file.blob_id == git_hash(path.read_bytes())


def _check_arrived(release: Release, changed: tuple[str, ...], there: dict[str, RepoFile], where: str) -> None:
    wrong = [name for name in changed if not _same(release.folder / name, there.get(name))]
    if wrong:
        raise PublishError(
            f"{where} does not hold what was sent: {', '.join(wrong)} differ{'s' if len(wrong) == 1 else ''} in size "
            "or hash. The commit was not tagged; do not use it. Run the same command again."
        )


# -------------------------------------------------------------------------------------------------------------- errors


def _again(call: Callable[[], T]) -> T:
    """`call()`, up to `TRIES` times where the hub has a fault of its own."""
    for left in reversed(range(TRIES)):
        try:
            return call()
        except HfHubHTTPError as error:
            if not left or error.response.status_code < 500:
                raise
            time.sleep(PAUSE)
    raise AssertionError("unreachable")


MEANINGS = {
    400: "the hub refuses it as it is",
    401: "the hub does not know this token. `hf auth login` again, or set HF_TOKEN to one that may write",
    403: "this token may not write there. Pass a token with the right to write to {owner}, or another ORG/NAME",
    404: "there is no such repository or organisation, or this token may not see it. Check ORG/NAME and the token",
    409: "the hub is busy with another change of the same thing. Run the same command again",
    412: "somebody else has changed {repo} in the meantime. Look at it, and run the same command again",
    413: "the hub takes no files of this size",
    422: "what arrived is not what was announced, so the hub refused it. Run the same command again",
    429: "the hub has had too many requests from here. Wait a little, and run the same command again",
}
SERVER = "the hub has a fault of its own ({status}), also after {tries} tries. Run the same command again later"


@contextlib.contextmanager
def _publish_errors(target: Target, token: str, left: str) -> Iterator[None]:
    """Turns whatever the client raises into one PublishError that also says what is `left` on the hub."""

    def offline(error: Exception) -> str:
        return "HF_HUB_OFFLINE is set, so nothing can be uploaded. Unset it, or pass --dry-run."

    def answered(error: Exception) -> str:
        return f"{target.repo}: {_meaning(_cause(error), target)}. {left}".replace(token, "<token>")

    # The client's own error may hold the token, so no traceback shows it.
    with (
        translated(Exception, PublishError, answered, chained=False),
        translated(OfflineModeIsEnabled, PublishError, offline),
    ):
        yield


def _cause(error: BaseException) -> BaseException:
    """The hub's answer behind what the client made of it, where there is one."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, HfHubHTTPError):
        found = found.__cause__ or found.__context__
    return found or error.__cause__ or error


def _meaning(error: BaseException, target: Target) -> str:
    said = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    if not isinstance(error, HfHubHTTPError):
        return f"the upload broke off ({said}). Check the connection, and run the same command again"
    status = error.response.status_code
    # A private repository and none at all look the same to who may not see it; 401 then only means the second.
    if isinstance(error, RepositoryNotFoundError) and status != 401:
        status = 404
    told = error.server_message or said
    meaning = MEANINGS.get(status, SERVER if status >= 500 else "the hub refuses it")
    words = {"repo": target.repo, "owner": target.repo.partition("/")[0], "status": status, "tries": TRIES}
    return f"{meaning.format(**words)} (it said {status}: {told.rstrip('.')})"
