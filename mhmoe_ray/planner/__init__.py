"""Resolve a spec file into a complete spec, and compute what a run will cost, without building a model or using torch.

resolve.py      spec files with preset, size and match; presets by name
presets.py      presets in families of three sizes        papers.py       the papers' models
adapt.py        micro-batches, ep and sharding for GPUs   search.py       the fastest settings that fit, by estimate
match.py        expert width and count that match a reference model, and the comparison with it
sizes.py        parameters, multiply-adds, bytes     adapters.py     the same of an adapter
family.py       the part of a plan that differs between families, and that of decoders
placement.py    ranks on nodes, and expert-parallel groups
memory.py       bytes that a rank holds                   activations.py  bytes that layers keep for the backward
traffic.py      bytes that ranks exchange, by class of link
schema.py       JSON schemas of the files that users write
expert_step.py  FLOPs and bytes of a layer's experts      estimate.py     time per training step
kernels.py      the experts' kernel, and launches         remedies.py     keys that lower the memory of a rank
parts.py        names of the parts of a training step
"""
