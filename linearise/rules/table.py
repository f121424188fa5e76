"""The table that explanation mode looks things up in: each torch function and its rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .affine import ADD, SUBTRACT, affine, combination, extreme, independent, interpolation, linear, moments, padding
from .attention import attention, multi_head_attention
from .gates import clipping, distrusting, freezing, gate, gated_half, power, routing, saturation
from .norms import batch_norm, cosine_similarity, group_norm, instance_norm, layer_norm, normalize, rms_norm
from .products import multiply_add, product, projection, quotient, weighted
from .rule import Operation, Rule

__all__ = ["IN_PLACE", "OPERATIONS", "PROPERTIES", "resolve"]


# These keep nothing of what they read or return, and can write over it.
IN_PLACE = (linear, ADD, SUBTRACT)

LINEAR = """
    view view_as reshape reshape_as expand expand_as broadcast_to flatten unflatten ravel squeeze unsqueeze transpose
    swapaxes swapdims permute movedim moveaxis t adjoint narrow select chunk split split_with_sizes tensor_split hsplit
    vsplit dsplit unbind unfold fold diagonal diag diag_embed as_strided contiguous clone roll flip fliplr flipud rot90
    repeat repeat_interleave tile gather take take_along_dim index_select masked_select tril triu trace __getitem__
    __iter__ __reversed__ atleast_1d atleast_2d atleast_3d view_as_real view_as_complex resolve_conj resolve_neg
    sum mean cumsum nansum sum_to_size neg negative positive __neg__ __pos__ conj alias
    to float double half bfloat16 type type_as cpu cuda requires_grad_ as_subclass
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
    max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool2d_with_indices
    fractional_max_pool2d fractional_max_pool3d max_unpool1d max_unpool2d max_unpool3d
    interpolate upsample grid_sample pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle
    dropout dropout1d dropout2d dropout3d feature_dropout alpha_dropout feature_alpha_dropout
    fft ifft rfft irfft fft2 ifft2 rfft2 irfft2 fftn ifftn rfftn irfftn fftshift ifftshift
""".split()

INDEPENDENT = """
    zeros_like ones_like empty_like full_like rand_like randn_like randint_like
    new_zeros new_ones new_empty new_full new_tensor new_empty_strided
""".split()

AFFINE = """
    cat concat concatenate stack hstack vstack dstack column_stack row_stack where
    masked_fill masked_scatter index_fill index_copy index_put index_add scatter scatter_add
    select_scatter slice_scatter diagonal_scatter
    copy_ fill_ zero_ __setitem__
""".split()

EXTREME = "max min amax amin maximum minimum fmax fmin topk sort msort kthvalue median aminmax".split()

PRODUCT = """
    mul multiply matmul mm bmm mv dot vdot inner outer ger tensordot kron einsum chain_matmul multi_dot
    linalg_multi_dot vecdot linalg_vecdot
""".split()

GATED = """
    relu6 leaky_relu prelu rrelu elu selu celu gelu silu mish hardswish softsign tanhshrink hardshrink softshrink
    local_response_norm
""".split()

CLIPPED = "clamp clip clamp_min clamp_max hardtanh threshold".split()

FROZEN = """
    softmax log_softmax softmin gumbel_softmax sigmoid hardsigmoid logsigmoid softplus exp exp2 expm1 log log2
    log10 log1p logsumexp logcumsumexp logaddexp sqrt rsqrt reciprocal __rpow__ float_power norm
    linalg_vector_norm linalg_norm linalg_matrix_norm vector_norm matrix_norm cdist dist abs absolute sign sgn floor
    ceil round trunc frac remainder fmod __floordiv__ floor_divide __mod__ std var sin cos tan asin acos atan atan2
    sinh cosh erf erfc erfinv logit heaviside bernoulli nan_to_num detach prod cumprod __rfloordiv__ __rmod__
""".split()

RULES: dict[str, Rule] = {
    **dict.fromkeys(LINEAR, linear),
    **dict.fromkeys(INDEPENDENT, independent),
    **dict.fromkeys(AFFINE, affine),
    **dict.fromkeys(EXTREME, extreme),
    **dict.fromkeys(PRODUCT, product),
    **dict.fromkeys(GATED, gate),
    **dict.fromkeys(CLIPPED, clipping),
    **{name: freezing(name.strip("_")) for name in FROZEN},
    **dict.fromkeys(("add", "__add__", "__radd__"), ADD),
    **dict.fromkeys(("sub", "subtract", "__sub__"), SUBTRACT),
    **dict.fromkeys(("rsub", "__rsub__"), combination(lambda alpha: (-alpha, 1))),
    **dict.fromkeys(("div", "divide", "true_divide", "__truediv__", "__div__"), quotient),
    **dict.fromkeys(("__rdiv__", "__rtruediv__"), freezing("reciprocal")),
    "linear": projection,
    **dict.fromkeys((f"conv{n}d" for n in (1, 2, 3)), weighted),
    **dict.fromkeys((f"conv_transpose{n}d" for n in (1, 2, 3)), weighted),
    **dict.fromkeys(("var_mean", "std_mean"), moments),
    **dict.fromkeys(("pow", "__pow__"), power),
    **dict.fromkeys(("pad", "constant_pad_nd"), padding),
    "relu": routing,
    "square": gate,
    "tanh": saturation,
    "lerp": interpolation,
    "addmm": multiply_add(torch.mm),
    "addbmm": multiply_add(lambda a, b: torch.bmm(a, b).sum(0)),
    "baddbmm": multiply_add(torch.bmm),
    "addmv": multiply_add(torch.mv),
    "addr": multiply_add(torch.outer),
    "addcmul": multiply_add(torch.mul),
    "addcdiv": multiply_add(torch.div, quotient),
    "glu": gated_half,
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "group_norm": group_norm,
    "normalize": normalize,
    "cosine_similarity": cosine_similarity,
    "scaled_dot_product_attention": attention,
}

# These take other arguments in torch than they do in torch.nn.functional.
FUNCTIONAL_RULES: dict[Callable[..., Any], Rule] = {
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
    F.multi_head_attention_forward: multi_head_attention,
}

PROPERTY_RULES: dict[str, Rule] = {
    **dict.fromkeys(("T", "mT", "H", "mH", "real", "imag"), linear),
    "data": freezing("detach"),
}

SPACES = (torch, Tensor, F, torch.linalg, torch.special, torch.fft)


def _operations() -> Iterator[tuple[Callable[..., Any], Operation]]:
    """Each spelling of each rule: torch function, method, torch.nn.functional, and in place."""
    for name, rule in RULES.items():
        for spelling in (name, f"{name}_"):
            for space in SPACES:
                if callable(function := getattr(space, spelling, None)):
                    # A linear operation is as it is in place, too; some only change the shape.
                    yield function, Operation(name, rule, _writes(spelling) and rule is not linear)
    for function, rule in FUNCTIONAL_RULES.items():
        yield function, Operation(function.__name__, rule, False)
    for name, rule in PROPERTY_RULES.items():
        yield getattr(Tensor, name).__get__, Operation(name, rule, False)


def _writes(spelling: str) -> bool:
    """Whether a function of this name writes to its first argument."""
    return spelling == "__setitem__" or (spelling.endswith("_") and spelling[-2:] != "__")


OPERATIONS: dict[Callable[..., Any], Operation] = dict(_operations())

# What returns no tensor, and is asked so often that looking further would show.
PROPERTIES = frozenset(
    [getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_cuda", "layout")]
    + [Tensor.dim, Tensor.size, Tensor.is_floating_point, Tensor.is_contiguous, Tensor.stride, Tensor.numel]
)


def resolve(function: Callable[..., Any]) -> Operation:
    """What is known of a torch function."""
    known = OPERATIONS.get(function)
    if known is not None:
        return known
    name = getattr(function, "__name__", str(function))
    if name == "__get__":
        name = getattr(getattr(function, "__self__", None), "__name__", name)
    return Operation(name, distrusting(name), _writes(name))
