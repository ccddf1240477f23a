"""Tensors in what networks take and return, in whatever it is packed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

#: What is not looked into. The parameters of a module that comes along are no outputs.
_CLOSED = (
    *(str, bytes, bytearray, memoryview, range, int, float, complex, type(None)),
    *(type, FunctionType, MethodType, ModuleType, nn.Module),
)


def tensors_in(nest: Any) -> list[Tensor]:
    """All tensors in a nest, in order.

    Looked into are tuples, lists, dictionaries and what else ``torch.utils._pytree`` knows; and of what it takes for
    leaves, mappings and sequences, such as subclasses of ``dict``, and the attributes of objects, such as dataclasses.
    One of these leaves that is met again is passed over.
    """
    seen: dict[int, Any] = {}  # holds the objects too: the id of one that is gone is given to another

    def walk(part: Any) -> Iterator[Tensor]:
        for leaf in tree_leaves(part):
            if isinstance(leaf, Tensor):
                yield leaf
            elif not isinstance(leaf, _CLOSED) and id(leaf) not in seen:
                seen[id(leaf)] = leaf
                yield from walk([*_contents(leaf), *_attributes(leaf)])

    return list(walk(nest))


def _contents(one: Any) -> list[Any]:
    """What a mapping or a sequence holds."""
    if isinstance(one, Mapping):
        return list(one.values())
    return list(one) if isinstance(one, Sequence) else []


def _attributes(one: Any) -> list[Any]:
    """What an object itself holds, with or without a ``__dict__``; properties are not computed."""
    found = dict(_own(one, "__dict__") or {})
    for kind in type(one).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            found.setdefault(name, _own(one, name))
    return list(found.values())


def _own(one: Any, name: str) -> Any:
    """An attribute, or None; ``__getattr__``, which may raise anything (``dict.__getitem__``), is not asked."""
    try:
        return object.__getattribute__(one, name)
    except AttributeError:
        return None
