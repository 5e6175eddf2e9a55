"""Use an exported folder as its users do, in an environment without this project's packages.

    python use_export.py FOLDER OUTPUT TASK_FOLDER

The script loads the model in transformers, generates text, evaluates the model with lm-eval, and trains it four times
for ten steps: with transformers' Trainer, with TRL's SFTTrainer, with LoRA, and as a reward model. It saves the model
of SFTTrainer in OUTPUT/tuned, and all results in OUTPUT/seen.pt.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

TOKENS = torch.randint(320, (2, 40), generator=torch.Generator().manual_seed(0))
PROMPTS = ["fox", "the quick brown fox jumps"]
TEXTS = ["the quick brown fox jumps over the lazy dog", "the dog sleeps"] * 20
TRUST = {"trust_remote_code": True}


def load(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, **TRUST, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


@torch.no_grad()
def generations(model, tokenizer):
    """Return 32 greedy tokens after each prompt, and check that neither cache, batch nor padding changes them."""
    options = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": None, "suppress_tokens": [1, 2]}
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
    answers = model.generate(**batch, **options)[:, -32:]
    assert torch.equal(answers, model.generate(**batch, **options, use_cache=False)[:, -32:])
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        single_answer = model.generate(**tokenizer(prompt, return_tensors="pt"), **options)[0, -32:]
        assert torch.equal(single_answer, answer), prompt
    return answers.tolist()


def training_arguments(arguments_class, output):
    return arguments_class(
        str(output), max_steps=10, per_device_train_batch_size=4, report_to="none", use_cpu=True, save_strategy="no"
    )


def train(folder, tokenizer, output):
    """Return the losses of ten steps with Trainer, SFTTrainer, LoRA and RewardTrainer; save the model of SFTTrainer."""
    # The tests import this module for its constants, in an environment without these packages.
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments
    from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    texts = Dataset.from_dict({"text": TEXTS})
    tokens = texts.map(lambda row: tokenizer(row["text"]), remove_columns=["text"])
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    arguments = training_arguments(TrainingArguments, output / "trainer")
    trainers = {"trainer": Trainer(load(folder), arguments, train_dataset=tokens, data_collator=collator)}
    for name, options in (("sft", {}), ("lora", {"peft_config": LoraConfig(target_modules="all-linear")})):
        arguments = training_arguments(SFTConfig, output / name)
        trainers[name] = SFTTrainer(
            load(folder), args=arguments, train_dataset=texts, processing_class=tokenizer, **options
        )
    pairs = Dataset.from_dict({"chosen": TEXTS, "rejected": TEXTS[::-1]})
    arguments = training_arguments(RewardConfig, output / "reward")
    reward_model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, **TRUST)
    trainers["reward"] = RewardTrainer(reward_model, arguments, train_dataset=pairs, processing_class=tokenizer)
    losses = {name: trainer.train().training_loss for name, trainer in trainers.items()}
    trainers["sft"].save_model(str(output / "tuned"))
    return losses


def evaluate(folder, task_folder):
    """Return the results of the task `choose` in lm-eval, by its class for models of transformers."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    evaluation = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "device": "cpu", **TRUST},
        tasks=["choose"],
        task_manager=TaskManager(include_path=str(task_folder)),
        bootstrap_iters=100,
    )
    return evaluation["results"]["choose"]


def main():
    folder, output, task_folder = map(Path, sys.argv[1:])
    tokenizer = AutoTokenizer.from_pretrained(folder, **TRUST)
    model = load(folder)
    with torch.no_grad():
        observations = {"version": transformers.__version__, "logits": model(TOKENS).logits}
    observations["answers"] = generations(model, tokenizer)
    observations["evaluation"] = evaluate(folder, task_folder)
    observations["losses"] = train(folder, tokenizer, output)
    assert not [name for name in sys.modules if name.split(".")[0] in ("mhmoe_ray", "mhmoe_kernels")]
    torch.save(observations, output / "seen.pt")
    print(json.dumps({name: observations[name] for name in ("version", "evaluation", "losses")}, default=str))


if __name__ == "__main__":
    main()
