"""Models with random weights to serve, because the speed does not depend on the text that they produce."""

import itertools
import string
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mhmoe_ray.bench.serve.engines import ContestModel
from mhmoe_ray.checkpoint.format import local_slice
from mhmoe_ray.checkpoint.huggingface.export import export
from mhmoe_ray.checkpoint.manifest import CheckpointManifest, checkpoint_name, commit, read_manifest
from mhmoe_ray.checkpoint.save import save_slices
from mhmoe_ray.data.tokenizer import END_OF_TEXT
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.init import init_weights
from mhmoe_ray.runs.directory import RunDir, mark_imported
from mhmoe_ray.spec import ModelSpec, MoESpec
from mhmoe_ray.storage import describe_file

VOCAB_SIZE = 8192


def plain_model(d_model: int, layers: int, experts: int, top_k: int, d_expert: int) -> ModelSpec:
    """Return the spec of a Mixtral model, which other packages implement too."""
    return ModelSpec(
        vocab_size=VOCAB_SIZE,
        d_model=d_model,
        layers=layers,
        attention_heads=max(1, d_model // 64),
        tied_embeddings=False,
        moe=MoESpec(heads=1, experts=experts, top_k=top_k, d_expert=d_expert, every=1, normalize_gates=top_k > 1),
    )


def write_run(model: ModelSpec, seq_len: int, run: Path) -> Path:
    """Write a run directory with one checkpoint of random weights, and return the checkpoint's path."""
    decoder = Decoder(model).requires_grad_(False)
    init_weights(decoder, seed=0)
    checkpoint = run / "checkpoints" / checkpoint_name(1, 1)
    (checkpoint / "weights").mkdir(parents=True)
    tokenizer = RunDir(run).tokenizer_file
    _build_tokenizer(model.vocab_size).save(str(tokenizer))
    entry = save_slices(
        checkpoint / "weights", {name: local_slice(t) for name, t in decoder.named_tensors().items()}, 0
    )
    [file] = (checkpoint / "weights").iterdir()
    manifest = CheckpointManifest(
        step=1,
        tokens=0,
        position=0,
        seed=0,
        world=1,
        ep=1,
        model=model,
        seq_len=seq_len,
        tokenizer_sha256=describe_file(tokenizer).sha256,
        data_sha256=None,
        files={str(file.relative_to(checkpoint)): entry},
    )
    commit(checkpoint, manifest)
    # The weights were not trained here, so the run counts as an imported one.
    mark_imported(RunDir(run))
    return checkpoint


def write_model(
    model: ModelSpec, seq_len: int, folder: Path, precision: str, threads: int, max_requests: int
) -> ContestModel:
    """Write a checkpoint with random weights into a new folder, and return it as a model to serve.

    A Mixtral model is also exported in Hugging Face's layout, which other packages read. They do not know the
    architecture of our multi-head models.
    """
    folder.mkdir()
    checkpoint = write_run(model, seq_len, folder / "bench-000000")
    if model.moe is not None and model.moe.heads == 1:
        export(checkpoint, read_manifest(checkpoint), folder / "exported")
    return ContestModel(checkpoint, folder / "exported", precision, threads, max_requests)


def _build_tokenizer(entries: int) -> Tokenizer:
    """Return a tokenizer whose vocabulary has `entries` entries: end of text, bytes, pairs and triples of letters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = ((a, b) for a, b in itertools.product(string.ascii_lowercase, repeat=2))
    triples = ((a + b, c) for a, b, c in itertools.product(string.ascii_lowercase, repeat=3))
    # Each merge adds one entry to the vocabulary. The other entries are the bytes and the end of text, so their number
    # is subtracted.
    merges = list(itertools.islice(itertools.chain(pairs, triples), entries - len(alphabet) - 1))
    vocab = {text: i for i, text in enumerate([END_OF_TEXT, *alphabet, *("".join(merge) for merge in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer
