"""Stand-ins for Ray that run tasks and datasets in this process, where each call and each operation on files is seen.

They serve to measure which functions of the project are called (`tests/walks.py`), and to number the operations of a
preparation that fail (`tests/faults/test_failpoints.py`). All other tests run on a real Ray.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from types import SimpleNamespace
from typing import Any
from unittest import mock

Row = dict[str, Any]
Block = Any
"""A block of a dataset: a table of Arrow, or a mapping from names to columns."""


class LocalDataset:
    """Stand-in for a Ray Dataset that computes its rows lazily in this process instead of in tasks on a cluster."""

    def __init__(self, blocks: Iterable[Block]) -> None:
        self._blocks = blocks
        self.context = SimpleNamespace()

    def map_batches(
        self,
        function: Callable[[Any], Any],
        *,
        batch_size: int | None = None,
        batch_format: str = "numpy",
        **_options: Any,
    ) -> "LocalDataset":
        def blocks() -> Iterator[Block]:
            for batch in self.iter_batches(batch_size=batch_size, batch_format=batch_format):
                result = function(batch)
                yield from result if isinstance(result, Iterator) else [result]

        return LocalDataset(blocks())

    def map(self, function: Callable[[Row], Row], **_options: Any) -> "LocalDataset":
        return LocalDataset({name: [value] for name, value in function(row).items()} for row in self.iter_rows())

    def repartition(self, *_arguments: Any, **_options: Any) -> "LocalDataset":
        return self

    def iter_rows(self) -> Iterator[Row]:
        for block in self._blocks:
            if isinstance(block, Mapping):
                yield from (dict(zip(block, row, strict=True)) for row in zip(*block.values(), strict=True))
            else:
                yield from block.to_pylist()

    def iter_batches(
        self, *, batch_size: int | None = None, batch_format: str = "numpy", **_options: Any
    ) -> Iterator[Block]:
        import numpy as np
        import pyarrow as pa

        rows = self.iter_rows()
        while batch := list(islice(rows, batch_size)):
            if batch_format == "pyarrow":
                yield pa.Table.from_pylist(batch)
            else:
                yield {name: np.array([row[name] for row in batch]) for name in batch[0]}


class LocalTask:
    """Stand-in for a remote function of Ray: `remote` calls the function in this process and returns its result."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def options(self, **_options: Any) -> "LocalTask":
        return self

    def remote(self, *arguments: Any, **keywords: Any) -> Any:
        return self._function(*arguments, **keywords)


@contextmanager
def ray_in_this_process() -> Iterator[None]:
    """Run remote functions of Ray and datasets of Ray Data in this process during the block, in the order of calls."""
    import ray
    import ray.data

    ray_remote = ray.remote
    # This call imports modules of Ray that define tasks, which have to be Ray's own. Therefore it comes before the
    # patch.
    ray.data.DataContext.get_current()

    def remote(*arguments: Any, **options: Any) -> Any:
        # Everything but a plain function stays with Ray: what `tests/walks.py` records calls no actor, and no task that
        # a module decorates with options when it is imported.
        is_task = len(arguments) == 1 and inspect.isfunction(arguments[0])
        return LocalTask(arguments[0]) if is_task else ray_remote(*arguments, **options)

    def from_arrow(tables: Any) -> LocalDataset:
        return LocalDataset(tables if isinstance(tables, list) else [tables])

    def from_items(rows: Sequence[Row], **_options: Any) -> LocalDataset:
        return LocalDataset({name: [value] for name, value in row.items()} for row in rows)

    def numbers(count: int, **_options: Any) -> LocalDataset:
        return LocalDataset({"id": [number]} for number in range(count))

    def cluster_resources() -> dict[str, float]:
        return {"CPU": 1.0}

    def result(reference: Any, **_options: Any) -> Any:
        return reference

    with (
        mock.patch.multiple(ray.data, from_arrow=from_arrow, from_items=from_items, range=numbers),
        mock.patch.multiple(ray, remote=remote, get=result, cluster_resources=cluster_resources),
    ):
        yield
