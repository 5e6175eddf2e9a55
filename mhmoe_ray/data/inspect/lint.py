"""Lint rules: problems in the data of a spec, found from a survey of it; one function a rule, registered in RULES."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from mhmoe_ray.data.domains import source_of, subfolder_of
from mhmoe_ray.data.inspect import textrules
from mhmoe_ray.data.inspect.figures import EXAMPLES, DomainSurvey, Finding
from mhmoe_ray.data.inspect.result import Survey
from mhmoe_ray.data.order.mixture import mixture
from mhmoe_ray.data.prepare.chunks import Limit
from mhmoe_ray.data.shards.manifest import DataManifest
from mhmoe_ray.data.sources import Reason, Tally, find_files
from mhmoe_ray.data.sources.find import list_files, subfolder_at
from mhmoe_ray.data.sources.storage import Storage
from mhmoe_ray.errors import DataError
from mhmoe_ray.spec import DataSpec, RunSpec

COPIES = 0.01
"""Largest share of a domain's documents that may be copies without a warning."""
BYTES_PER_TOKEN = 1.5
"""Bytes of text per token below which a tokenizer spells a language out nearly byte by byte."""
UNKNOWN = 0.001
"""Largest share of tokens that may be the unknown token without a warning."""
TOKENS = 1000
"""Smallest number of tokens from which a tokenizer is judged."""
EPOCHS = 4
"""Number of epochs up to which repeated text is nearly as good as new text (Muennighoff et al. 2023, arXiv
2305.16264)."""


@dataclass
class Problem:
    rule: str
    severe: bool
    """Whether this is an error; else it is a warning."""
    where: str
    """Domain or source that has the problem."""
    says: str
    fix: str
    count: int
    """Number of documents, files or other things that the message counts."""
    examples: list[tuple[str, str]]
    """Some examples: the place, and what was seen there."""


class Data(NamedTuple):
    survey: Survey
    data: DataSpec
    spec: RunSpec | None
    """The run's spec; None for raw text that no spec trains on."""
    manifest: DataManifest | None
    """Manifest of the spec's prepared folder; None if there is none."""


def lint(data: Data) -> list[Problem]:
    """Return all problems: errors first, then by rule in the order of RULES."""
    found = [problem for rule in RULES for problem in rule(data)]
    return sorted(found, key=lambda problem: not problem.severe)


def _unreadable(data: Data) -> Iterator[Problem]:
    tally = Tally()
    for domain in data.survey.domains.values():
        bad = Counter({Reason(reason): n for reason, n in domain.quarantined.items()})
        documents = domain.whole.documents
        tally += Tally(damaged=domain.damaged, documents=documents, bad=bad, dropped=domain.dropped)
    stops = Limit(data.data, []).exceeded(tally)
    fix = "mend or remove it" + (", or raise data.max_bad_lines, max_bad_share or max_bad_files" if stops else "")
    for name, domain in data.survey.domains.items():
        for reason, count in sorted(domain.quarantined.items()):
            yield Problem("unreadable", stops, name, reason, fix, count, _seen(domain.findings[reason]))


def _texts(data: Data) -> Iterator[Problem]:
    for name, rule in textrules.RULES.items():
        for domain, survey in data.survey.domains.items():
            if found := survey.findings.get(name):
                yield Problem(name, False, domain, rule.says, rule.fix, found.count, _seen(found))


def _seen(finding: Finding) -> list[tuple[str, str]]:
    return [(str(place), saw) for place, saw in finding.examples]


def _unread_files(data: Data) -> Iterator[Problem]:
    files = find_files(data.data)
    read = {file.path for file in files}
    formats = {source_of(file.domain): file.format for file in files}
    for name, source in data.data.sources.items():
        if formats[name] in ("redpajama-v2", "huggingface"):  # these have other files beside them
            continue
        root, listed = list_files(Storage(source.path), data.data.prepared)
        chosen = data.data.subfolders(name)
        left = [path for path, _ in listed if path not in read]
        if chosen is not None:
            left = [path for path in left if subfolder_at(root, path) in chosen]
        if left:
            says = f"files that are not of format {formats[name]} are not read"
            fix = "move them elsewhere, or name the files by a pattern and their format"
            yield Problem("unread-files", False, name, says, fix, len(left), [(path, "") for path in left[:EXAMPLES]])


def _copies(data: Data) -> Iterator[Problem]:
    survey = data.survey
    for name, copies in survey.copies.domains.items():
        share = copies.extra / (copies.distinct + copies.extra)
        if share > COPIES:
            says, fix = f"over {COPIES:.0%} of its documents are copies of others in it", "leave one of each"
            yield Problem("copies", False, name, says, fix, copies.extra, [(name, f"{share:.1%} of its documents")])
        if copies.elsewhere > COPIES * copies.distinct:
            pairs = [sorted([name, other]) for other in survey.copies.domains]
            shared = Counter({" and ".join(pair): survey.copies.pairs[", ".join(pair)] for pair in pairs})
            mine = [(pair, f"{n:,} texts in both") for pair, n in shared.most_common(EXAMPLES) if n]
            says = f"over {COPIES:.0%} of its texts are in other domains too"
            fix = "keep each in one, or mean it: they are read more often than the mixture says"
            yield Problem("shared-texts", False, name, says, fix, copies.elsewhere, mine)


def _too_small(data: Data) -> Iterator[Problem]:
    if data.spec is None:
        return
    T = data.data.seq_len
    says, fix = f"it does not fill one sample of {T:,} + 1 tokens", "add text, shorten data.seq_len or drop it"
    if data.data.packing == "best_fit":
        says, fix = "it has no document to train on", "add text, lower data.validation_fraction or drop it"
    for name, domain in data.survey.domains.items():
        if not _fills_a_sample(name, domain, data):
            where = [(name, _size(domain, data))]
            yield Problem("too-small", _is_named(name, data.spec), name, says, fix, domain.whole.documents, where)
        if not domain.whole.held_out:
            says = "none of its documents is held out, so that validation says nothing of it"
            fix = "raise data.validation_fraction or add documents"
            where = [(name, _size(domain, data))]
            yield Problem("no-validation", False, name, says, fix, domain.whole.documents, where)


def _fills_a_sample(name: str, domain: DomainSurvey, data: Data) -> bool:
    """Return whether a domain has at least one training sample.

    If the manifest has the domain, its number of samples decides. Otherwise the number of tokens does, or, without a
    tokenizer, the number of bytes, which is at least as high. With best-fit packing one training document is enough,
    since padding fills the rest of its sample.
    """
    if data.manifest is not None and name in data.manifest.domains:
        return data.manifest.domains[name].samples > 0
    whole = domain.whole
    if data.data.packing == "best_fit":
        return whole.documents > whole.held_out
    return (whole.tokens if data.survey.tokenized else whole.bytes) + whole.documents > data.data.seq_len


def _is_named(name: str, spec: RunSpec) -> bool:
    """Return whether the shares of some phase name the domain; if so, training is impossible while it has no sample."""
    phases = [mixes[source_of(name)] for step, mixes in spec.data.mixes.items() if step < spec.train.steps]
    return any(subfolder_of(name) in (phase.shares or ()) for phase in phases if phase.weight)


def _size(domain: DomainSurvey, data: Data) -> str:
    whole = domain.whole
    tokens = f", {whole.tokens:,} tokens" if data.survey.tokenized else ""
    return f"{whole.documents:,} documents, {whole.bytes:,} bytes{tokens}"


def _epochs(data: Data) -> Iterator[Problem]:
    if data.spec is None or data.manifest is None:
        return
    try:
        mixed = mixture(data.spec, data.manifest)
    except DataError as e:
        yield Problem("mixture", True, e.what, e.why, e.fix, 1, [])
        return
    for domain, samples in zip(mixed.domains, mixed.read(0, data.spec.train.steps), strict=True):
        epochs = samples / domain.samples
        if epochs > EPOCHS:
            says, fix = f"training reads it more than {EPOCHS} times", "set max_epochs, lower its share, or add text"
            seen = [(domain.name, f"{epochs:.1f} epochs of {domain.samples:,} samples")]
            yield Problem("epochs", False, domain.name, says, fix, 1, seen)


def _fertility(data: Data) -> Iterator[Problem]:
    fix = "take a tokenizer that knows this language, or train one with more of its text"
    for name, domain in data.survey.domains.items():
        for language, figures in sorted(domain.languages.items()):
            per_token, where = figures.bytes_per_token, f"{name} {language}".strip()
            if per_token is None or figures.tokens < TOKENS:
                continue
            if per_token < BYTES_PER_TOKEN:
                says, seen = f"under {BYTES_PER_TOKEN} bytes of text per token", f"{per_token:.2f} bytes per token"
                yield Problem("fertility", False, name, says, fix, figures.documents, [(where, seen)])
            if figures.unknown > UNKNOWN * figures.tokens:
                says = f"over {UNKNOWN:.1%} of its tokens are the tokenizer's unknown token"
                seen = f"{figures.unknown / figures.tokens:.1%} of its tokens"
                yield Problem("unknown-tokens", False, name, says, fix, figures.documents, [(where, seen)])


RULES: list[Callable[[Data], Iterator[Problem]]] = [
    _unreadable,
    _texts,
    _unread_files,
    _copies,
    _too_small,
    _epochs,
    _fertility,
]
