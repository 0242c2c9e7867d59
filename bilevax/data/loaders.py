"""Iterables of batches, read on the host."""

from __future__ import annotations

from collections.abc import Iterable

from bilevax.base import PyTree


class Stream:
    """An iterable of batches, read on the host. One that can be iterated again starts over at its end."""

    def __init__(self, iterable: Iterable):
        self.iterable, self.iterator = iterable, iter(iterable)

    def next(self) -> PyTree:
        """The next batch; StopIteration when a one-pass iterator is at its end."""
        try:
            return next(self.iterator)
        except StopIteration:
            if self.iterator is self.iterable:
                raise
            self.iterator = iter(self.iterable)
            return next(self.iterator)


def peek(stream: Stream) -> PyTree:
    """The first batch of a stream, which is put back."""
    first = stream.next()
    rest = stream.iterator

    def again():
        yield first
        yield from rest

    stream.iterator = again()
    if stream.iterable is rest:  # a one-pass iterator stays one
        stream.iterable = stream.iterator
    return first
