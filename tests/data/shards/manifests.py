"""Manifests of prepared folders without shards, for tests that only need counts."""

from mhmoe_ray.data.shards.manifest import Baselines, DataManifest, Domain

T = 16


def make_manifest(samples: dict[str, int], recipe: dict[str, object] | None = None) -> DataManifest:
    """Return a manifest of domains with these numbers of samples, each of T + 1 tokens, and without shards."""
    domains = {
        name: Domain(
            documents=n,
            validation_documents=1,
            quarantined={},
            dropped={},
            text_bytes=4 * n * T,
            tokens=n * T + 1,
            validation_tokens=T,
            samples=n,
            validation_samples=1,
            unused_tokens=0,
            padding=0,
            cut_documents=0,
            shards=[],
        )
        for name, n in samples.items()
    }
    empty_baselines = Baselines(unigram_entropy=0, bigram=0, bigram_tokens=0)
    return DataManifest(
        recipe=recipe or {},
        seq_len=T,
        token_bytes=2,
        tokenizer_sha256="",
        domains=domains,
        validation=[],
        validation_tokens=0,
        baselines=empty_baselines,
        bad_lines=0,
    )
