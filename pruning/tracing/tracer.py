"""Watching a forward pass: every operation is seen, and the labels of its tensors are kept.

What an operation does to labels is not known here but in the rules (``rules.py``).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from prunegym.pruning.tracing.labels import Field, LabelBook, along, support
from prunegym.pruning.tracing.size_tags import Place, SizeWatch, Tagged, attributes

#: Operations that can place the same side by side for each example.
_REPEATING = ("expand", "repeat", "cat", "stack", "new_zeros", "new_ones", "new_full", "new_empty")


@dataclass
class TensorRecord:
    """What is known of a tensor: its label fields, or why it has none."""

    fields: list[Field]
    origin: str
    """What made the tensor, for the reason given when a channel meets it and cannot pass."""
    parameter: bool = False
    """True for parameters, buffers, and what is computed from them alone."""
    unread: list[tuple[Field, str]] = field(default_factory=list)
    """Labels that are frozen, and why, as soon as anything reads the tensor."""


@dataclass
class TracedOperation:
    """A convolution, linear layer or matrix product seen in the forward pass.

    Its cost for one example is ``repeats * outputs * fan_in`` multiply-accumulates, where ``fan_in`` is the
    number of input labels (times the kernel, inside ``repeats``), or a constant for grouped convolutions.
    """

    module: str
    kind: str
    weight: str | None
    bias: str | None
    inputs: NDArray[np.int64] | None
    """Labels of the input channels ``(C_in,)``; None where they cannot be pruned."""
    outputs: NDArray[np.int64] | None
    input_count: int
    """Input channels that each output reads (``C_in / groups``)."""
    output_count: int
    repeats: float
    """Multiply-accumulates per pair of input and output channel, for one example."""
    batch: tuple[NDArray[np.int64], ...] = ()
    """Labels of the rows or batches that the operation runs on (heads of attention); its cost shrinks with each."""
    reads: int = 1
    """Dimension of the weight that holds the input channels."""
    groups: int = 1
    output_shape: tuple[int, ...] = ()
    input_shape: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()


@dataclass
class ChannelPadding:
    """Zero channels that a module adds; its public attribute ``channel_padding`` is ``(before, after)``."""

    module: str
    before: NDArray[np.int64]
    after: NDArray[np.int64]


@dataclass
class SizeAttribute:
    """An attribute that holds a number of channels which ``forward`` uses: it must follow when channels go."""

    place: Place
    labels: Field
    """Labels of the dimension whose size it is; a product where the dimension is one of several."""
    axis: int


class Tracer(TorchDispatchMode):
    """Carries labels through every operation of one forward pass.

    Args:
        model: the network that will run.
        batch_size: examples that it will run on.
        rule_for: gives the rule of an ATen operation, or None.
    """

    def __init__(
        self, model: nn.Module, batch_size: int, rule_for: Callable[[Any], Callable[[Tracer, Call], None] | None]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rule_for = rule_for
        self.book = LabelBook()
        self.batch_size = batch_size
        self.operations: list[TracedOperation] = []
        self.paddings: list[ChannelPadding] = []
        self.sizes: list[SizeAttribute] = []
        self.watch = SizeWatch()
        self.after: Callable[[], None] = lambda: None
        """Called after every operation, when the labels of its results are known."""
        self.at_end: Callable[[list[Tensor]], None] = lambda _outputs: None
        """Called with the outputs of the network."""
        self.unknown: dict[str, str] = {}
        self.modules: list[tuple[str, nn.Module]] = [("", model)]
        self.tensors: dict[str, list[Field | None]] = {}
        self._names: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._records: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._outputs: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._copies: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._batched: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._reads: dict[int, int] = defaultdict(int)
        self._normalised: list[tuple[int, str]] = []
        self._norm_runs: Counter[str] = Counter()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            self._names[tensor] = name

    @property
    def module(self) -> str:
        """Path of the module that is running."""
        return self.modules[-1][0]

    def name_of(self, tensor: Tensor | None) -> str | None:
        """Name of a parameter or buffer; None for anything else."""
        return None if tensor is None else self._names.get(tensor)

    def weight_name(self, tensor: Tensor) -> str | None:
        """Name of a parameter, or of the one that a tensor is a copy of: those are weights that a reader can lose."""
        name: str | None = self._copies.get(tensor)
        return self.name_of(tensor) if isinstance(tensor, nn.Parameter) else name

    def note_copy(self, copy: Tensor, original: Tensor) -> None:
        """``copy`` holds the same in another precision or place, as under autocast."""
        name = self.weight_name(original)
        if name is not None:
            self._copies[copy] = name

    def record(self, tensor: Tensor) -> TensorRecord:
        """The labels of a tensor; parameters get theirs when first met."""
        known: TensorRecord | None = self._records.get(tensor)
        if known is not None:
            return known
        name = self.name_of(tensor)
        if name is None:
            return TensorRecord([], "a tensor made inside forward")
        labels = [self.book.fresh(size) if size > 1 else None for size in tensor.shape]
        self.tensors[name] = labels
        fields = [along(part, dim, tensor.ndim) for dim, part in enumerate(labels) if part is not None]
        return self.set(tensor, TensorRecord(fields, f"parameter {name}", parameter=True))

    def set(self, tensor: Tensor, record: TensorRecord) -> TensorRecord:
        """Note the labels of a tensor."""
        self._records[tensor] = record
        return record

    def note_input(self, tensor: Tensor) -> None:
        """``tensor`` is given to the network, with a part for each example."""
        self._batched[tensor] = True
        self.set(tensor, TensorRecord([], "the network input"))

    def examples(self, *tensors: Tensor) -> int:
        """How many examples share the cost of an operation on ``tensors``: one where none of them bears the batch."""
        return self.batch_size if any(tensor in self._batched for tensor in tensors) else 1

    def note_output(self, output: Tensor, operation: int) -> None:
        """``output`` is what an operation (by number) made."""
        self._outputs[output] = operation
        self._reads[operation] += 0

    def note_read(self, tensor: Tensor) -> None:
        """Something reads ``tensor``."""
        operation = self._outputs.get(tensor)
        if operation is not None:
            self._reads[operation] += 1
        known: TensorRecord | None = self._records.get(tensor)
        while known is not None and known.unread:
            self.book.freeze(*known.unread.pop())

    def freeze_unread(self) -> None:
        """Freeze what nothing reads, such as the outputs of an auxiliary head, which only training wants."""
        for operation, count in self._reads.items():
            outputs = self.operations[operation].outputs
            if not count and outputs is not None:
                self.book.freeze(outputs, "nothing reads these channels in evaluation mode")

    def note_normalisation(self, data: Tensor) -> None:
        """The running module normalises ``data``."""
        self._norm_runs[self.module] += 1
        operation = self._outputs.get(data)
        if operation is not None:
            self._normalised.append((operation, self.module))

    def folds(self) -> list[tuple[str, str]]:
        """Convolutions read by one batch normalisation and nothing else, both used once."""
        runs = Counter(one.module for one in self.operations)
        pairs = []
        for index, norm in self._normalised:
            one = self.operations[index]
            own = one.weight == f"{one.module}.weight"  # else computed in forward, such as a standardised one
            if own and self._reads[index] == 1 and runs[one.module] == 1 and self._norm_runs[norm] == 1:
                pairs.append((one.module, norm))
        return pairs

    def whole(self, field: Field, dim: int, reason: str) -> Field:
        """An operation needs a dimension whole: the field may not shrink along it.

        Returns:
            The field without that dimension: its labels there are united, or frozen where it has no other.
        """
        if field.shape[dim] == 1:
            return field
        first = field.take([0], axis=dim)
        if first.size == 1:
            self.book.freeze(field, reason)
        else:
            self.book.unite(field, first)
        return first

    def merged(self, one: Field, other: Field) -> Field:
        """Unite two fields of the same tensor element by element; what varies in one only is needed whole."""
        self.book.unite(one, other)
        for dim in range(one.ndim):
            if other.shape[dim] == 1:
                one = one.take([0], axis=dim)
        return one

    def note_sizes(self, field: Field, shape: tuple[int, ...]) -> None:
        """Attributes that a view took its sizes from, for the dimensions along which a field varies.

        The view fits the pruned network only if these follow.
        """
        for dim in support(field):
            written = self.watch.at(dim, len(shape))
            if written == -1:
                continue
            places = [written.place] if isinstance(written, Tagged) else self.places_of(shape[dim])
            self.sizes += [SizeAttribute(place, field, dim) for place in places]

    def places_of(self, size: int) -> list[Place]:
        """Attributes that a size may come from: as written in the running call, else those of equal value."""
        if size < 2:
            return []
        written = self.watch.places(size)
        if written:
            return written
        elsewhere = {one.place for one in self.watch.sizes if isinstance(one, Tagged)}
        path, module = self.modules[-1]
        return [place for place, value in attributes(path, module) if value == size and place not in elsewhere]

    def freeze(self, fields: list[Field], reason: str) -> None:
        """Freeze every label of some fields."""
        for one in fields:
            self.book.freeze(one, reason)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run the operation, then let its rule carry the labels over."""
        result = func(*args, **(kwargs or {}))
        self._carry(Call(func, args, kwargs or {}, result))
        self.after()
        return result

    def _note_batch(self, call: Call) -> None:
        """What is computed from the inputs bears the batch, and so may what repeats a constant as often."""
        tensors = call.tensors
        computed = any(tensor in self._batched for tensor in tensors)
        repeated = not tensors or call.name in _REPEATING
        for leaf in tree_leaves(call.result):
            if isinstance(leaf, Tensor):
                fits = repeated and any(size % max(1, self.batch_size) == 0 for size in leaf.shape)
                if computed or fits:
                    self._batched[leaf] = True

    def _carry(self, call: Call) -> None:
        """Let the rule of an operation carry the labels over."""
        for tensor in call.tensors:
            self.note_read(tensor)
        self._note_batch(call)
        rule = self._rule_for(call.func)
        place = f"{call.name} in {self.module or 'the network'}"
        if rule is None:
            self.unknown.setdefault(call.name, self.module)
            give_up(self, call, f"no rule for {place}")
            return
        try:
            rule(self, call)
        except Exception as fault:  # arguments that the rule was not made for must not stop the trace
            self.unknown.setdefault(call.name, self.module)
            give_up(self, call, f"the rule for {place} failed ({type(fault).__name__})")


@dataclass
class Call:
    """One operation with its arguments and result."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any

    @property
    def name(self) -> str:
        """Operation name without namespace or overload, such as ``convolution``."""
        return str(self.func._schema.name).removeprefix("aten::")

    @property
    def output(self) -> Tensor:
        """The first tensor of the result."""
        first = self.result[0] if isinstance(self.result, tuple | list) else self.result
        assert isinstance(first, Tensor)
        return first

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        """An argument by position or keyword."""
        return self.args[index] if index < len(self.args) else self.kwargs.get(name, default)


def give_up(tracer: Tracer, call: Call, reason: str) -> None:
    """Freeze what enters an operation that cannot be followed; what leaves it carries no labels."""
    parameter_only = True
    for tensor in call.tensors:
        record = tracer.record(tensor)
        parameter_only &= record.parameter
        tracer.freeze(record.fields, reason)
    for leaf in tree_leaves(call.result):
        if isinstance(leaf, Tensor) and tracer.name_of(leaf) is None:
            tracer.set(leaf, TensorRecord([], reason, parameter=parameter_only and bool(call.tensors)))
