"""Verdicts on variants: whether their losses are better than, worse than or equal to those of a baseline."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from mhmoe_ray.report.seeds import CONFIDENCE, MARGIN, MAX_SEEDS, POWER, SeedValues, correct_for_number
from mhmoe_ray.report.variants import Variant, losses_at
from mhmoe_ray.runs import metrics


class Verdict(NamedTuple):
    """Difference of mean validation losses at a step, variant minus baseline, in nats per token unless summed.

    Fields are None with one seed, which gives no interval.
    """

    baseline: str
    variant: str
    step: int
    difference: float
    low: float | None
    """Lower end of the confidence interval of the difference (`SeedValues.test`)."""
    high: float | None
    seeds: int
    """Number of seeds of the variant that has fewer of them."""
    paired: bool
    """Whether differences were taken seed by seed, over the seeds that both variants have."""
    p: float | None = None
    """p-value of the hypothesis that both losses are equal, corrected for the number of verdicts by Holm's method."""
    margin: float = MARGIN
    smallest_difference: float | None = None
    """Smallest true difference that these seeds show with probability `POWER`."""
    seeds_for_margin: int | None = None
    """Number of seeds that show a true difference of `margin` with probability `POWER`."""
    has_summed_loss: bool = False
    """Whether the losses are those of encoders or vision models, which are sums over several objectives."""

    @property
    def is_clear(self) -> bool:
        """True if the corrected test finds a difference."""
        return self.p is not None and self.p <= 1 - CONFIDENCE

    @property
    def word(self) -> str:
        """Word for what the seeds say: better, worse, equal or undecided."""
        if self.low is None or self.high is None:
            return "undecided"
        if self.is_clear:
            return "better" if self.difference < 0 else "worse"
        return "equal" if max(abs(self.low), abs(self.high)) <= self.margin else "undecided"

    def as_json(self) -> dict[str, Any]:
        """Return the verdict as an object for `mhmoe report --json`."""
        fields = self._asdict()
        del fields["has_summed_loss"]
        return {"baseline": fields.pop("baseline"), "other": fields.pop("variant"), "verdict": self.word, **fields}

    @property
    def text(self) -> str:
        """Sentence for the user that states the verdict, the difference and its confidence interval."""
        direction = "lower" if self.difference < 0 else "higher"
        figures = f"{abs(self.difference):.4f} {'' if self.has_summed_loss else 'nats '}{direction}"
        if not self.has_summed_loss and (ratio := metrics.perplexity(self.difference)) is not None:
            figures += f", perplexity {100 * abs(ratio - 1):.1f}% {direction}"
        if self.low is None:
            return f"{self.variant} to {self.baseline}: {figures}; with one seed its uncertainty is unknown"
        margin_text = f" within {self.margin:g}" if self.word == "equal" else ""
        interval = f"{CONFIDENCE:.0%} interval {self.low:+.4f} to {self.high:+.4f}"
        method = f"{self.seeds} seeds{', paired' if self.paired else ''}, corrected p {self.p:.2g}"
        text = f"{self.variant} to {self.baseline}: {self.word}{margin_text}; {figures} ({interval}, {method})"
        if self.word != "undecided":
            return text
        seeds_text = f"more than {MAX_SEEDS:,}" if self.seeds_for_margin is None else str(self.seeds_for_margin)
        detectable_text = (
            f"a difference of {self.smallest_difference:.4f}, and {seeds_text} seeds one of {self.margin:g}"
        )
        return f"{text}; they would find {detectable_text} with a probability of {POWER:.0%}"


def compare_variants(
    baseline: Variant, variants: Iterable[Variant], step: int, margin: float = MARGIN
) -> list[Verdict]:
    """Compare the validation losses of variants with a baseline's at a training step, without those that have none."""
    variants_by_name = {variant.name: variant for variant in variants}
    losses = {name: losses_at(step, baseline, variant) for name, variant in variants_by_name.items()}
    verdicts = compare_losses(baseline.name, {name: pair for name, pair in losses.items() if pair}, step, margin)
    return [v._replace(has_summed_loss=variants_by_name[v.variant].has_summed_loss) for v in verdicts]


def compare_losses(
    baseline: str, losses_by_variant: Mapping[str, SeedValues], step: int, margin: float = MARGIN
) -> list[Verdict]:
    """Compare losses of variants with those of a baseline, with p-values corrected for the number of variants."""
    tests = {name: losses.test() for name, losses in losses_by_variant.items()}
    tested = [name for name, test in tests.items() if test is not None]
    corrected = dict(zip(tested, correct_for_number([test.p for test in tests.values() if test]), strict=True))
    verdicts = []
    for name, losses in losses_by_variant.items():
        verdict = Verdict(
            baseline, name, step, losses.difference, None, None, losses.seeds, losses.paired, margin=margin
        )
        if (test := tests[name]) is not None:
            verdict = verdict._replace(
                low=test.low,
                high=test.high,
                p=corrected[name],
                smallest_difference=losses.smallest_difference(),
                seeds_for_margin=losses.seeds_for(margin),
            )
        verdicts.append(verdict)
    return verdicts
