"""Checks of `serve.vllm`, the arguments of vLLM's engine. This module imports vLLM only if it is installed."""

import difflib
from collections.abc import Mapping
from dataclasses import fields
from importlib.util import find_spec
from typing import Any

from mhmoe_ray.errors import ServeError
from mhmoe_ray.spec.hints import MIN_SIMILARITY

TOOL_PARSER = "tool_call_parser"
"""Key beside the engine's arguments: the parser of tool calls, as for the option of vLLM's own server."""
_RUN, _SEQ_LEN, _REPLICAS = "the deployed run gives it", "the run's data.seq_len", "serve.replicas"
_RANKS, _ENGINE = "serve.tensor_parallel", "nothing: the engine needs its own value"
OWNED = {
    **dict.fromkeys(("model", "model_weights", "tokenizer", "tokenizer_mode", "hf_config_path", "load_format"), _RUN),
    **dict.fromkeys(("served_model_name", "revision", "tokenizer_revision", "code_revision"), _RUN),
    **dict.fromkeys(("worker_extension_cls", "scheduler_cls", "scheduling_policy", "max_logprobs", "runner"), _ENGINE),
    **dict.fromkeys(
        (
            "skip_tokenizer_init",
            "convert",
            "disable_log_stats",
            "generation_config",
            "override_generation_config",
            "logprobs_mode",
        ),
        _ENGINE,
    ),
    **dict.fromkeys(("pipeline_parallel_size", "nnodes", "node_rank", "distributed_executor_backend"), _RANKS),
    **dict.fromkeys(("data_parallel_size", "data_parallel_rank", "data_parallel_size_local"), _REPLICAS),
    "max_model_len": _SEQ_LEN,
    "dtype": "serve.precision",
    "max_num_seqs": "serve.max_concurrency",
    "kv_cache_memory_bytes": "serve.cache_tokens",
    "tensor_parallel_size": _RANKS,
    "enable_expert_parallel": "serve.expert_parallel",
    "seed": "the field seed of requests",
    "stream_interval": "serve.stream_interval",
    **dict.fromkeys(("enable_lora", "max_loras", "max_cpu_loras", "lora_target_modules"), "serve.max_adapters"),
}
"""Arguments of vLLM's engine that a spec cannot set, each with what to use in its place."""


def check_options(options: Mapping[str, Any]) -> None:
    """Raise ServeError for an argument that is ours or, where vLLM is installed, for one that vLLM does not have."""
    for name in options:
        if name in OWNED:
            raise ServeError(f"serve.vllm.{name}", "this project sets it", f"leave it out; in its place: {OWNED[name]}")
    # The import takes seconds.
    if not options or find_spec("vllm") is None:
        return
    from vllm.engine.arg_utils import EngineArgs
    from vllm.tool_parsers import ToolParserManager

    known_names = {field.name for field in fields(EngineArgs)} - OWNED.keys() | {TOOL_PARSER}
    for name in options:
        _check_name(f"serve.vllm.{name}", "argument", name, known_names)
    if parser := options.get(TOOL_PARSER):
        known_parsers = {*ToolParserManager.tool_parsers, *ToolParserManager.lazy_parsers}
        _check_name(f"serve.vllm.{TOOL_PARSER}", "parser", str(parser), known_parsers)


def _check_name(subject: str, kind: str, name: str, known_names: set[str]) -> None:
    """Raise ServeError with the nearest name if vLLM does not know this one."""
    if name not in known_names:
        similar_names = difflib.get_close_matches(name, sorted(known_names), n=1, cutoff=MIN_SIMILARITY)
        fix = f"did you mean {similar_names[0]!r}?" if similar_names else "see vLLM's documentation"
        raise ServeError(subject, f"the installed vLLM has no {kind} {name!r}", fix)
