"""Hints for an unknown key in a spec: the key with this meaning or a similar spelling, or all known keys."""

import difflib
from collections.abc import Sequence

MIN_SIMILARITY = 0.7
"""Smallest difflib ratio at which a hint suggests a spelling; that of `trian` and `train` is 0.8."""

# For each key of a spec, the names that mean the same in Hugging Face's configurations and Trainer, Megatron-LM,
# axolotl, torchtitan, nanoGPT and litgpt, in lower case and with underscores. A name with dots counts in its section.
_FOREIGN_NAMES: dict[str, str] = {
    # Names that other tools use for the keys of the section `model`.
    "model.d_model": "hidden_size hidden_dim n_embd n_embed dim embed_dim embedding_dim model_dim d",
    "model.layers": "num_hidden_layers num_layers n_layer n_layers depth",
    "model.attention_heads": "num_attention_heads n_head n_heads num_heads attention_head_count",
    "model.kv_heads": "num_key_value_heads n_kv_heads num_kv_heads num_query_groups n_query_groups",
    "model.d_head": "head_dim kv_channels head_width head_size",
    "model.attention_bias": "qkv_bias add_qkv_bias use_qkv_bias",
    "model.qk_norm": "use_qk_norm qk_layernorm",
    "model.d_ff": "intermediate_size ffn_dim ffn_hidden_size mlp_dim feedforward_dim ffn_size",
    "model.tied_embeddings": "tie_word_embeddings tie_embeddings weight_tying untie_embeddings_and_output_weights",
    "model.norm_eps": "rms_norm_eps layer_norm_eps layernorm_epsilon layer_norm_epsilon",
    "model.rope_theta": "rotary_base rope_base rotary_emb_base",
    "model.rope_scaling": "rope_parameters yarn",
    "model.dropout": "hidden_dropout resid_dropout resid_pdrop hidden_dropout_prob",
    "model.attention_dropout": "attn_dropout attn_pdrop attention_probs_dropout_prob",
    "model.backbone": "model_type architecture architectures arch",
    "model.moe.heads": "moe_heads mh_heads num_moe_heads head_num "
    "model.moe.num_heads model.moe.n_heads model.moe.n_head",
    "model.moe.d_sub_token": "sub_token_size",
    "model.moe.experts": "num_experts n_experts num_local_experts n_routed_experts moe_num_experts expert_count",
    "model.moe.top_k": "num_experts_per_tok num_experts_per_token experts_per_token moe_topk moe_router_topk k",
    "model.moe.d_expert": "moe_intermediate_size expert_hidden_size moe_ffn_hidden_size expert_dim expert_size",
    "model.moe.d_shared": "n_shared_experts num_shared_experts shared_expert_intermediate_size",
    "model.moe.every": "moe_layer_freq moe_freq moe_layer_interval interleave_moe_layer_step decoder_sparse_step",
    "model.moe.dense_first": "first_k_dense_replace num_dense_layers",
    "model.moe.scoring": "scoring_func moe_router_score_function score_func router_activation",
    "model.moe.gate_scale": "routed_scaling_factor route_scale moe_router_topk_scaling_factor",
    "model.moe.groups": "n_group n_expert_groups num_expert_groups moe_router_num_groups",
    "model.moe.top_groups": "topk_group n_limited_groups num_limited_groups moe_router_group_topk",
    "model.moe.balance_weight": "router_aux_loss_coef aux_loss_coef aux_loss_weight load_balance_loss_weight",
    "model.moe.z_weight": "router_z_loss_coef z_loss_weight moe_z_loss_coeff z_loss_coef",
    "model.moe.capacity_factor": "expert_capacity moe_capacity_factor expert_capacity_factor capacity",
    "model.moe.jitter": "router_jitter_noise moe_input_jitter_eps jitter_noise",
    # Names that other tools use for the keys of the section `data`.
    "data.seq_len": "max_seq_len max_seq_length sequence_length sequence_len seq_length context_length block_size "
    "max_position_embeddings n_ctx n_positions max_length ctx_len",
    "data.sources": "datasets dataset dataset_name dataset_path train_data train_file data_path training_dataset "
    "data.path data.data_dir data.files",
    "data.tokenizer": "tokenizer_path tokenizer_name tokenizer_file tokenizer_name_or_path",
    "data.packing": "sample_packing pack pack_sequences",
    "data.chat_template": "chat_template_jinja chat_template_path chat_template_file",
    "data.validation_fraction": "val_set_size eval_fraction test_size val_fraction val_split validation_split",
    # Names that other tools use for the keys of the section `train`.
    "train.dpo.beta": "beta dpo_beta rl_beta",
    "train.steps": "max_steps num_steps train_steps training_steps total_steps max_iters iterations n_steps",
    "train.lr": "learning_rate max_lr peak_lr base_lr",
    "train.min_lr": "min_learning_rate final_lr lr_min",
    "train.schedule": "scheduler lr_scheduler lr_scheduler_type lr_schedule lr_decay_style decay_style",
    "train.decay_steps": "lr_decay_iters lr_wsd_decay_iters cooldown_steps num_decay_steps",
    "start.from": "load_from init_from model_name_or_path base_model pretrained_model from_pretrained finetune",
    "train.warmup_steps": "warmup lr_warmup_steps num_warmup_steps warmup_iters warmup_ratio",
    "train.micro_batch_size": "batch_size per_device_train_batch_size local_batch_size device_batch_size "
    "train_batch_size per_device_batch_size micro_batch",
    "train.micro_batches": "gradient_accumulation_steps global_batch_size grad_accum "
    "grad_accum_steps accumulation_steps accumulate",
    "train.clip_norm": "max_grad_norm max_norm grad_clip gradient_clipping clip_grad gradient_clip_val clip_grad_norm",
    "train.precision": "dtype mixed_precision bf16 fp16 torch_dtype mixed_precision_param amp",
    "train.recompute": "gradient_checkpointing activation_checkpointing activation_checkpoint recompute_granularity",
    "train.compile": "torch_compile compile_model",
    "train.betas": "adam_beta1 adam_beta2 beta1 beta2 adam_betas",
    "train.eps": "adam_epsilon adam_eps optimizer_eps",
    "train.weight_decay": "wd decay",
    "train.checkpoint_every": "save_steps save_interval save_every checkpoint_interval save_freq ckpt_every",
    "train.validate_every": "eval_steps eval_interval eval_every evaluation_interval validation_interval eval_freq",
    "train.keep_checkpoints": "save_total_limit keep_last_n keep_latest_k max_checkpoints",
    # Names that other tools use for the keys of the section `cluster`, and for keys of the top level and of `tracking`.
    "cluster.workers": "num_workers world_size num_processes nproc nproc_per_node num_gpus n_gpus num_nodes nodes",
    "cluster.gpus_per_worker": "use_gpu gpu gpus gpus_per_node num_gpus_per_worker",
    "cluster.cpus_per_worker": "cpus num_cpus",
    "cluster.ep": "expert_parallel expert_parallel_size expert_parallel_degree expert_model_parallel_size ep_size",
    "cluster.strategy": "fsdp deepspeed ddp zero parallelism distributed sharding_strategy",
    "cluster.max_failures": "max_restarts retries max_retries",
    "storage": "output_dir output_path out_dir dump_folder save_dir storage_path checkpoint_dir run_dir",
    "name": "run_name experiment_name job_name",
    "seed": "random_seed torch_seed train.seed data.seed",
    "tracking.mlflow": "mlflow_uri tracking_uri",
    "tracking": "report_to logger",
    "tracking.experiment": "wandb_project project",
    # Names that other tools use for the keys of the section `serve`.
    "serve.max_concurrency": "max_num_seqs max_batch_size",
    "serve.max_tokens": "max_new_tokens max_model_len",
    "serve.tensor_parallel": "tensor_parallel_size tp_size",
    "serve.replicas": "num_replicas",
    "serve.keys": "api_key api_keys",
}  # fmt: skip
_KEY_BY_NAME = {name: key for key, names in _FOREIGN_NAMES.items() for name in names.split()}

# Keys of other projects that have no counterpart in a spec, with the keys or commands to use instead.
_UNSUPPORTED = {
    **dict.fromkeys(
        ("num_train_epochs", "epochs", "num_epochs", "n_epochs", "max_epochs"),
        "training is counted in train.steps, and data.sources.NAME.max_epochs bounds how often a text is read",
    ),
    **dict.fromkeys(
        ("logging_steps", "log_every", "log_interval", "log_freq"), "metrics.jsonl has a line for every step"
    ),
    **dict.fromkeys(("optimizer", "optim", "optimizer_name"), "there is one optimizer, AdamW: train.betas, train.eps"),
    **dict.fromkeys(
        ("tensor_parallel_degree", "tensor_model_parallel_size", "pipeline_parallel_degree", "pp_size", "cp_size"),
        "training has data and expert parallelism only: set cluster.workers and cluster.ep",
    ),
    **dict.fromkeys(
        ("resume_from_checkpoint", "resume"),
        "continue a run with `mhmoe resume RUN`, or start a new one from it with start.from",
    ),
}


def key_hint(key: str, section: str, known_keys: Sequence[str]) -> str:
    """Return a hint for the last part `key` of an unknown dotted key; `section` is the rest and ends with a dot."""
    normalized_key = key.lower().replace("-", "_")
    if our_key := _KEY_BY_NAME.get(section + normalized_key) or _KEY_BY_NAME.get(normalized_key):
        return f"did you mean {(our_key.removeprefix(section) if our_key.startswith(section) else our_key)!r}?"
    if normalized_key in _UNSUPPORTED:
        return _UNSUPPORTED[normalized_key]
    if similar_keys := difflib.get_close_matches(normalized_key, known_keys, n=1, cutoff=MIN_SIMILARITY):
        return f"did you mean {similar_keys[0]!r}?"
    return f"known keys here: {', '.join(known_keys)}"
