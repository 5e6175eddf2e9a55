import json
from pathlib import Path

import pytest

from mhmoe_ray.errors import SpecError
from mhmoe_ray.spec import RunSpec, dump_spec, load_resolved_spec
from mhmoe_ray.spec.load import apply_overrides, read_tree
from mhmoe_ray.spec.raw_text import raw_text_sections

QUICKSTART = Path("jobs/quickstart.yaml")


def test_a_dumped_spec_reads_back_equal(tmp_path):
    spec = load_resolved_spec(QUICKSTART, ["train.lr=1e-3", "data.sources.multilingual.alpha=0.5", "cluster.ep=1"])
    (tmp_path / "spec.yaml").write_text(dump_spec(spec))
    assert load_resolved_spec(tmp_path / "spec.yaml") == spec
    assert spec.train.lr == 1e-3
    assert spec.cluster.mesh_sizes() == {"dp": 2, "ep": 1}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trian.steps=5", "unknown key 'trian'; did you mean 'train'?"),
        ("model.moe.topk=3", "unknown key 'model.moe.topk'; did you mean 'top_k'?"),
        ("data.sources.redpajama.wieght=2", "did you mean 'weight'?"),
        ("model.zzzz=1", "known keys here: backbone, encoder, vision, vocab_size"),
        ("train.lr=fast", "'train.lr': Input should be a valid number"),
        ("serve.port=70000", "'serve.port': Input should be less than or equal to 65535 (got 70000)"),
        ("model.moe.top_k=9", "top_k is 9, but there are only 8 experts"),
        ("cluster.workers=3", "workers (3) must be a multiple of ep (2)"),
        ("cluster.workers={min: 3, max: 4}", "workers (3) must be a multiple of ep (2)"),
        ("cluster.workers={min: 4, max: 2}", "'cluster.workers': min (4) is more than max (2)"),
        ("cluster.workers={min: 2, max: 6}", "train.micro_batches (2) must be a multiple of cluster.workers (6)"),
        ("cluster.workers={min: 2}", "'cluster.workers.max' is missing"),
        ("cluster.workers=0", "'cluster.workers.min': Input should be greater than 0 (got 0)"),
        ("cluster.strategy=zero3", "ZeRO 3 supports expert parallelism only in its own layers"),
        ("cluster.shard_experts=true", "shard_experts is for strategy fsdp, so it would be ignored with ddp"),
        ("train.micro_batches=3", "train.micro_batches (3) must be a multiple of cluster.workers (2)"),
        ("model.moe=null", "a dense model has no experts to spread"),
        ("data.sources.redpajama.alpha=0.5", "alpha would be ignored"),
        (
            "data.sources.redpajama.weight=-1",
            "'data.sources.redpajama.weight': Input should be greater than or equal to 0",
        ),
        ("data.sources.redpajama.weight=.inf", "finite number (got inf)"),
        ("train.lr=.inf", "'train.lr': Input should be a finite number"),
        ("serve.request_timeout=.inf", "'serve.request_timeout': Input should be a finite number"),
        ("train.betas=[1.5, 0.9]", "'train.betas.0': Input should be less than 1"),
        ("serve.keys=[{nam: a}]", "did you mean 'name'?"),
        (
            "data.sources.redpajama.shares={book: 0}",
            "'data.sources.redpajama.shares.book': Input should be greater than 0",
        ),
        ("data.sources.redpajama.max_epochs=0", "'data.sources.redpajama.max_epochs': Input should be greater than 0"),
        ("data.schedule=[{from_step: 0, sources: {redpajama: {}}}]", "'data.schedule.0.from_step'"),
        (
            "data.schedule=[{from_step: 5, sources: {redpajam: {weight: 1}}}]",
            "'redpajam', which is not a source; the sources are",
        ),
        ("data.schedule=[{from_step: 5, sources: {redpajama: {weigh: 1}}}]", "did you mean 'weight'?"),
        (
            "data.schedule=[{from_step: 5, sources: {redpajama: {alpha: 1, shares: {book: 1}}}}]",
            "alpha would be ignored",
        ),
        (
            "data.schedule=[{from_step: 5, sources: {redpajama: {weight: 0}, multilingual: {weight: 0}}}]",
            "every source has weight 0 from step 5 on",
        ),
        (
            "data.schedule=[{from_step: 5, sources: {redpajama: {}}}, {from_step: 5, sources: {redpajama: {}}}]",
            "schedule must be in the order of from_step, each step once, and has 5, 5",
        ),
        ("data.prepared=ftp://bucket/x", "path ftp://bucket/x: ftp:// is not known"),
        ("data.sources.redpajama.path=s3://KEY:SECRET@bucket/x", "path s3://...@bucket: it holds a password"),
        ("storage=s3://KEY:SECRET@bucket/x", "path s3://...@bucket: it holds a password"),
        ("storage=null", "'storage': it must be a path, s3://bucket/folder or gs://bucket/folder (got None)"),
        ("storage=5", "'storage': it must be a path, s3://bucket/folder or gs://bucket/folder (got 5)"),
        ("data.tokenizer_model=wordpiece", "'data.tokenizer_model': Input should be 'bpe' or 'unigram'"),
        ("data.tokenizer_pattern=gpt2", "tokenizer_pattern is for a given vocabulary in tiktoken's format"),
        ("model.moe.experts=7", "model.moe.experts (7) must be a multiple of cluster.ep (2)"),
        ("model.moe.kernel=triton", "model.moe.kernel triton needs CUDA, but cluster.gpus_per_worker is 0"),
        ("model.moe.kernel=capacity", "needs a limited expert capacity: set capacity_factor"),
        ("model.moe.kernel=cpp", "kernel cpp computes in bfloat16, but train.precision is float32: change one of them"),
        ("model.moe.every=9", "so none of the 4 layers has experts"),
        ("model.attention_heads=7", "must be a multiple of twice attention_heads (7)"),
        ("model.kv_heads=3", "must be a multiple of kv_heads"),
        ("serve.tensor_parallel=2", "engine torch is one process, so tensor_parallel would be ignored"),
        ("serve.expert_parallel=true", "expert_parallel divides experts among tensor_parallel ranks"),
        ("serve.gpus_per_replica=2", "gpus_per_replica is 2, but a replica uses 1"),
        ("tracking.mlflow=http://ann:SECRET@host:5000", "mlflow holds a user name, which everybody"),
        ("name.x=3", "name is a value, not a section"),
        ("train", "it is not key=value"),
        ("train.steps=[", "the value is not YAML"),
        ("train.min_lr=1", "min_lr 1.0 is above lr 0.003"),
    ],
)
def test_error_of_a_wrong_key_or_value_is_one_line_that_names_it(override, expected):
    with pytest.raises(SpecError) as caught:
        load_resolved_spec(QUICKSTART, [override])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["moe.kernel=capacity", "moe.capacity_factor=1"], "capacity holds all experts, but cluster.ep is 2"),
        (["moe.kernel=reference", "moe.recompute=0"], "kernel reference cannot recompute a share of routes"),
        (["moe.top_k=1", "moe.balance_choices=all"], "balance_choices: all would be ignored: there is only a first"),
        (["moe.kernel=cpp", "backbone=subln"], "kernel cpp computes experts of backbone llama only"),
        (
            ["moe.kernel=cpp", "moe.d_expert=191"],
            "kernel cpp takes widths that are multiples of 2, but rows are 64 wide and experts 191",
        ),
        (
            ["moe.kernel=triton", "d_model=4096"],
            "kernel triton takes rows up to 1024 wide, not 2048: set it to auto",
        ),
        (["moe.kernel=sonicmoe"], r"kernel.*sonicmoe is not offered until it has been measured on a GPU"),
        (["backbone=subln", "kv_heads=2"], "kv_heads: grouped queries are for the llama backbone"),
        (["moe.heads=5"], "d_model 128 does not split into 5 equal sub-tokens; or set moe.d_sub_token"),
        (["moe.d_sub_token=0"], r"moe\.d_sub_token': Input should be greater than 0 \(got 0\)"),
        (["moe.d_sub_token=wide"], r"moe\.d_sub_token': Input should be a valid integer"),
        (
            ["moe.d_sub_token=128", "moe.merge_projection=false"],
            r"moe.heads \(2\) times moe.d_sub_token \(128\) is not d_model \(128\), so head_projection and merge_proj",
        ),
        (["moe.heads=1", "moe.d_sub_token=64"], r"heads \(1\) times moe.d_sub_token \(64\) is not d_model \(128\)"),
        (
            ["moe.kernel=cpp", "moe.d_sub_token=65"],
            "kernel cpp takes widths that are multiples of 2, but rows are 65 wide",
        ),
        (["moe.kernel=triton", "moe.d_sub_token=1025"], "kernel triton takes rows up to 1024 wide, not 1025"),
    ],
)
def test_an_unusable_model_key_is_refused(overrides, reason):
    with pytest.raises(SpecError, match=reason) as caught:
        load_resolved_spec(QUICKSTART, [f"model.{override}" for override in overrides])
    assert "\n" not in str(caught.value)


def test_any_number_of_sub_tokens_is_possible_with_a_width_of_their_own():
    """If a projection is missing, the sub-tokens of a token must still be as wide together as the token."""
    model = load_resolved_spec(QUICKSTART, ["model.moe.heads=5", "model.moe.d_sub_token=30"]).model
    assert (model.row_width, model.joined_width) == (30, 150)
    default = ["model.moe.head_projection=false", "model.moe.d_sub_token=64"]
    assert load_resolved_spec(QUICKSTART, default).model.joined_width == model.d_model


def test_recomputation_was_a_flag_in_earlier_versions():
    for flag, recompute in (("true", "exchange"), ("false", "none")):
        assert load_resolved_spec(QUICKSTART, [f"train.recompute={flag}"]).train.recompute == recompute


def test_recomputation_of_experts_needs_experts_that_can_recompute():
    for overrides, reason in (
        (["model.moe=null", "cluster.ep=1", "model.d_ff=64"], "a dense model has none"),
        (["model.moe.kernel=reference"], "kernel reference keeps all hidden rows"),
    ):
        with pytest.raises(SpecError, match=reason):
            load_resolved_spec(QUICKSTART, ["train.recompute=experts", *overrides])


def test_a_value_that_another_section_overrides_is_refused():
    """The value is accepted if it equals the one that follows from the other section."""
    recomputing = ["train.recompute=true", "model.moe.kernel=grouped"]
    with pytest.raises(
        SpecError, match=r"is 0\.3, but with train\.recompute exchange and cluster\.ep 2 experts recompute"
    ):
        load_resolved_spec(QUICKSTART, [*recomputing, "model.moe.recompute=0.3"])
    load_resolved_spec(QUICKSTART, [*recomputing, "model.moe.recompute=1"])
    load_resolved_spec(QUICKSTART, [*recomputing, "model.moe.recompute=0.3", "cluster.ep=1"])
    load_resolved_spec(QUICKSTART, ["train.recompute=block", "model.moe.kernel=grouped", "model.moe.recompute=0.3"])
    sliced = ["cluster.strategy=fsdp", "cluster.shard_experts=true", "cluster.ep=1"]
    load_resolved_spec(QUICKSTART, sliced)
    with pytest.raises(SpecError, match="shard_experts is true, but a dense model has no experts to shard: set shard_"):
        load_resolved_spec(QUICKSTART, [*sliced, "model.moe=null"])


@pytest.mark.parametrize("override", ["model.dropout=0.1", "model.attention_dropout=0.1", "model.moe.jitter=0.1"])
def test_compiled_models_with_random_numbers_are_refused(override):
    """Reading such a spec succeeds, because an older run may have one; only `check_compilation` refuses it."""
    load_resolved_spec(QUICKSTART, ["train.compile=true"]).check_compilation()
    load_resolved_spec(QUICKSTART, [override]).check_compilation()
    spec = load_resolved_spec(QUICKSTART, ["train.compile=true", override])
    with pytest.raises(SpecError, match=r"train\.compile: it cannot compile random numbers .* train\.compile to false"):
        spec.check_compilation()


def test_a_kernel_for_cpus_is_refused_on_gpus():
    half = ["model.moe.kernel=cpp", "train.precision=bfloat16"]
    assert load_resolved_spec(QUICKSTART, half).model.recomputed_share == 1
    with pytest.raises(SpecError, match=r"kernel cpp is for CPUs, but cluster\.gpus_per_worker is 1"):
        load_resolved_spec(QUICKSTART, [*half, "cluster.gpus_per_worker=1"])


@pytest.mark.parametrize(("key", "value"), [("tokenizer_model", "bpe"), ("tokenizer_train_mb", "20")])
def test_keys_of_tokenizer_training_are_refused_with_a_given_tokenizer(tmp_path, key, value):
    """Values that are set are refused even if they equal the default. A dumped spec without them can be read again."""
    with pytest.raises(SpecError, match=f"so {key} would be ignored"):
        load_resolved_spec(QUICKSTART, ["data.tokenizer=t.json", f"data.{key}={value}"])
    spec = load_resolved_spec(QUICKSTART, ["data.tokenizer=t.json", "data.tokenizer_pattern=gpt2"])
    (tmp_path / "spec.yaml").write_text(dump_spec(spec))
    assert load_resolved_spec(tmp_path / "spec.yaml") == spec
    assert load_resolved_spec(QUICKSTART, [f"data.{key}={value}"]).data.train_mb == 20


def test_samples_longer_than_xpos_can_count_are_refused():
    assert load_resolved_spec(QUICKSTART, ["data.seq_len=40000"]).data.seq_len == 40_000
    load_resolved_spec(QUICKSTART, ["model.backbone=subln", "data.seq_len=32768"])
    with pytest.raises(SpecError, match=r"data\.seq_len is 40000, but beyond 32768 tokens subln's positions") as raised:
        load_resolved_spec(QUICKSTART, ["model.backbone=subln", "data.seq_len=40000"])
    assert "\n" not in str(raised.value)


def test_a_schedule_changes_a_mix_key_by_key():
    schedule = [
        {"from_step": 10, "sources": {"redpajama": {"weight": 0.5}}},
        {"from_step": 20, "sources": {"redpajama": {"alpha": 0.3}, "multilingual": {"shares": {"german": 1}}}},
        {"from_step": 30, "sources": {"redpajama": {"shares": {"arxiv": 1, "book": 1}}}},
    ]
    data = load_resolved_spec(QUICKSTART, [f"data.schedule={json.dumps(schedule)}"]).data
    mixes = {
        step: {name: mix.model_dump() for name, mix in current_mixes.items()}
        for step, current_mixes in data.mixes.items()
    }
    fixed = {"book": 0.5, "github": 0.3, "c4": 0.1, "stackexchange": 0.1}
    assert [current_mixes["redpajama"] for current_mixes in mixes.values()] == [
        {"weight": 0.8, "alpha": None, "shares": fixed},
        {"weight": 0.5, "alpha": None, "shares": fixed},
        {"weight": 0.5, "alpha": 0.3, "shares": None},
        {"weight": 0.5, "alpha": None, "shares": {"arxiv": 1, "book": 1}},
    ]
    assert mixes[10]["multilingual"] == {"weight": 0.2, "alpha": 0.7, "shares": None}
    assert (data.named_subfolders("redpajama"), data.named_subfolders("multilingual")) == (None, None)
    fixed_only = load_resolved_spec(QUICKSTART, [f"data.schedule={json.dumps([schedule[0], schedule[2]])}"]).data
    assert fixed_only.named_subfolders("redpajama") == ["arxiv", "book", "c4", "github", "stackexchange"]


def test_a_missing_key_is_named(tmp_path):
    lines = [line for line in QUICKSTART.read_text().splitlines() if not line.startswith("  steps: ")]
    (tmp_path / "spec.yaml").write_text("\n".join(lines))
    with pytest.raises(SpecError, match=r"'train\.steps' is missing"):
        load_resolved_spec(tmp_path / "spec.yaml")


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "No such file"), (b"\xff\xfe", "not UTF-8"), (b"a: [", "line 1: "), (b"- 1", "it is not a mapping")],
)
def test_a_file_that_is_no_spec_is_refused(tmp_path, content, expected):
    path = tmp_path / "spec.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SpecError, match=expected):
        load_resolved_spec(path)


def test_a_duplicate_key_is_refused_with_name_and_line(tmp_path):
    lines = QUICKSTART.read_text().splitlines()
    line_index = next(i for i, line in enumerate(lines) if line.startswith("  steps: "))
    path = tmp_path / "spec.yaml"
    path.write_text("\n".join([*lines[: line_index + 1], "  'steps': 7", *lines[line_index + 1 :]]))
    with pytest.raises(SpecError) as raised:
        load_resolved_spec(path)
    assert str(raised.value) == f"spec {path}: line {line_index + 2}: the key 'steps' is given twice; correct the YAML"


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("sources.english.format=chat", "unknown key 'sources'; known keys here: data, cluster"),
        ("datas.tokenizer=a.json", "unknown key 'datas'; did you mean 'data'?"),
        ("cluster.worker=2", "unknown key 'cluster.worker'; did you mean 'workers'?"),
        ("data.seqlen=2", "unknown key 'data.seqlen'; did you mean 'seq_len'?"),
        ("data.sources.english.formatt=chat", "unknown key 'data.sources.english.formatt'; did you mean 'format'?"),
    ],
)
def test_a_key_that_raw_text_does_not_have_is_refused(override, reason):
    with pytest.raises(SpecError) as error:
        raw_text_sections(["held-out/english"], [override])
    assert str(error.value) == f"text held-out/english: {reason}"


def test_an_override_names_a_source_with_dots_in_its_name():
    overrides = ["data.sources.answers.jsonl.format=chat", "data.sources.a.b.txt.max_epochs=2", "data.seq_len=3"]
    data, _ = raw_text_sections(["x/answers.jsonl", "a.b.txt", "answers"], overrides)
    assert list(data.sources) == ["answers.jsonl", "a.b.txt", "answers"]
    assert [source.format for source in data.sources.values()] == ["chat", None, None]
    assert (data.sources["a.b.txt"].max_epochs, data.seq_len) == (2, 3)
    tree = apply_overrides({"sources": {"a.jsonl": {"path": "x"}, "a": 1}}, ["sources.a.jsonl={path: y}"])
    assert tree == {"sources": {"a.jsonl": {"path": "y"}, "a": 1}}
    with pytest.raises(SpecError, match=r"data\.sources\.a\.jsonl\.path is a value, not a section"):
        raw_text_sections(["a.jsonl"], ["data.sources.a.jsonl.path.x=1"])


def test_a_merged_key_is_no_duplicate_key(tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text("a: &a {x: 1, y: 2}\nb: &b {<<: *a, x: 3}\nc: {<<: *b, z: 4}\n")
    tree = read_tree(path)
    assert tree["b"] == {"x": 3, "y": 2}
    assert tree["c"].keys() == {"x", "y", "z"}


def test_relative_paths_are_taken_from_the_given_folder():
    spec = load_resolved_spec(QUICKSTART).with_absolute_paths(Path("/base"))
    assert spec.storage == Path("/base/runs")
    assert spec.data.sources["redpajama"].path == "/base/data/sample/redpajama"


def test_some_limits_may_be_infinite():
    limits = ("train.clip_norm", "cluster.hang_seconds")
    spec = load_resolved_spec(QUICKSTART, [f"{key}=.inf" for key in limits])
    assert spec.train.clip_norm == spec.cluster.hang_seconds == float("inf")
    # Ray's tasks get the spec as JSON, which must keep infinities.
    assert RunSpec.model_validate_json(spec.model_dump_json()) == spec
    with pytest.raises(SpecError, match="greater than 0"):
        load_resolved_spec(QUICKSTART, ["train.clip_norm=.nan"])
