"""Where the sizes in a view or a cut come from: which attribute of which module.

While a network is traced, whole numbers among the attributes of its modules are replaced by :class:`Tagged` ones, which
know their name. A function mode sees the arguments of every torch function before PyTorch turns them into plain
numbers, so that ``x.reshape(b, n, 3, self.num_heads, self.head_dim)`` tells which attribute must follow which
dimension. A size that was computed (``self.width // 2``) has lost its name; then attributes of equal value are taken,
which the check after surgery has to confirm.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from prunegym.pruning.attention import HeadwiseAttention

#: Parts of names of attributes that hold no number of channels, whatever number they hold.
NOT_CHANNELS = (
    *("kernel", "stride", "pad", "dilat", "window", "patch", "shift"),
    *("depth", "classes", "grid", "resolution"),
)
_LONGEST = 16
"""Longer lists are not lists of sizes."""


@dataclass(frozen=True)
class Place:
    """An attribute of a module, or a position in one that is a list or tuple."""

    module: str
    name: str
    index: int | None = None


class Tagged(int):
    """A whole number that knows which attribute it is; what is computed from it is a plain number."""

    place: Place

    def __new__(cls, value: int, place: Place) -> Tagged:
        """Tag a number."""
        tagged = super().__new__(cls, value)
        tagged.place = place
        return tagged

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        """Copies are plain numbers."""
        return int, (int(self),)


_NUMBERS = (int, Tagged)
"""Members of enumerations and truth values are whole numbers too, but what is done with them needs their own class."""


def attributes(path: str, module: nn.Module) -> Iterator[tuple[Place, int]]:
    """Whole numbers among the attributes of a module that may be numbers of channels."""
    if type(module).__module__.startswith("torch.nn."):
        # surgery knows the sizes of PyTorch's own layers but this one; where one size is open, the others are constants
        if isinstance(module, nn.Unflatten) and -1 not in module.unflattened_size:
            yield from _numbers(path, "unflattened_size", module.unflattened_size)
        return
    for name, content in vars(module).items():
        if name.startswith("_") or any(word in name for word in NOT_CHANNELS):
            continue
        if isinstance(module, HeadwiseAttention) and name != "num_heads":
            continue
        yield from _numbers(path, name, content)


def _numbers(path: str, name: str, content: Any) -> Iterator[tuple[Place, int]]:
    """Whole numbers in an attribute."""
    if type(content) in _NUMBERS:
        yield Place(path, name), content
    elif type(content) in (list, tuple) and len(content) <= _LONGEST:
        for index, one in enumerate(content):
            if type(one) in _NUMBERS:
                yield Place(path, name, index), one


@contextmanager
def tagged(model: nn.Module) -> Iterator[None]:
    """Tag the whole numbers among the attributes of all modules, for the duration."""
    before: list[tuple[nn.Module, str, Any]] = []
    for path, module in model.named_modules():
        for place, value in list(attributes(path, module)):
            content = vars(module)[place.name]
            if place.index is None:
                before.append((module, place.name, content))
                vars(module)[place.name] = Tagged(value, place)
            else:
                if place.index == 0 or not any(owner is module and name == place.name for owner, name, _ in before):
                    before.append((module, place.name, content))
                parts = list(content)
                parts[place.index] = Tagged(value, place)
                vars(module)[place.name] = type(content)(parts)
    try:
        yield
    finally:
        for module, name, content in before:
            vars(module)[name] = content


class SizeWatch(TorchFunctionMode):
    """Keeps the arguments of the running torch function, as they were written."""

    def __init__(self) -> None:
        super().__init__()
        self.name = ""
        self.sizes: list[int] = []
        self.first = 0
        """Dimension of the result that the first size belongs to."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Note the arguments, run the function, forget them."""
        before = (self.name, self.sizes, self.first)
        self.name = getattr(func, "__name__", "")
        leaves = tree_leaves((args[1:], kwargs or {}))
        self.sizes = [leaf for leaf in leaves if isinstance(leaf, int) and not isinstance(leaf, bool)]
        self.first = 0
        if self.name == "unflatten" and self.sizes:
            data = args[0]
            self.first = self.sizes[0] % data.ndim if isinstance(data, Tensor) else 0
            self.sizes = self.sizes[1:]
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.name, self.sizes, self.first = before

    def at(self, dim: int, ndim: int) -> int | None:
        """The size that was written for a dimension of a view; None where that cannot be told."""
        position = dim - self.first
        exact = self.name == "unflatten" or (self.name in {"view", "reshape"} and len(self.sizes) == ndim)
        return self.sizes[position] if exact and 0 <= position < len(self.sizes) else None

    def places(self, value: int) -> list[Place]:
        """Attributes that were written as they are, and equal a size."""
        return [one.place for one in self.sizes if isinstance(one, Tagged) and one == value]
