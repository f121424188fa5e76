"""Which layer is of which kind, by exact class path: a subclass may act differently, so it is named or refused.

Paths are strings, which spares importing every library.
"""

from __future__ import annotations

__all__ = [
    "ATTENTIONS",
    "ATTENTION_POOLS",
    "BATCH_NORMS",
    "CONVOLUTIONS",
    "FADING_CONSTANTS",
    "GATES",
    "LIBRARIES",
    "LINEARS",
    "NORMS",
    "OTHER_CONVOLUTIONS",
    "PLAIN_PROJECTIONS",
    "SAME_CONVOLUTIONS",
    "STANDARDISED",
]


def _in(module: str, names: str) -> tuple[str, ...]:
    return tuple(f"{module}.{name}" for name in names.split())


LINEARS = (
    "torch.nn.modules.linear.Linear",
    "timm.layers.linear.Linear",
    # What `nn.MultiheadAttention` projects its result with: a linear layer that says what quantisation must not do.
    "torch.nn.modules.linear.NonDynamicallyQuantizableLinear",
)
CONVOLUTIONS = ("torch.nn.modules.conv.Conv2d",)
# TensorFlow's padding, which depends on the size of the picture.
SAME_CONVOLUTIONS = ("timm.layers.conv2d_same.Conv2dSame",)
# Their weight is standardised in every forward pass, a function of the weight alone: it is folded into plain weights.
STANDARDISED = _in("timm.layers.std_conv", "StdConv2d StdConv2dSame ScaledStdConv2d ScaledStdConv2dSame")
OTHER_CONVOLUTIONS = _in("torch.nn.modules.conv", "Conv1d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d")
NORMS = (
    *_in("torch.nn.modules.normalization", "LayerNorm GroupNorm RMSNorm"),
    *_in("timm.layers.norm", "GroupNorm GroupNorm1 LayerNorm LayerNormFp32 LayerNorm2d LayerNorm2dFp32 LayerNormExp2d"),
    *_in("timm.layers.norm", "RmsNorm RmsNormFp32 RmsNorm2d RmsNorm2dFp32"),
    *_in("timm.layers.norm", "SimpleNorm SimpleNormFp32 SimpleNorm2d SimpleNorm2dFp32"),
    *_in("timm.layers.norm_act", "GroupNormAct GroupNorm1Act RmsNormAct RmsNormActFp32 RmsNormAct2d RmsNormAct2dFp32"),
    *_in("timm.layers.norm_act", "LayerNormAct LayerNormActFp32 LayerNormAct2d LayerNormAct2dFp32"),
    *_in("timm.models.metaformer", "GroupNorm1NoBias LayerNorm2dNoBias LayerNormNoBias"),
    *_in("open_clip.transformer", "LayerNorm LayerNormFp32"),
    "transformers.models.convnext.modeling_convnext.ConvNextLayerNorm",
    "transformers.models.convnextv2.modeling_convnextv2.ConvNextV2LayerNorm",
    "transformers.models.dinov3_convnext.modeling_dinov3_convnext.DINOv3ConvNextLayerNorm",
)
BATCH_NORMS = (
    *_in("torch.nn.modules.batchnorm", "BatchNorm1d BatchNorm2d"),
    *_in("timm.layers.norm_act", "BatchNormAct2d"),
)
# Attention whose projections are no layers that are called: taken apart into layers.
ATTENTION_POOLS = ("open_clip.modified_resnet.AttentionPool2d",)
ATTENTIONS = ("torch.nn.modules.activation.MultiheadAttention", *ATTENTION_POOLS)
# Modules whose bias must be a tensor at beta = 0 too, because their forward calls its methods.
BIASED = (
    *_in("timm.layers.evo_norm", "EvoNorm2dB0 EvoNorm2dB1 EvoNorm2dB2 EvoNorm2dS0 EvoNorm2dS0a EvoNorm2dS1"),
    *_in("timm.layers.evo_norm", "EvoNorm2dS1a EvoNorm2dS2 EvoNorm2dS2a"),
    *_in("timm.layers.filter_response_norm", "FilterResponseNormTlu2d FilterResponseNormAct2d"),
    "timm.layers.grn.GlobalResponseNorm",
    "timm.models.metaformer.StarReLU",
    "timm.models.hgnet.LearnableAffineBlock",
    "transformers.models.convnextv2.modeling_convnextv2.ConvNextV2GRN",
)
# Constants that a module adds in its own forward, by name.
FADING_CONSTANTS = {
    **dict.fromkeys(BIASED, ("bias",)),
    "timm.models.beit.Attention": ("q_bias", "v_bias"),
    "timm.models.eva.EvaAttention": ("q_bias", "v_bias"),
    "timm.models.swin_transformer_v2.WindowAttention": ("q_bias", "v_bias"),
    "timm.models.vision_transformer.ParallelScalingBlock": ("mlp_bias",),
    "timm.models.vision_transformer.DiffParallelScalingBlock": ("mlp_bias",),
    "open_clip.transformer.Attention": ("in_proj_bias",),
}
# Layers by their own name: the softmax over query and key is a frozen gate in an explanation, value goes with them;
# experts are chosen by a router.
PLAIN_PROJECTIONS = frozenset(
    "qkv q k v kv qk q_proj k_proj v_proj query key value to_q to_k to_v to_qkv to_kv q_lin k_lin v_lin "
    "routing_fn".split()
)
# Whose own classes are known by their layers' names; other classes were put in by somebody else.
LIBRARIES = ("timm.", "transformers.", "open_clip.")
# Modules whose output multiplies the features as a gate; their inside never reaches the score in an explanation.
GATES = frozenset(
    "SEModule SqueezeExcite EffectiveSEModule EffectiveSqueezeExcite SqueezeExciteCl EcaModule CecaModule GatherExcite "
    "ChannelAttn LightChannelAttn SpatialAttn LightSpatialAttn SelectiveKernelAttn".split()
)
