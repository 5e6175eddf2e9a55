"""Texts, models and specs with which the comparison runs both trees."""

import json
import random
from pathlib import Path
from typing import Any

STEPS = 10
PRECISIONS = ("float32", "bfloat16")
SWEEP = "equal"
CONCURRENT = 2
"""Number of runs that train at the same time; each spends most of its time starting processes, one by one."""

SPEC: dict[str, Any] = {
    "name": "alone",
    "storage": "runs",
    "seed": 5,
    "model": {"vocab_size": 320, "d_model": 32, "layers": 2, "attention_heads": 4, "d_ff": 48},
    "data": {
        "sources": {
            "web": {"path": "text/web", "weight": 0.7, "alpha": 0.5},
            "books": {"path": "text/books", "format": "text", "delimiter": "***", "weight": 0.3},
        },
        "schedule": [{"from_step": 6, "sources": {"web": {"weight": 0.4, "alpha": 1}, "books": {"weight": 0.6}}}],
        "prepared": "prepared",
        "seq_len": 32,
        "validation_fraction": 0.2,
        "validation_samples": 24,
    },
    "train": {
        "steps": STEPS,
        "micro_batches": 4,
        "micro_batch_size": 2,
        "lr": 0.003,
        "warmup_steps": 2,
        "validate_every": 5,
        # Every step has a checkpoint, so that the gradients of step 1 can be compared: the first moments in its
        # checkpoint are (1 - beta1) times these gradients.
        "checkpoint_every": 1,
    },
}

BEST_FIT = {"prepared": "prepared-best-fit", "packing": "best_fit", "tokenizer_model": "unigram"}
"""Keys of the section `data` by which the spec of the second prepared folder differs from `SPEC`."""

# `kernel` is never `auto`, because the choice of `auto` depends on the CPU and on the compilers of the machine.
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"model.kv_heads": 2},
    "sparse": {
        "model.moe": {"heads": 1, "experts": 8, "top_k": 2, "d_expert": 24, "kernel": "grouped"},
        "cluster": {"workers": 2, "ep": 2, "dispatch": "flat"},
    },
    "fine": {
        "model.moe": {
            **{"heads": 1, "experts": 16, "top_k": 4, "d_expert": 8, "d_shared": 16, "kernel": "reference"},
            **{"normalize_gates": True, "balance_choices": "all", "z_weight": 0.001},
        },
        "cluster": {"workers": 2, "strategy": "fsdp", "shard_experts": True},
    },
    "heads-2": {
        "model.moe": {
            **{"heads": 2, "experts": 8, "top_k": 2, "d_expert": 24, "kernel": "grouped"},
            **{"projection_layers": 2, "sub_token_residual": True},
        },
        "cluster": {"workers": 2, "ep": 2, "dispatch": "hierarchical"},
    },
    "heads-4": {
        # These experts are wide, so that by default part of their hidden rows is recomputed. No layer is dense.
        "model.moe": {"heads": 4, "experts": 8, "top_k": 2, "d_expert": 64, "every": 1, "kernel": "grouped"},
        "model.d_ff": None,
        "cluster": {"workers": 2, "strategy": "zero1"},
    },
    "first-paper": {
        "model.backbone": "subln",
        "model.dropout": 0.1,
        "model.attention_dropout": 0.1,
        "model.moe": {
            **{"heads": 2, "experts": 8, "top_k": 2, "d_expert": 24, "router": "xmoe_torchscale"},
            **{"capacity_factor": 1.0, "kernel": "capacity", "second_expert": "random", "jitter": 0.01},
        },
    },
    "xmoe": {
        "model.backbone": "subln",
        "model.moe": {
            **{"heads": 1, "experts": 8, "top_k": 2, "d_expert": 24, "router": "xmoe", "router_dim": 6},
            **{"capacity_factor": 1.25, "kernel": "grouped", "bias_rate": 0.01},
        },
    },
    "xmoe-heads-4": {
        "model.document_masks": True,
        "model.moe": {
            **{"heads": 4, "experts": 4, "top_k": 2, "d_expert": 12, "router": "xmoe", "kernel": "reference"},
        },
        "train.recompute": True,
        "cluster": {"workers": 2, "strategy": "zero3"},
        **{f"data.{key}": value for key, value in BEST_FIT.items()},
    },
    "static": {
        "model.tied_embeddings": False,
        "model.moe": {
            **{"heads": 2, "experts": 4, "top_k": 1, "d_expert": 24, "capacity_factor": 1.0, "kernel": "reference"},
        },
        "cluster": {"workers": 2, "strategy": "ddp"},
    },
}
"""Changes of `SPEC` for each model: new values by the paths of keys; a section such as `cluster` is replaced whole."""

LETTERS = "aeiouäönrstlmdkbgß"


def variant(model: str, precision: str) -> str:
    """Return the sweep's name for the variant of a model at a precision."""
    return f"{model}-{precision}"


def run_name(model: str, precision: str) -> str:
    """Return the id of a variant's run without the random end."""
    return f"{SWEEP}-{variant(model, precision)}-s0"


def write_project(folder: Path, models: list[str]) -> None:
    """Write raw text, two specs and a sweep of these models at all precisions into a folder, always the same files."""
    draw = random.Random(1)
    vocabulary = ["".join(draw.choices(LETTERS, k=draw.randint(2, 9))) for _ in range(150)]
    for name, count in (("a", 60), ("b", 25), ("c", 40)):
        lines = [json.dumps({"text": _document(draw, vocabulary)}, ensure_ascii=False) for _ in range(count)]
        _write(folder / "text" / "web" / name / "one.jsonl", "\n".join(lines) + "\n")
    for name in ("first", "second"):
        _write(
            folder / "text" / "books" / f"{name}.txt", "\n***\n".join(_document(draw, vocabulary) for _ in range(30))
        )
    # The files of specs may be JSON, because JSON is YAML.
    _write(folder / "spec.yaml", json.dumps(SPEC, indent=1))
    _write(folder / "best-fit.yaml", json.dumps({**SPEC, "data": {**SPEC["data"], **BEST_FIT}}, indent=1))
    runs = {variant(m, p): {"train.precision": p, **MODELS[m]} for m in models for p in PRECISIONS}
    sizes = {"tiny": {"spec": "spec.yaml"}}
    sweep = {"name": SWEEP, "sizes": sizes, "runs": runs, "concurrent": CONCURRENT}
    _write(folder / "sweep.yaml", json.dumps(sweep, indent=1))


def _document(draw: random.Random, vocabulary: list[str]) -> str:
    """Return a document of 20 to 90 random words of the vocabulary."""
    # Some words are much likelier than others, so that there is something to learn.
    words = [vocabulary[int(len(vocabulary) * draw.random() ** 3)] for _ in range(draw.randint(20, 90))]
    return " ".join(words)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
