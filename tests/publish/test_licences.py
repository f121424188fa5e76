"""Whose licence a model is under: what cards say, what is carried over, and what must be said out loud."""

from __future__ import annotations

import pytest
from bcosify.convert import Source
from bcosify.core.errors import PublishError
from bcosify.publish.licences import KNOWN, PERMISSIVE, Base, Licence, base_of, choose_licence

LINK = "https://example.org/terms"


def source(reference: str, **more) -> Source:
    return Source(reference, "timm", "test_vit", **more)


@pytest.mark.parametrize("name", sorted(PERMISSIVE))
def test_a_permissive_licence_is_carried_over(name):
    assert choose_licence(Base("x", licence=name), None, None).card_fields() == {"license": name}


def test_another_licence_may_be_chosen_for_a_permissive_base():
    base = Base("x", licence="mit")
    assert choose_licence(base, "gpl-3.0", None) == Licence("gpl-3.0")
    assert choose_licence(base, "house-terms", LINK).card_fields() == {
        "license": "other",
        "license_name": "house-terms",
        "license_link": LINK,
    }
    with pytest.raises(PublishError, match="--license-link URL"):
        choose_licence(base, "house-terms", None)


RESTRICTED = [
    Base("timm:x", licence="cc-by-nc-4.0"),
    Base("meta/x", "meta/x", "dinov3-license", LINK),
    Base("org/x", "org/x", "apache-2.0", gated=True),
    Base("org/x", "org/x", gated=True),
    Base("a folder"),
]


@pytest.mark.parametrize("base", RESTRICTED)
def test_other_terms_are_not_carried_over_in_silence(base):
    for given, link in ((None, None), (None, LINK), (base.licence or "mit", None)):
        with pytest.raises(PublishError, match="--license .* --license-link") as told:
            choose_licence(base, given, link)
        assert base.name in str(told.value) and "Nothing was uploaded" in str(told.value)
        assert (base.licence or "nothing of its licence") in str(told.value)
        assert ("gated" in str(told.value)) == base.gated
    assert choose_licence(base, base.licence or "mit", LINK) == Licence(base.licence or "mit", LINK)


@pytest.mark.parametrize("base", [base for base in RESTRICTED if base.licence])
def test_a_known_licence_is_not_replaced_by_a_laxer_one(base):
    with pytest.raises(PublishError, match=f"stays under that licence.*--license {base.licence}"):
        choose_licence(base, "mit", LINK)


def test_what_the_hub_has_no_name_for_is_spelt_as_other():
    assert "dinov3-license" not in KNOWN
    fields = choose_licence(RESTRICTED[1], "dinov3-license", LINK).card_fields()
    assert fields == {"license": "other", "license_name": "dinov3-license", "license_link": LINK}


@pytest.mark.parametrize(
    ("reference", "licence", "repo"),
    [
        ("bundled:efficientnet_lite0", "apache-2.0", None),
        ("bundled:dinov2_small", "apache-2.0", None),
        ("timm:vit_small_patch14_dinov2.lvd142m", "apache-2.0", "timm/vit_small_patch14_dinov2.lvd142m"),
        ("timm:vit_small_patch16_dinov3.lvd1689m", "dinov3-license", "timm/vit_small_patch16_dinov3.lvd1689m"),
        ("timm:convnextv2_atto.fcmae", "cc-by-nc-4.0", "timm/convnextv2_atto.fcmae"),
    ],
)
def test_what_libraries_know_needs_no_hub(reference, licence, repo):
    base = base_of(source(reference))
    assert (base.licence, base.repo) == (licence, repo) and base.found
    assert base.permissive == (licence in PERMISSIVE)


@pytest.mark.parametrize("weights", ["random", "0123456789abcdef"])
def test_weights_of_ones_own_have_no_licence_until_it_is_said(weights):
    base = base_of(source("timm:resnet50.a1_in1k", weights=weights))
    assert base.licence is None and base.repo is None
    with pytest.raises(PublishError, match="says nothing of its licence"):
        choose_licence(base, None, None)


CARD = "---\nlicense: {licence}\n{more}---\n# A base\n"


@pytest.mark.parametrize("reference", ["hf:org/base", "timm:hf-hub:org/base", "open_clip:hf-hub:org/base@main"])
@pytest.mark.parametrize(
    ("licence", "more", "wanted"),
    [
        ("bsd-3-clause", "", ("bsd-3-clause", None, False)),
        ("other", "license_name: dinov3-license\nlicense_link: LICENSE.md\n", ("dinov3-license", "blob", False)),
        ("mit", "extra_gated_prompt: Sign here.\n", ("mit", None, True)),
        ("unknown", "", (None, None, False)),
    ],
)
def test_the_base_models_card_is_read_from_the_hub(default_hub, reference, licence, more, wanted):
    default_hub.put("org/base", README_md=CARD.format(licence=licence, more=more))
    base = base_of(source(reference))
    link = wanted[1] and f"https://huggingface.co/org/base/{wanted[1]}/main/LICENSE.md"
    assert (base.licence, base.link, base.gated, base.repo) == (wanted[0], link, wanted[2], "org/base")


def test_a_card_in_the_cache_is_enough(default_hub, monkeypatch):
    default_hub.put("org/base", README_md=CARD.format(licence="mit", more=""))
    assert base_of(source("hf:org/base")).licence == "mit"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert base_of(source("hf:org/base")).licence == "mit"


def test_a_card_that_cannot_be_had_is_no_licence(request, monkeypatch):
    assert base_of(source("hf:org/base")) == Base("org/base", "org/base", found="its card could not be fetched")
    hub = request.getfixturevalue("default_hub")
    hub.put("org/base", config_json="{}")
    assert base_of(source("hf:org/base")).found == "it has no card"
    hub.reads_need_token = True
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    assert base_of(source("hf:org/base")).gated


@pytest.mark.parametrize("reference", ["dir:{}", "timm:local-dir:{}", "hf:{}"])
def test_a_folders_card_is_read_and_its_place_not_told(tmp_path, reference):
    folder = tmp_path / "mine"
    folder.mkdir()
    assert base_of(source(reference.format(folder))).licence is None
    (folder / "README.md").write_text(CARD.format(licence="mit", more=""))
    base = base_of(source(reference.format(folder)))
    assert base.licence == "mit" and base.name == "the folder mine" and base.repo is None
