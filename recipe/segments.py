"""What stands above what in a row in which examples share their starts, as `DataCollatorWithSharedPrefix` lays it out.

A run is what an example adds to the row. Above it stands what its example shares with earlier ones.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

Segments = tuple[tuple[int, int], ...]  # of each run: how many tokens its example shares with the one before, and adds
Slices = tuple[tuple[int, int], ...]  # first token and end of each


class Opaque:
    """The segments of a row as one value that `torch.compile` does not look into.

    It would make a graph for each number of runs, until it gives up.
    """

    def __init__(self, segments: Segments) -> None:
        self.segments = segments


def runs_of(segments: Segments, longest: int | None = None) -> list[tuple[int, int, Slices]]:
    """First token and end of each run, and what of the row stands above it; runs that are too long are cut.

    >>> runs_of(((0, 5), (2, 3), (4, 1)))
    [(0, 5, ()), (5, 8, ((0, 2),)), (8, 9, ((0, 2), (5, 7)))]
    >>> runs_of(((0, 5),), longest=3)
    [(0, 3, ()), (3, 5, ((0, 3),))]
    """
    runs, path, start = [], [], 0  # type: list[tuple[int, int, Slices]], list[tuple[int, int]], int
    for shared, length in segments:
        path = list(first_tokens(path, shared))
        stop = start + length
        for first in range(start, stop, longest or length):
            end = min(stop, first + (longest or length))
            runs.append((first, end, tuple(path)))
            begun = path.pop()[0] if path and path[-1][1] == first else first  # one slice, if they are neighbours
            path.append((begun, end))
        start = stop
    return runs


def first_tokens(slices: Iterable[tuple[int, int]], count: int) -> Slices:
    """The first `count` tokens of slices.

    >>> first_tokens(((0, 5), (8, 9)), 3)
    ((0, 3),)
    """
    kept: list[tuple[int, int]] = []
    for start, end in slices:
        if count <= 0:
            break
        kept.append((start, min(end, start + count)))
        count -= end - start
    return tuple(kept)


def runs_below(runs: list[tuple[int, int, Slices]]) -> dict[Slices, list[tuple[int, int]]]:
    """The runs that stand below the same tokens, by these tokens; those below none are there, too.

    >>> runs_below(runs_of(((0, 5), (2, 3), (2, 1))))
    {(): [(0, 5)], ((0, 2),): [(5, 8), (8, 9)]}
    """
    below: dict[Slices, list[tuple[int, int]]] = {}
    for start, end, above in runs:
        below.setdefault(above, []).append((start, end))
    return below


def tokens_of(slices: Iterable[tuple[int, int]]) -> torch.Tensor:
    return torch.cat([torch.arange(start, end) for start, end in slices])


def on_device(index: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on the device; the host does not wait for a GPU."""
    return index.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index.to(device)
