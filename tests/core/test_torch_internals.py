"""torch still has the private names that the project reads, and they still do what they are read for."""

from __future__ import annotations

import torch
from bcosify.core import torch_internals as internals
from torch import nn
from torch.utils.data import DataLoader


def test_every_name_is_there():
    assert all(hasattr(internals, name) for name in internals.__all__)


def test_batch_norms_have_one_class():
    for norm in (nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.BatchNorm3d(2), nn.SyncBatchNorm(2)):
        assert isinstance(norm, internals.AnyBatchNorm)
    assert not isinstance(nn.InstanceNorm2d(2), internals.AnyBatchNorm)


def test_writes_are_counted():
    x = torch.zeros(2)
    before = internals.written_times(x)
    x.add_(1)
    x[0] = 3
    assert internals.written_times(x) == before + 2


def test_nested_arguments_are_taken_apart_and_put_together():
    nested = ([1, (2, 3)], {"a": 4})
    leaves, tree = internals.tree_flatten(nested)
    assert leaves == [1, 2, 3, 4] and internals.tree_unflatten(leaves, tree) == nested
    assert internals.tree_map(lambda a, b: a + b, nested, nested) == ([2, (4, 6)], {"a": 8})


def test_parameters_and_buffers_are_seen_until_the_handles_are_removed():
    seen = []
    handles = internals.on_registration(lambda module, name, tensor: seen.append(name))
    nn.BatchNorm1d(2)
    for handle in handles:
        handle.remove()
    nn.BatchNorm1d(2)
    assert seen == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


def test_the_limits_of_compiling_only_rise():
    config = torch._dynamo.config
    with config.patch(recompile_limit=8, accumulated_recompile_limit=10_000):
        internals.allow_programs(128)
        assert (config.recompile_limit, config.accumulated_recompile_limit) == (128, 10_000)
        internals.allow_programs(16)
        assert config.recompile_limit == 128


def test_ending_workers_of_a_loader_without_any_does_nothing():
    batches = iter(DataLoader([1, 2], batch_size=None))
    internals.end_workers(batches)
    assert list(batches) == [1, 2]
