"""Measurements that only this project runs; `python -m tests.benchmarks --help` lists them.

What users measure on their own hardware is in mhmoe_ray/bench. Each benchmark measures its alternatives in interleaved
rounds (`mhmoe_ray.bench.timing`), and returns a `Results`.

__main__.py         the command line: options of each benchmark
harness.py          results of a benchmark, as a table or as JSON
adapter.py          training steps of adapters, beside TRL with PEFT
checkpoint.py       time that a checkpoint blocks training, and memory that it takes
commands.py         latency of the command line
ingest.py           from text to shards to micro-batches
process_memory.py   memory of a process and its descendants
dispatch/           flat and hierarchical dispatch between two nodes
"""
