"""README.md of an exported folder: the model card, with sizes, losses and examples of how to use the model."""

from mhmoe_ray.checkpoint.manifest import CheckpointManifest
from mhmoe_ray.planner.sizes import compute_sizes
from mhmoe_ray.runs import history
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.runs.metrics import LOSS, STEP, VAL_LOSS
from mhmoe_ray.runs.start import read_start
from mhmoe_ray.spec import ModelSpec

CARD = "README.md"


def build_card(run: RunDir, manifest: CheckpointManifest, model_type: str) -> str:
    """Return the text of the model card for an exported checkpoint; `model_type` is that of config.json."""
    rows = {**_model_rows(manifest.model), "context length": f"{manifest.seq_len:,} tokens"}
    rows |= _training_rows(run, manifest)
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    own_code = model_type == "mhmoe"
    # transformers reads config.json for the tokenizer too, and asks there whether to trust the code of the model.
    trust = ", trust_remote_code=True" if own_code else ""
    note = (
        "transformers has no such architecture, so the folder contains its code (`modeling_mhmoe.py`). "
        "With `pip install mhmoe-ray` and `import mhmoe_ray`, `trust_remote_code` is not needed.\n\n"
        if own_code
        else ""
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- {model_type}
- mhmoe-ray
---

# {run.id}

| | |
| --- | --- |
{table}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("."{trust})
model = AutoModelForCausalLM.from_pretrained("."{trust})
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
```

{note}`vllm serve FOLDER` serves it{" if mhmoe-ray is installed beside vLLM" if own_code else ""}, and
`mhmoe ckpt import FOLDER` makes it a run again.
"""


def _model_rows(model: ModelSpec) -> dict[str, str]:
    sizes, moe = compute_sizes(model), model.moe
    rows = {"parameters": f"{sizes.parameters:,}"}
    if moe is None:
        return {"architecture": f"dense decoder, backbone {model.backbone}", **rows}
    kind = f"MH-MoE with {moe.heads} heads" if moe.heads > 1 else "sparse mixture of experts"
    if moe.d_sub_token is not None:
        kind += f" and sub-tokens of width {moe.d_sub_token}"
    return {
        "architecture": f"{kind}, backbone {model.backbone}, router {moe.router}",
        **rows,
        "active parameters per token": f"{sizes.active_parameters:,}",
        "experts": f"{moe.experts} in each of {model.moe_layers} of {model.layers} layers, top-{moe.top_k}",
    }


def _training_rows(run: RunDir, manifest: CheckpointManifest) -> dict[str, str]:
    """Return the card's rows about training up to the checkpoint; for an imported model, its origin."""
    if run.is_imported:
        return {"origin": "imported"}
    lines = [line for line in history.read(run) if line[STEP] <= manifest.step]
    validation_losses = [line[VAL_LOSS] for line in lines if line.get(VAL_LOSS) is not None]
    rows = {"training": f"step {manifest.step:,}, {manifest.tokens:,} tokens"}
    if lines and lines[-1].get(LOSS) is not None:
        rows["training loss at that step"] = f"{lines[-1][LOSS]:.4f}"
    if validation_losses:
        rows["newest validation loss"] = f"{validation_losses[-1]:.4f}"
    if start_record := read_start(run):
        rows["start"] = "<br>".join(line.strip() for line in start_record.lines())
    return {**rows, "data": ", ".join(run.spec().data.sources)}
