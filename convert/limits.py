"""What a folder of strangers may ask for: nothing that its own files could not fill, and nothing outside of it.

A record names an architecture and its settings, and those decide how much memory is taken long before the weights are
compared with it. So the header of the weights is read first, and then bounds what is built.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..core.errors import CheckpointError, first_line, translated
from ..core.files import check_file
from ..core.torch_internals import TorchDispatchMode, on_registration

__all__ = ["Header", "bounded_run", "check_inside", "check_numbers", "read_header", "within"]

# What a skeleton may have beyond its file: parts that are built and thrown away, masks and tables that are not saved.
TIMES, MORE_ELEMENTS, MORE_TENSORS = 4, 2**24, 10_000


@dataclasses.dataclass(frozen=True)
class Header:
    """What a safetensors file says that it holds, and by its length does hold; no tensor was read for it."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def elements(self) -> int:
        """Numbers in the whole file."""
        return sum(map(math.prod, self.shapes.values()))


def read_header(path: Path) -> Header:
    """The names and shapes in a safetensors file.

    Raises:
        CheckpointError: no such file, or no safetensors: among others a header that is longer than the file, or
            shapes that need more bytes than are there.
    """
    check_file(path)
    try:
        with safe_open(path, "pt") as file:
            return Header(path, {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})
    except (OSError, SafetensorError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error


def check_inside(folder: Path, names: Iterable[str], below: str = "") -> None:
    """Raises CheckpointError where a file of `folder`, or of its folder `below`, leads out by its name or as a link.

    The hub's cache is such a folder of links, into the `blobs` beside its `snapshots`: these are followed.
    """
    root = folder.resolve()
    allowed = [root, *([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])]
    for name in names:
        if not name or name in (".", "..") or Path(name).name != name or "\\" in name or "\0" in name:
            raise CheckpointError(f"{folder}: {name!r} is no file name. Nothing outside of a model's folder is opened.")
        target = (folder / below / name).resolve()
        if not any(target.is_relative_to(place) for place in allowed):
            raise CheckpointError(
                f"{folder / below / name} is a link to {target}, outside of the folder. It is not followed."
            )


def check_numbers(settings: Any, header: Header, where: str) -> None:
    """Raises CheckpointError for a number in JSON `settings` that is larger than anything in the weights can be."""
    limit = max(header.elements, 1)
    for name, number in _numbers(settings, where):
        if not abs(number) <= max(limit, 2**16):
            raise CheckpointError(
                f"{name} is {number:,}, but {header.path} holds only {limit:,} numbers, so no such model is in it. "
                "Nothing was built."
            )


def _numbers(value: Any, name: str) -> Iterator[tuple[str, int]]:
    """Names and values of the whole numbers in JSON: sizes and counts are whole, angles and rates are not."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _numbers(item, f"{name}.{i}")
    elif isinstance(value, int) and not isinstance(value, bool):
        yield name, value


@contextlib.contextmanager
def within(header: Header) -> Iterator[None]:
    """Building modules inside takes no more memory than the file of `header` explains.

    A tensor that alone would be larger is refused before it is made, and a model as soon as the tensors that it
    registers are, so that a billion layers are not waited for.

    Raises:
        CheckpointError: so; or the settings are none that the library can build.
    """

    def not_built(error: Exception) -> str:
        return f"{header.path}: the model of its record cannot be built: {first_line(error)}"

    with _registered(header), _Sizes(header):
        # Libraries raise anything on settings that they do not know.
        with translated(Exception, CheckpointError, not_built):
            yield


class _Sizes(TorchDispatchMode):
    """Looks at the sizes that tensors are asked for with, before they have memory."""

    def __init__(self, header: Header) -> None:
        super().__init__()
        self.header = header

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name.startswith("new_") or not any(isinstance(argument, Tensor) for argument in args):
            sizes = [math.prod(argument) for argument in args if _is_size(argument)]
            sizes += [math.prod(filter(_is_count, args))] if name in BY_COUNT else []
            _check_size(self.header, max(sizes, default=0), 1)
        return func(*args, **(kwargs or {}))


MOST_AT_ONCE = 2**31  # numbers in one result, or pairs that one attention compares


@contextlib.contextmanager
def bounded_run(where: str) -> Iterator[None]:
    """Inside, no operation may make or compare more numbers than any model in use does.

    A record can ask for few numbers that take no end: 60,000 register tokens are compared each with each.

    Raises:
        CheckpointError: so, before that operation.
    """
    with _Work(where):
        yield


class _Work(TorchDispatchMode):
    """Looks at the sizes of what goes into attention and products, before they are computed."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, tensors = func.overloadpacket.__name__, [one for one in args if isinstance(one, Tensor)]
        if len(tensors) > 1 and tensors[0].dim() > 1 and tensors[1].dim() > 1:
            rows, other = tensors[0].shape[:-1], tensors[1].shape
            columns = other[-2] if "scaled_dot_product" in name else other[-1]
            if ("scaled_dot_product" in name or name in PRODUCTS) and math.prod(rows) * columns > MOST_AT_ONCE:
                raise CheckpointError(
                    f"{self.where} describes a model that compares {math.prod(rows):,} with {columns:,} numbers at "
                    "once, which is more than any in use. Nothing was run."
                )
        return func(*args, **(kwargs or {}))


PRODUCTS = ("mm", "bmm", "matmul", "baddbmm")


# Factories that are told how many numbers to make, and not a shape.
BY_COUNT = ("arange", "linspace", "logspace", "eye", "randperm", "range")


def _is_count(argument: Any) -> bool:
    return isinstance(argument, int) and not isinstance(argument, bool) and argument > 0


def _is_size(argument: Any) -> bool:
    return isinstance(argument, list | tuple) and all(isinstance(side, int) for side in argument)


@contextlib.contextmanager
def _registered(header: Header) -> Iterator[None]:
    """Counts every parameter and buffer that a module gets."""
    found = [0, 0]

    def count(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        if tensor is not None:
            found[0] += tensor.numel()
            found[1] += 1
            _check_size(header, *found)

    handles = on_registration(count)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_size(header: Header, elements: int, tensors: int) -> None:
    most = TIMES * header.elements + MORE_ELEMENTS
    if elements > most or tensors > TIMES * len(header.shapes) + MORE_TENSORS:
        raise CheckpointError(
            f"{header.path} does not fit the model: it holds {header.elements:,} numbers in {len(header.shapes):,} "
            f"tensors, and the settings beside it are of a model with at least {elements:,} in {tensors:,}. "
            "Nothing was loaded."
        )
