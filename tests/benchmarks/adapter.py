"""Training steps of an adapter of a Mixtral-shaped model, beside those of TRL's trainer with PEFT."""

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from mhmoe_ray.bench.measure import peak_bytes
from mhmoe_ray.bench.timing import Hardware, time_interleaved
from mhmoe_ray.cli.formats import format_bytes, format_seconds
from mhmoe_ray.distributed.mesh import build_mesh
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.spec.adapter import ATTENTION_TARGETS
from mhmoe_ray.train.objectives import MicroBatch
from mhmoe_ray.train.step import Trainer
from tests.benchmarks.harness import Results

RANK, ALPHA = 8, 16


def adapter_spec(targets: list[str], seq_len: int, batch_size: int) -> RunSpec:
    """Return the spec of a small Mixtral with an adapter."""
    moe = {"heads": 1, "experts": 8, "top_k": 2, "d_expert": 512, "every": 1, "normalize_gates": True}
    sizes = {"vocab_size": 4096, "d_model": 256, "layers": 4, "attention_heads": 4, "kv_heads": 2}
    train = {"steps": 1, "micro_batches": 1, "micro_batch_size": batch_size}
    return RunSpec.model_validate(
        {
            "name": "adapter",
            "start": {"from": "base"},
            "model": {**sizes, "tied_embeddings": False, "moe": moe},
            "data": {"sources": {"web": {"path": "raw"}}, "prepared": "prepared", "seq_len": seq_len},
            "train": {**train, "adapter": {"rank": RANK, "alpha": ALPHA, "targets": targets}},
        }
    )


def our_step(spec: RunSpec, token_BT: torch.Tensor) -> Callable[[], object]:
    """Return a function that trains one step."""
    trainer = Trainer(spec, build_mesh(spec.cluster, ["node"], "cpu"), torch.device("cpu"))
    batch = MicroBatch(token_BT, torch.ones_like(token_BT[:, 1:], dtype=torch.bool))
    return lambda: trainer.update(trainer.accumulate([batch]))


def peer_step(spec: RunSpec, token_BT: torch.Tensor, folder: Path) -> Callable[[], object]:
    """Return a function that trains one step of TRL's trainer on the same sizes."""
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    model, moe, adapter = spec.model, spec.model.moe, spec.train.adapter
    assert moe is not None
    assert adapter is not None
    config = MixtralConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.d_model,
        intermediate_size=moe.d_expert,
        num_hidden_layers=model.layers,
        num_attention_heads=model.attention_heads,
        num_key_value_heads=model.n_kv_heads,
        num_local_experts=moe.experts,
        num_experts_per_tok=moe.top_k,
        output_router_logits=True,
    )
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if "experts" in adapter.targets else None
    projections = ["q_proj", "k_proj", "v_proj", "o_proj"]
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=projections, target_parameters=experts)
    vocabulary = {f"w{i}": i for i in range(model.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w0")), eos_token="w1", pad_token="w2"
    )
    arguments: dict[str, Any] = {"report_to": [], "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    trainer = SFTTrainer(
        model=MixtralForCausalLM(config),
        args=SFTConfig(
            str(folder), max_steps=1, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, **arguments
        ),
        train_dataset=Dataset.from_dict({"input_ids": token_BT.tolist()}),
        processing_class=tokenizer,
        peft_config=lora,
    )
    optimizer = trainer.create_optimizer()
    trainer.model.train()
    # TRL sets it at the start of `train`, which would also time its data loader.
    trainer.current_gradient_accumulation_steps = 1
    batch = {"input_ids": token_BT, "labels": token_BT, "attention_mask": torch.ones_like(token_BT)}

    def step() -> None:
        trainer.training_step(trainer.model, dict(batch))
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), spec.train.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(seq_len: int, batch_size: int, rounds: int, folder: Path, hardware: Hardware) -> Results:
    """Time steps of both in interleaved rounds, with adapters of attention, and of attention and experts."""
    rows, data = [], {**hardware.as_json(), "rounds": rounds}
    for name, targets in (("attention", []), ("attention and experts", ["experts"])):
        spec = adapter_spec([*ATTENTION_TARGETS, *targets], seq_len, batch_size)
        token_BT = torch.randint(spec.model.vocab_size, (batch_size, seq_len + 1))
        cases = {"ours": our_step(spec, token_BT), "TRL": peer_step(spec, token_BT, folder)}
        timings = time_interleaved(cases, rounds)
        peaks = {case: peak_bytes(step, hardware.device) for case, step in cases.items()}
        pairs = zip(timings["TRL"].seconds, timings["ours"].seconds, strict=True)
        ratio = median(peer_seconds / our_seconds for peer_seconds, our_seconds in pairs)
        data[name] = {"seconds": {case: t.seconds for case, t in timings.items()}, "peaks": peaks, "ratio": ratio}
        rows += [
            (name, case, format_seconds(timing.median), format_bytes(peaks[case]), f"{ratio:.2f}" * (case == "ours"))
            for case, timing in timings.items()
        ]
    title = f"{hardware}; {batch_size} x {seq_len} tokens, medians of {rounds} interleaved rounds"
    return Results(title, ("adapters of", "", "step", "memory beside the state", "speed to TRL's"), rows, data)
