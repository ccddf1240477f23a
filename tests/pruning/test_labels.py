"""Label fields follow reshapes as the elements themselves do."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from prunegym.pruning.tracing.labels import LabelBook, along, lifted, reshaped, support

SIZES = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two shapes with the same number of elements: prime factors dealt out twice."""
    factors = draw(st.lists(st.sampled_from([2, 2, 3, 5]), min_size=0, max_size=4))

    def dealt(places: list[int], count: int) -> tuple[int, ...]:
        shape = [1] * count
        for factor, place in zip(factors, places, strict=True):
            shape[place % count] *= factor
        return tuple(shape)

    places = st.lists(st.integers(0, 9), min_size=len(factors), max_size=len(factors))
    return dealt(draw(places), draw(st.integers(1, 4))), dealt(draw(places), draw(st.integers(1, 4)))


@given(reshapes(), st.data())
def test_reshaped_field_labels_each_element_as_before(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], data: st.DataObject
) -> None:
    """Spelled out in full, the field is numpy's reshape of the old one spelled out in full."""
    old, new = shapes
    dim = data.draw(st.integers(0, len(old) - 1))
    field = along(np.arange(10, 10 + old[dim]), dim, len(old))

    moved = reshaped(field, old, new)

    assert (np.broadcast_to(moved, new) == np.broadcast_to(field, old).reshape(new)).all()


def test_flattened_channels_repeat_at_every_position() -> None:
    """``(B, 2, 3)`` flattened: each channel covers three columns."""
    moved = reshaped(along(np.array([7, 8]), 1, 3), (4, 2, 3), (4, 6))

    assert moved.tolist() == [[7, 7, 7, 8, 8, 8]]


def test_split_channels_vary_along_two_dimensions() -> None:
    """``(B, 4) -> (B, 2, 2)``: what rules recognise and freeze."""
    moved = reshaped(along(np.arange(4), 1, 2), (3, 4), (3, 2, 2))

    assert support(moved) == {1, 2}


def test_lifted_field_gains_leading_dimensions() -> None:
    """As broadcasting does."""
    assert lifted(along(np.arange(3), 0, 2), 4).shape == (1, 1, 3, 1)


def test_united_labels_share_a_representative() -> None:
    """Unions are transitive, whatever their order."""
    book = LabelBook()
    a, b, c = book.fresh(3), book.fresh(3), book.fresh(3)
    book.unite(b, c)
    book.unite(a, b)

    roots, _, _ = book.resolve()

    assert (roots[a] == roots[c]).all()
    assert len(set(roots[a].tolist())) == 3


def test_first_reason_of_a_frozen_channel_is_reported() -> None:
    """What happens later to a frozen channel is a consequence."""
    book = LabelBook()
    a, b = book.fresh(1), book.fresh(1)
    book.freeze(a, "first")
    book.freeze(b, "second")
    book.unite(a, b)

    roots, reasons, _ = book.resolve()

    assert reasons == {int(roots[a[0]]): "first"}


def test_empty_book_resolves() -> None:
    """A network without parameters has no labels."""
    roots, reasons, produced = LabelBook().resolve()

    assert (len(roots), len(reasons), len(produced)) == (0, 0, 0)
