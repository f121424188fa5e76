"""Whole models, unconverted, with random weights: the same output, and a ledger that balances, family by family."""

from __future__ import annotations

import pytest
import torch
from bcosify.core.errors import LedgerError
from bcosify.explain import explain

# name: (picture size, whether the model must be told of it)
FAMILIES = {
    "test_vit": (48, True),
    "test_vit2": (48, True),
    "test_vit3": (48, True),  # attention pooling
    "test_vit4": (48, True),  # RMSNorm, SwiGLU
    "test_resnet": (64, False),
    "test_convnext": (64, False),
    "test_convnext2": (64, False),
    "test_efficientnet": (64, False),
    "test_efficientnet_ln": (64, False),
    "test_byobnet": (64, False),
    "test_nfnet": (64, False),
    "test_mambaout": (64, False),
    "resnet18": (48, False),
    "deit_tiny_patch16_224": (48, True),
    "vit_small_patch14_dinov2": (28, True),
    "vit_small_patch16_dinov3": (32, False),  # RoPE, registers
    "vit_base_patch16_siglip_224": (32, True),
    "beit_base_patch16_224": (32, True),
    "eva02_tiny_patch14_224": (28, True),
    "cait_xxs24_224": (32, True),
    "xcit_nano_12_p16_224": (32, False),
    "convit_tiny": (224, False),
    "swin_tiny_patch4_window7_224": (56, True),
    "swinv2_tiny_window8_256": (64, True),
    "hiera_tiny_224": (64, True),
    "maxvit_rmlp_pico_rw_256": (64, True),
    "caformer_s18": (48, False),
    "poolformer_s12": (48, False),
    "convnext_atto": (48, False),
    "convnextv2_atto": (48, False),  # response normalisation: a norm over space that gates
    "efficientnet_lite0": (48, False),
    "mobilenetv3_small_050": (48, False),
    "mobilevit_xxs": (64, False),
    "regnety_002": (48, False),
    "densenet121": (48, False),
    "vgg11": (32, False),
    "mixer_s32_224": (64, True),
    "gmlp_ti16_224": (32, True),
    "skresnet18": (48, False),
    "resnest14d": (48, False),
    "lambda_resnet26t": (64, False),
    "focalnet_tiny_srf": (48, False),
    "efficientvit_b0": (64, False),  # linear attention
    "repvgg_a0": (48, False),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_output_is_the_same_and_ledger_balances(name, make, pictures):
    size, told = FAMILIES[name]
    model = make(name, size, told)
    images = pictures(size)
    with torch.no_grad():
        outputs = model(images)

    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    explanation = explain(model, images, targets=[0, 3, 7], check=False)

    # In one batch: nothing had to be told apart picture by picture.
    assert len(forwards) == 1
    assert outputs.isfinite().all() and outputs.std() > 0
    torch.testing.assert_close(explanation.outputs, outputs, rtol=1e-6, atol=1e-6 * float(outputs.abs().max()))
    torch.testing.assert_close(explanation.scores, outputs[:, [0, 3, 7]], rtol=1e-6, atol=1e-6)
    assert explanation.balanced(1e-4).all()
    # Both sides of the ledger are far above the tolerance, so that to balance means something.
    assert explanation.contributions.abs().sum((-2, -1)).min() > 1e-2
    assert sum(share.abs() for share in explanation.constants.values()).min() > 1e-2
    assert not {"literal", "unnamed"} & set(explanation.constants)


def test_pictures_of_a_batch_are_explained_apart(make, pictures):
    model, images = make("test_convnext", 64), pictures(64, batch=3)
    together = explain(model, images, targets=[1, 2])
    for index in range(3):
        alone = explain(model, images[index : index + 1], targets=[1, 2])
        torch.testing.assert_close(together.contributions[index], alone.contributions[0], rtol=1e-3, atol=1e-6)
        assert together.constants.keys() == alone.constants.keys()
        for name, share in alone.constants.items():
            torch.testing.assert_close(together.constants[name][index], share[0], rtol=1e-3, atol=1e-6)


def test_recurrent_network_is_refused_by_name(make, pictures):
    model = make("sequencer2d_s", 32, told=True)
    with pytest.raises(LedgerError, match=r"Sequencer2d does not add up.*lstm \(36 calls\)"):
        explain(model, pictures(32), 0)


def test_constants_carry_the_names_of_parameters(make, pictures):
    explanation = explain(make("test_vit", 48, told=True), pictures(48), 0)
    names = set(explanation.constants)
    assert {"cls_token", "pos_embed", "patch_embed.proj.bias", "blocks.0.attn.qkv.bias", "head.bias"} <= names
    assert names <= {name for name, _ in make("test_vit", 48, told=True).named_parameters()}
    explanation = explain(make("test_resnet", 64), pictures(64), 0)
    assert {"bn1.running_mean", "bn1.bias", "fc.bias"} <= set(explanation.constants)
