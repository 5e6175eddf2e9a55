"""Acceptance test of the GPU code: checks and measurements on one GPU in half an hour, beside predictions.

    python3 -m mhmoe_ray.bench.acceptance --out jobs/gpu/acceptance

It needs torch 2.11 or newer with its Triton, and a few packages (`make gpu-wheels`), but no installation and no Ray.
Each part of the test runs in a process of its own with a time limit, and appends the results of each of its cases to
records.jsonl; report.md is written again after each part. A call ends within its `--budget`, with status 75 if
something is left, and the next call with the same folder continues. All calls together are meant to take half an hour;
the limits add up to 45 minutes. `--gpus 8` measures a node with 8 GPUs instead (part `node`). `--device cpu` rehearses
both at toy sizes, with Triton's interpreter and with gloo.

__main__.py       run parts in processes until the budget ends, and write the report
settings.py       sizes of a full run and of a rehearsal; what a part yields
goals.py          goals, published ratios, and the ceilings of predictions
accounting.py     kernels, bytes and FLOPs of operations, and of a layer, counted on fake tensors
compiled.py       the same of compiled code, from Inductor's scheduler
step_work.py      the same of a whole training step by its parts (`mhmoe bench count`)
ranks.py          process groups of one rank, and of several ranks in processes of their own
report.py         records as a page of Markdown, with a plot
predictions.py    part: predictions from counted work, which the report shows beside the results
compile.py        part: the kernels of later parts, compiled in parallel processes
ceilings.py       part: rates of the GPU, versions, limits
correctness.py    part: results of each expert kernel beside float64
steps.py          part: training steps beside those of a CPU
waits.py          part: waits of the host for the GPU, and CUDA kernels of a layer
layers.py         part: time and memory of layers
experts.py        part: time of expert kernels alone, on narrow and on wide rows
training.py       part: throughput of whole training steps
defaults.py       part: whole training steps with each default of GPUs on and off, and the update
state.py          part: pause of a checkpoint; forward passes over prompts and over single tokens
profiles.py       part: CUDA kernels of each layer by their time
node.py           part: exchange of rows, parallelism strategies and a killed worker on all GPUs of a node
"""
