"""`bcosify publish` against a loopback hub, by the real client: what arrives, a second time, and every fault."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from loopback_hub import CUT, TOKEN, Answer, refusal

COMMIT, PUT = "POST /api/models/org/name/commit", "PUT /lfs/"


def made_requests(hub) -> list[str]:
    return [request for request in hub.asked if not request.startswith(("GET", "HEAD"))]


def test_one_commit_holds_every_byte_and_is_tagged(hub, publish, student, tmp_path):
    result = publish("--out", tmp_path / "kept")
    assert result["code"] == 0
    repo = hub.repos["org/name"]
    assert repo.titles[1:] == [repo.titles[-1]] and repo.titles[-1].startswith("Publish with bcosify")
    assert repo.tags == {"v1": result["commit"]} and result["tag"] == "v1"
    kept = {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()}
    assert {name: file.data for name, file in repo.files().items() if name != ".gitattributes"} == kept
    for name in ("model.safetensors", "bcosify.json", "config.json", "probe.safetensors"):
        assert kept[name] == (student / name).read_bytes()
    assert set(result["files"]) == set(kept) and result["files"]["README.md"] == len(kept["README.md"])
    assert result["url"] == f"{hub.url}/org/name" and not repo.private


def test_the_second_time_nothing_is_sent(hub, publish):
    first = publish()
    hub.asked.clear()
    second = publish()
    assert (second["code"], second["commit"], second["tag"]) == (0, first["commit"], "v1") and second["changed"] == []
    assert made_requests(hub) == ["POST /api/repos/create"] and len(hub.repos["org/name"].titles) == 2


def test_a_changed_card_is_a_commit_of_one_file(hub, publish):
    publish()
    hub.asked.clear()
    result = publish("--data", "1,600 photographs without labels")
    assert result["changed"] == ["README.md"] and result["tag"] == "v2"
    assert not any(request.startswith(PUT) for request in hub.asked)
    old, new = list(hub.repos["org/name"].commits.values())[-2:]
    assert {name for name in new if old.get(name) != new[name]} == {"README.md"}
    assert b"1,600 photographs without labels" in new["README.md"].data


def test_a_dry_run_sends_nothing(hub, publish, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "none")
    result = publish("--dry-run")
    assert result["code"] == 0 and result["dry_run"] and hub.asked == []


def test_private_branches_pull_requests_and_tags(hub, publish):
    assert publish("--private", "--tag", "first")["tag"] == "first"
    repo = hub.repos["org/name"]
    assert repo.private
    branch = publish("--revision", "next", "--data", "others")
    assert repo.branches["next"] == branch["commit"] != repo.branches["main"] and branch["tag"] == "v1"
    proposed = publish("--create-pr", "--data", "yet others")
    assert repo.branches["refs/pr/1"] == proposed["commit"] and proposed["tag"] is None
    assert proposed["url"].endswith("/discussions/1") and repo.branches["main"] == repo.tags["first"]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (("--create-pr", "--tag", "v9"), "--create-pr"),
        (("--create-pr", "--revision", "next"), "--create-pr"),
        (("--license", "my-own-terms"), "--license-link"),
    ],
)
def test_wrong_options_are_refused_before_a_request(hub, publish, options, wanted):
    result = publish(*options)
    assert result["code"] == 1 and wanted in result["err"] and made_requests(hub) == []


def test_a_tag_is_not_moved_and_a_public_repository_not_taken_for_private(hub, publish):
    publish("--tag", "v1.0")
    before = hub.repos["org/name"].branches["main"]
    result = publish("--tag", "v1.0", "--data", "others")
    assert result["code"] == 1 and "v1.0" in result["err"] and "not moved" in result["err"]
    result = publish("--private", "--data", "others")
    assert result["code"] == 1 and "is public" in result["err"]
    assert hub.repos["org/name"].branches["main"] == before


def test_files_of_others_stay(hub, publish):
    publish()
    hub.put("org/name", NOTES_txt="by hand")
    result = publish()
    assert result["untouched"] == ["NOTES.txt"] and "NOTES.txt" in result["err"]
    assert result["changed"] != []  # `put` made a commit that had nothing else


def test_without_a_token_it_is_said_where_one_comes_from(hub, publish, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "none")
    result = publish()
    assert result["code"] == 1 and "hf auth login" in result["err"] and hub.asked == []


# --------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("request_", "answer", "said"),
    [
        ("repos/create", refusal(401, "", "Invalid username or password."), "hf auth login"),
        ("repos/create", refusal(403, "", "You don't have the rights"), "may not write"),
        ("repos/create", refusal(404, "", "no such organisation"), "no such repository or organisation"),
        ("org/name/refs", refusal(404, "RepoNotFound", "Repository not found"), "no such repository or organisation"),
        ("preupload", refusal(403, "", "Forbidden"), "the right to write to org"),
        (COMMIT, refusal(409, "", "another commit is in progress"), "busy"),
        (COMMIT, refusal(412, "", "A commit has happened since."), "somebody else has changed org/name"),
        (COMMIT, refusal(500), "a fault of its own (500)"),
        ("validate-yaml", Answer(400, {"errors": [{"message": "license is unknown"}], "warnings": []}), "license"),
        (PUT, refusal(422, "", "sha256"), "what arrived is not what was announced"),
    ],
)
def test_a_fault_is_told_plainly_and_leaves_nothing(hub, publish, request_, answer, said):
    hub.fail(request_, answer, times=20)
    result = publish()
    assert result["code"] == 1 and said in result["err"] and "Traceback" not in result["err"]
    assert "confirmed no commit" in result["err"] and TOKEN not in result["err"]
    repo = hub.repos.get("org/name")
    assert repo is None or (len(repo.titles) == 1 and repo.tags == {})


def test_after_any_fault_the_same_command_goes_on(hub, publish):
    hub.fail(COMMIT, refusal(409))
    assert publish()["code"] == 1
    uploaded = dict(hub.blobs)
    hub.asked.clear()
    assert uploaded and publish()["code"] == 0
    assert not any(request.startswith(PUT) for request in hub.asked)  # what had arrived is not sent again


def test_a_stale_parent_is_not_built_upon(hub, publish):
    publish()
    # Somebody commits between what was read and what is written.
    answers = hub.handle

    def late(handler):
        if "/preupload/" in handler.path:
            hub.put("org/name", THEIRS_txt="theirs")
        return answers(handler)

    hub.handle = late
    result = publish("--data", "others")
    assert result["code"] == 1 and "somebody else has changed org/name" in result["err"]
    assert set(hub.repos["org/name"].files()) == {"THEIRS.txt"}


@pytest.mark.parametrize("request_", [COMMIT, PUT, "tag/"])
def test_a_server_that_fails_once_is_asked_again(hub, publish, request_):
    hub.fail(request_, refusal(500))
    result = publish()
    assert result["code"] == 0 and len(hub.repos["org/name"].titles) == 2 and hub.repos["org/name"].tags


def test_a_connection_that_is_cut_once_is_made_again(hub, publish):
    hub.fail(PUT, CUT)
    assert publish()["code"] == 0 and len(hub.repos["org/name"].titles) == 2


def test_a_connection_that_stays_cut_ends_the_upload_and_it_can_be_repeated(hub, publish):
    hub.fail(PUT, CUT, times=50)
    result = publish()
    assert result["code"] == 1 and "broke off" in result["err"] and "run the same command again" in result["err"]
    assert len(hub.repos["org/name"].titles) == 1
    hub.faults.clear()
    assert publish()["code"] == 0


def test_nobody_answers(hub, publish):
    hub.close()
    result = publish()
    assert result["code"] == 1 and "broke off" in result["err"] and "Traceback" not in result["err"]


def test_a_tag_that_fails_is_told_with_its_commit_and_made_the_next_time(hub, publish):
    hub.fail("tag/", refusal(500), times=3)
    result = publish()
    commit = hub.repos["org/name"].branches["main"]
    assert result["code"] == 1 and f"Commit {commit[:8]} was made, and not tagged yet" in result["err"]
    result = publish()
    assert result["code"] == 0 and result["changed"] == [] and hub.repos["org/name"].tags == {"v1": commit}


def test_bytes_that_rot_on_the_hub_are_noticed_and_not_tagged(hub, publish):
    hub.spoils = "model.safetensors"
    result = publish()
    assert result["code"] == 1 and "does not hold what was sent: model.safetensors" in result["err"]
    assert hub.repos["org/name"].tags == {}
    hub.spoils = None
    result = publish()
    assert result["code"] == 0 and result["changed"] == ["model.safetensors"]


def test_offline_is_said(hub, publish, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = publish()
    assert result["code"] == 1 and "HF_HUB_OFFLINE" in result["err"]


def test_a_failed_check_uploads_nothing(hub, publish, student, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(student, broken)
    weights = bytearray((broken / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (broken / "model.safetensors").write_bytes(weights)
    result = publish("--out", tmp_path / "kept", folder=broken)
    assert result["code"] == 1 and "sha256" in result["err"] and hub.asked == []
    assert not (tmp_path / "kept").exists() and not list(Path(tmp_path).glob(".kept*"))


@pytest.mark.parametrize("fault", [None, refusal(500), Answer(401, {"error": f"bad token {TOKEN}"}), CUT])
def test_the_token_is_nowhere(hub, publish, tmp_path, caplog, fault, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_DEBUG", True)
    if fault is not None:
        hub.fail(f"{COMMIT}|{PUT}", fault, times=50)
    names = [
        name for name in logging.root.manager.loggerDict if name.startswith(("huggingface_hub", "http", "bcosify"))
    ]
    for name in ["", *names]:
        caplog.set_level(logging.DEBUG, name)
        logging.getLogger(name).propagate = True
    result = publish("--out", tmp_path / "kept")
    assert (result["code"] == 0) == (fault is None) and caplog.records
    said = [result["out"], result["err"], caplog.text, *(str(record.__dict__) for record in caplog.records)]
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    written += [file.data for repo in hub.repos.values() for file in repo.files().values()]
    assert not any(TOKEN in text for text in said) and not any(TOKEN.encode() in data for data in written)
