"""Watching a forward pass function by function, so that two networks of one code can be compared place by place.

The unpruned and the pruned network run the same code, so the n-th function that a module calls in the one is the n-th
that it calls in the other: that is a :data:`Place`. Nothing is looked up by names of classes or modules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from prunegym.pruning.attention import headwise
from prunegym.pruning.modes import evaluating, operation_by_operation
from prunegym.pruning.recovery.reads import Read, read_of
from prunegym.pruning.task import Inputs, forward

Place = tuple[str, int]
"""The module that runs, and how many functions it has called before."""


@dataclass(frozen=True)
class WeightPart:
    """The part of a parameter that a call reads with: all of it, or some rows, as of a joint projection."""

    name: str
    first: int
    """Its first index along the parameter's first dimension."""


@dataclass(frozen=True)
class Call:
    """A function that a network calls."""

    place: Place
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tensors: list[Tensor]
    """The tensors among the arguments."""
    read: Read | None
    """What it reads with a parameter, if it does that."""
    part: WeightPart | None
    """Which parameter."""

    def run(self) -> Any:
        """Call the function."""
        return self.func(*self.args, **self.kwargs)


class Watch(TorchFunctionMode):
    """Sees every function that a network calls, from inside :meth:`running`.

    Args:
        model: the network.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.names = {id(tensor): name for name, tensor in model.named_parameters()}
        self._modules: list[str] = [""]
        self._calls: Counter[str] = Counter()

    def run(self, inputs: Inputs) -> Any:
        """Outputs of the network in evaluation mode, seen."""
        with evaluating(self.model), self.attached():
            return forward(self.forward, inputs)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Be ready to see runs; attention runs by heads, layer by layer."""
        with headwise(self.model), operation_by_operation(), self._placed():
            yield

    def forward(self, *inputs: Tensor) -> Any:
        """Outputs of the network in the mode it is in, seen; to be called when attached."""
        self._modules, self._calls = [""], Counter()
        with self:
            return self.model(*inputs)

    @contextmanager
    def _placed(self) -> Iterator[None]:
        """Know the module that runs."""
        with ExitStack() as stack:
            for path, module in self.model.named_modules():
                enter = module.register_forward_pre_hook(lambda *_, path=path: self._modules.append(path))
                leave = module.register_forward_hook(lambda *_: _none(self._modules.pop()), always_call=True)
                stack.callback(enter.remove)
                stack.callback(leave.remove)
            yield

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run a function, with :meth:`before` and :meth:`after` around it."""
        kwargs = kwargs or {}
        module = self._modules[-1]
        place = (module, self._calls[module])
        self._calls[module] += 1
        read = read_of(func, args, kwargs)
        part = None if read is None else self._part(read.weight)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        call = Call(place, func, args, kwargs, tensors, read if part else None, part)
        instead = self.before(call)
        result = call.run() if instead is None else instead()
        if isinstance(result, Tensor):
            self.after(call, result)
        return result

    def _part(self, weight: Tensor) -> WeightPart | None:
        """Which parameter a weight is, or is a view of the leading rows of; None if it is computed."""
        base = weight if weight._base is None else weight._base
        name = self.names.get(id(base))
        if name is None or weight.ndim != base.ndim:
            return None
        width = base.stride(0) or 1
        rows = weight.shape[1:] == base.shape[1:] and weight.stride() == base.stride()
        turned = weight.ndim == 2 and weight.shape == base.T.shape and weight.stride() == base.T.stride()
        if rows or turned:
            return WeightPart(name, 0 if turned else int(weight.storage_offset() - base.storage_offset()) // width)
        return None

    def before(self, call: Call) -> Callable[[], Tensor] | None:
        """Called before each function; what is returned is run in its place."""
        return None

    def after(self, call: Call, result: Tensor) -> None:
        """Called after each function that gives a tensor."""


def _none(_value: Any) -> None:
    """What a hook returns to leave the output as it is."""
