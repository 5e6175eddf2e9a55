"""Streams and runs whose prepared data is on an object store, beside the same data on the local disk.

The store is behind a link with latency (store_server.py). The cache of the node has room for all shards, or for a tenth
of them, and is empty at the start of each measurement.
"""

import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from mhmoe_ray.bench.processes import run_in_process
from mhmoe_ray.bench.run import measure_run
from mhmoe_ray.bench.timing import measure_rounds
from mhmoe_ray.data.shards.files import byte_columns, open_batch
from mhmoe_ray.data.shards.ranges import write_checks
from mhmoe_ray.data.shards.recipe import require_prepared_data
from mhmoe_ray.errors import SpecError
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.spec.cluster import ShardCacheSpec
from mhmoe_ray.storage import ObjectPath
from tests.benchmarks.harness import Results
from tests.benchmarks.ingest import stream_with_mhmoe
from tests.benchmarks.store_server import Link, store_server
from tests.support.s3 import CREDENTIALS

MEASUREMENTS = {"stream": stream_with_mhmoe, "run": measure_run}
CACHE_SHARES = {"disk": None, "store, all shards fit": 1.1, "store, a tenth fits": 0.1}
"""Size of the cache as a share of that of all shards; None for the local disk."""
COLUMNS = ("", "median", "speed to disk", "waits for data", "requests", "a second, at most", "bytes", "to bytes used")


def measure(
    spec: RunSpec, kinds: Sequence[str], rounds: int, processes: int, link: Link, report: Callable[[str], None]
) -> Results:
    """Measure the kinds of `MEASUREMENTS` on a spec's prepared data, which must be on the local disk, and on a store.

    Each process that is measured has `processes` logical CPUs.
    """
    manifest, prepared = require_prepared_data(spec), spec.data.prepared
    if isinstance(prepared, ObjectPath):
        raise SpecError("benchmark store", f"data.prepared is {prepared}", "name a local folder")
    # A run reads each sample once before it reads any twice.
    used_bytes = spec.train.steps * spec.samples_per_step * (spec.data.seq_len + 1) * manifest.token_bytes
    with tempfile.TemporaryDirectory(prefix="mhmoe-bench-") as bucket, store_server(Path(bucket), link) as store:
        shutil.copytree(prepared, Path(bucket) / "prepared")
        for shard in manifest.shards:
            path = Path(bucket) / "prepared" / shard.file
            write_checks(path, byte_columns(open_batch(path)))

        def measure_case(case: tuple[str, str], number: int) -> dict[str, Any]:
            (kind, source), data, cluster = case, spec.data, spec.cluster
            if (share := CACHE_SHARES[source]) is not None:
                data = data.model_copy(update={"prepared": ObjectPath(f"s3://bucket/prepared?{store.query}")})
                cache = ShardCacheSpec(size_gb=share * manifest.shard_bytes / 1e9)
                cluster = cluster.model_copy(update={"shard_cache": cache})
            case_spec = spec.model_copy(update={"data": data, "cluster": cluster})
            store.take_counts()
            with tempfile.TemporaryDirectory(prefix="mhmoe-bench-") as cache_home:
                variables = {**CREDENTIALS, "XDG_CACHE_HOME": cache_home}
                result = run_in_process(MEASUREMENTS[kind], case_spec, processes, f"store, {kind}", **variables)
            report(f"round {number + 1}: {kind} from {source} took {result['seconds']:.1f} s")
            return result | store.take_counts()

        results_by_case = measure_rounds(product(kinds, CACHE_SHARES), rounds, measure_case)
    rows = []
    for (kind, source), results in results_by_case.items():
        rounds_of_disk = zip(results_by_case[kind, "disk"], results, strict=True)
        speed = statistics.median(disk_result["seconds"] / result["seconds"] for disk_result, result in rounds_of_disk)
        row = [f"{kind}, {source}", f"{statistics.median(r['seconds'] for r in results):.1f} s", f"{speed:.3f}"]
        row.append(f"{max(r['data_wait'] for r in results):.2%}" if kind == "run" else "")
        if source != "disk":
            requests, peak, size = (max(r[key] for r in results) for key in ("requests", "peak", "bytes"))
            row += [f"{requests:,}", f"{peak:,}", f"{size:,}", f"{size / used_bytes:.3f}"]
        rows.append(row + [""] * (len(COLUMNS) - len(row)))
    title = (
        f"{spec.train.steps:,} steps that use {used_bytes:,} bytes, {manifest.shard_bytes:,} bytes of shards; latency "
        f"{1e3 * link.latency:.0f} ms, {link.rate / 1e6:.0f} MB/s, {processes} processes; {rounds} rounds in turn"
    )
    figures = {f"{kind}, {source}": results for (kind, source), results in results_by_case.items()}
    return Results(title, COLUMNS, rows, {"used_bytes": used_bytes, "figures": figures})
