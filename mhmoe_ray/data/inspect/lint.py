"""Lint rules, which find problems in training data from a survey of it; RULES lists one function for each rule."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from mhmoe_ray.data.domains import source_of, subfolder_of
from mhmoe_ray.data.family import data_of
from mhmoe_ray.data.inspect import textrules
from mhmoe_ray.data.inspect.figures import EXAMPLES, MAX_ASPECT_RATIO, Figures, Finding, histogram_bin
from mhmoe_ray.data.inspect.result import Survey
from mhmoe_ray.data.order.mixture import compute_mixture
from mhmoe_ray.data.prepare.chunks import QuarantineLimit
from mhmoe_ray.data.shards.manifest import DataManifest
from mhmoe_ray.data.sources import Reason, Tally, find_files
from mhmoe_ray.data.sources.find import list_files, subfolder_at
from mhmoe_ray.data.sources.storage import Storage
from mhmoe_ray.errors import DataError
from mhmoe_ray.spec import DataSpec, RunSpec

MAX_COPY_SHARE = 0.01
"""Largest share of a domain's documents that may be copies without a warning."""
MAX_IMAGE_SHARE = 0.1
"""Largest share of a domain's images that may be smaller than the model's input, or long and narrow, without a
warning."""
MIN_BYTES_PER_TOKEN = 1.5
"""Bytes of text per token below which a tokenizer spells a language out nearly byte by byte."""
MAX_UNKNOWN_SHARE = 0.001
"""Largest share of tokens that may be the unknown token without a warning."""
MIN_TOKENS = 1000
"""Tokens of a language from which lint rules judge a tokenizer."""
MAX_EPOCHS = 4
"""Epochs up to which repeated text is nearly as good as new text (Muennighoff et al. 2023, arXiv 2305.16264)."""


@dataclass
class Problem:
    """Problem of one domain or source that a lint rule found."""

    rule: str
    severe: bool
    """True for an error, False for a warning."""
    subject: str
    """Domain or source that has the problem."""
    message: str
    fix: str
    count: int
    """Number of documents, files or other items that have the problem."""
    examples: list[tuple[str, str]]
    """Locations, each with the evidence."""

    def as_json(self) -> dict[str, Any]:
        """Return the problem as `mhmoe data lint --json` prints it."""
        return {
            "rule": self.rule,
            "severe": self.severe,
            "where": self.subject,
            "says": self.message,
            "fix": self.fix,
            "count": self.count,
            "examples": self.examples,
        }


class LintInput(NamedTuple):
    """Input of the lint rules: a survey of raw text, and what is known of the run that reads the text."""

    survey: Survey
    data_spec: DataSpec
    spec: RunSpec | None
    """Spec of the run; None for raw text without a spec."""
    manifest: DataManifest | None
    """Manifest of the spec's prepared folder, if it exists."""
    samples_before: Mapping[str, int] = {}
    """Samples of each domain that earlier runs have read, whose order the run continues."""


def lint(inputs: LintInput) -> list[Problem]:
    """Apply all lint rules; return the errors, then the warnings, each in the order of RULES."""
    problems = [problem for rule in RULES for problem in rule(inputs)]
    return sorted(problems, key=lambda problem: not problem.severe)


def _find_unreadable_items(inputs: LintInput) -> Iterator[Problem]:
    """Yield a problem for each reason for unreadable items, as an error if they exceed what a preparation allows."""
    tally = Tally()
    for domain in inputs.survey.domains.values():
        bad_counts = Counter({Reason(reason): n for reason, n in domain.quarantined.items()})
        documents = domain.all_figures.documents
        tally += Tally(damaged=domain.damaged, documents=documents, bad=bad_counts, dropped=domain.dropped)
    is_limit_exceeded = QuarantineLimit(inputs.data_spec, []).is_exceeded(tally)
    fix = "repair or remove it"
    if is_limit_exceeded:
        fix += ", or raise data.max_bad_lines, max_bad_share or max_bad_files"
    for name, domain in inputs.survey.domains.items():
        for reason, count in sorted(domain.quarantined.items()):
            examples = _format_examples(domain.findings[reason])
            yield Problem("unreadable", is_limit_exceeded, name, reason, fix, count, examples)


def _find_damaged_texts(inputs: LintInput) -> Iterator[Problem]:
    for name, rule in textrules.RULES.items():
        for domain, survey in inputs.survey.domains.items():
            if finding := survey.findings.get(name):
                yield Problem(name, False, domain, rule.message, rule.fix, finding.count, _format_examples(finding))


def _format_examples(finding: Finding) -> list[tuple[str, str]]:
    return [(str(location), evidence) for location, evidence in finding.examples]


def _find_unread_files(inputs: LintInput) -> Iterator[Problem]:
    files = find_files(inputs.data_spec)
    read_paths = {path for file in files for path in file.stored_paths}
    formats = {source_of(file.domain): file.format for file in files}
    for name, source in inputs.data_spec.sources.items():
        # Folders of these formats usually have files that are not documents, so unread files in them are not reported.
        if formats[name] in ("redpajama-v2", "huggingface", "coco"):
            continue
        root, listed_files = list_files(Storage(source.path), inputs.data_spec.prepared)
        subfolders = inputs.data_spec.named_subfolders(name)
        unread_paths = [
            path
            for path, _ in listed_files
            if path not in read_paths and (subfolders is None or subfolder_at(root, path) in subfolders)
        ]
        if unread_paths:
            message = f"files that are not of format {formats[name]} are not read"
            fix = "move them elsewhere, or name the files by a pattern and their format"
            examples = [(path, "") for path in unread_paths[:EXAMPLES]]
            yield Problem("unread-files", False, name, message, fix, len(unread_paths), examples)


def _find_copies(inputs: LintInput) -> Iterator[Problem]:
    survey = inputs.survey
    for name, copies in survey.copies.domains.items():
        share = copies.extra / (copies.distinct + copies.extra)
        if share > MAX_COPY_SHARE:
            message, fix = f"over {MAX_COPY_SHARE:.0%} of its documents are copies of others in it", "keep one of each"
            yield Problem("copies", False, name, message, fix, copies.extra, [(name, f"{share:.1%} of its documents")])
        if copies.shared_texts > MAX_COPY_SHARE * copies.distinct:
            # The survey counts a pair under the names of its two domains in ascending order, so the names are sorted
            # here too.
            pairs = [sorted([name, other_name]) for other_name in survey.copies.domains]
            shared_counts = Counter({" and ".join(pair): survey.copies.pairs[", ".join(pair)] for pair in pairs})
            examples = [(pair, f"{n:,} texts in both") for pair, n in shared_counts.most_common(EXAMPLES) if n]
            message = f"over {MAX_COPY_SHARE:.0%} of its texts are in other domains too"
            fix = "keep each text in one domain, unless it should be read more often than the mixture says"
            yield Problem("shared-texts", False, name, message, fix, copies.shared_texts, examples)


def _find_small_domains(inputs: LintInput) -> Iterator[Problem]:
    """Yield a problem for each domain without a training sample, and a warning for each without validation."""
    if inputs.spec is None:
        return
    T = inputs.data_spec.seq_len
    message, fix = f"it does not fill one sample of {T:,} + 1 tokens", "add text, shorten data.seq_len or drop it"
    if _has_whole_documents(inputs):
        message, fix = "it has no document to train on", "add text, lower data.validation_fraction or drop it"
    for name, domain in inputs.survey.domains.items():
        figures = domain.all_figures
        tokens = f", {figures.tokens:,} tokens" if inputs.survey.tokenized else ""
        examples = [(name, f"{figures.documents:,} documents, {figures.bytes:,} bytes{tokens}")]
        if not _fills_sample(name, figures, inputs):
            # Without a fixed share, training leaves a domain that is too small out.
            is_severe = _has_fixed_share(name, inputs.spec)
            yield Problem("too-small", is_severe, name, message, fix, figures.documents, examples)
        # The preparation holds out something of a sole domain.
        if not figures.held_out and len(inputs.survey.domains) > 1:
            reason = "none of its documents is held out, so validation does not cover it"
            advice = "raise data.validation_fraction or add documents"
            yield Problem("no-validation", False, name, reason, advice, figures.documents, examples)


def _has_whole_documents(inputs: LintInput) -> bool:
    """Return whether one training document of any length is enough for a sample.

    With packing by best fit, padding fills up a sample. An encoder or a vision model never joins documents in a sample.
    """
    has_rows = inputs.spec is not None and data_of(inputs.spec.model).has_rows
    return has_rows or inputs.data_spec.packing == "best_fit"


def _fills_sample(name: str, figures: Figures, inputs: LintInput) -> bool:
    """Return whether a domain has a training sample by the manifest, or else by its tokens, or else by its bytes."""
    if inputs.manifest is not None and name in inputs.manifest.domains:
        return inputs.manifest.domains[name].samples > 0
    if _has_whole_documents(inputs):
        return figures.documents > figures.held_out
    # Without a tokenizer, the bytes are an upper limit of the tokens, because a token has at least one byte. Each
    # document adds a start token.
    return (figures.tokens if inputs.survey.tokenized else figures.bytes) + figures.documents > inputs.data_spec.seq_len


def _has_fixed_share(name: str, spec: RunSpec) -> bool:
    """Return whether the spec fixes the domain's share in some phase, so that training needs a sample of it."""
    phases = [mixes[source_of(name)] for step, mixes in spec.data.mixes.items() if step < spec.train.steps]
    return any(subfolder_of(name) in (phase.shares or ()) for phase in phases if phase.weight)


def _find_repeated_domains(inputs: LintInput) -> Iterator[Problem]:
    if inputs.spec is None or inputs.manifest is None:
        return
    try:
        mixture = compute_mixture(inputs.spec, inputs.manifest, inputs.samples_before)
    except DataError as e:
        yield Problem("mixture", True, e.subject, e.reason, e.fix, 1, [])
        return
    for domain, samples in zip(mixture.domains, mixture.samples_read(0, inputs.spec.train.steps), strict=True):
        epochs = samples / domain.samples
        if epochs > MAX_EPOCHS:
            message = f"training reads it more than {MAX_EPOCHS} times"
            fix = "set max_epochs, lower its share, or add text"
            examples = [(domain.name, f"{epochs:.1f} epochs of {domain.samples:,} samples")]
            yield Problem("epochs", False, domain.name, message, fix, 1, examples)


def _find_poor_tokenization(inputs: LintInput) -> Iterator[Problem]:
    fix = "use a tokenizer that knows this language, or train one with more of its text"
    for name, domain in inputs.survey.domains.items():
        for language, figures in sorted(domain.languages.items()):
            bytes_per_token, location = figures.bytes_per_token, f"{name} {language}".strip()
            if bytes_per_token is None or figures.tokens < MIN_TOKENS:
                continue
            if bytes_per_token < MIN_BYTES_PER_TOKEN:
                message = f"under {MIN_BYTES_PER_TOKEN} bytes of text per token"
                evidence = f"{bytes_per_token:.2f} bytes per token"
                yield Problem("fertility", False, name, message, fix, figures.documents, [(location, evidence)])
            if figures.unknown > MAX_UNKNOWN_SHARE * figures.tokens:
                message = f"over {MAX_UNKNOWN_SHARE:.1%} of its tokens are the tokenizer's unknown token"
                evidence = f"{figures.unknown / figures.tokens:.1%} of its tokens"
                yield Problem("unknown-tokens", False, name, message, fix, figures.documents, [(location, evidence)])


def _find_unsuitable_images(inputs: LintInput) -> Iterator[Problem]:
    for name, domain in inputs.survey.domains.items():
        figures = domain.all_figures.images
        max_count = MAX_IMAGE_SHARE * figures.images
        size = inputs.spec.image_size_of(source_of(name)) if inputs.spec else 0
        # Sides are counted in bins, whose width is at most a sixteenth of the smallest length in them. Images that are
        # only a little too small fall into the bin of `size` and do not count.
        small = sum(count for side, count in figures.sides.items() if side < histogram_bin(size))
        if small > max_count:
            message = f"over {MAX_IMAGE_SHARE:.0%} of its images are smaller than the model reads them"
            examples = [(name, f"{small / figures.images:.0%} have a side below {size:,} pixels")]
            fix = "use larger images, or lower image_size in the model section"
            yield Problem("small-images", False, name, message, fix, small, examples)
        if figures.extreme > max_count:
            shape = f"more than {MAX_ASPECT_RATIO:g} times as long as wide"
            message = f"over {MAX_IMAGE_SHARE:.0%} of its images are {shape}"
            examples = [(name, f"{figures.extreme / figures.images:.0%} of its images")]
            fix = "remove banners and strips: a square crop shows a small part of them"
            yield Problem("narrow-images", False, name, message, fix, figures.extreme, examples)


RULES: list[Callable[[LintInput], Iterator[Problem]]] = [
    _find_unreadable_items,
    _find_damaged_texts,
    _find_unread_files,
    _find_copies,
    _find_small_domains,
    _find_repeated_domains,
    _find_poor_tokenization,
    _find_unsuitable_images,
]
