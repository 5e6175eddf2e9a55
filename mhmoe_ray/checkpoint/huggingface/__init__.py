"""Export of checkpoints to folders that other tools open as models, import of such folders, comparison of models.

adapters/               config.json of each architecture of transformers, from and to the `model` section of a spec
names.py                the table of tensor names, for both directions
foreign.py              counts of architectures that are planned but not imported
config.py               config.json with the adapter's keys and the `mhmoe` section
files.py                safetensors files, read and written one layer at a time
tokenizer.py            tokenizer.json and tokenizer_config.json for other tools
model_card.py           README.md of an exported folder
export.py               `mhmoe ckpt export`: write a checkpoint to such a folder
peft_config.py          adapter_config.json of adapters in PEFT's layout, and their bases
peft_layout.py          names and tensors of such adapters, read from a folder or encoded
peft_export.py          `mhmoe ckpt export` of a checkpoint with an adapter
imported_tokenizer.py   tokenizer and chat template of a folder that is imported
import_.py              `mhmoe ckpt import`: create a run directory with one checkpoint from such a folder
load.py                 load a model from such a folder, without an import
hub.py                  models of the Hugging Face hub as folders
compare.py              `mhmoe ckpt verify A B`: compare two models
configuration_mhmoe.py  the configuration of MH-MoE models in transformers; exports contain a copy
modeling_mhmoe.py       MH-MoE models in transformers; exports contain a copy
"""
