"""The tables and the picture of `mhmoe data inspect`: lengths of documents by domain, fertility by language."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mhmoe_ray.cli.common import BARS, in_bytes, number_table, out, print_whole
from mhmoe_ray.data.domains import source_of, subfolder_of
from mhmoe_ray.pictures import BLUE, ROW_INCHES, VERMILION, new_figure, save, short, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mhmoe_ray.data.inspect.samples import Shown


UNNAMED = "(not named)"
LISTED = 10
"""Largest number of listed pairs of domains that share texts."""


def show(found: dict[str, Any], *, held_out: bool) -> None:
    """Print a survey as tables.

    Args:
        found: the survey, as `mhmoe data inspect --json` prints it.
        held_out: whether a spec defines which documents are held out for validation.
    """
    whole = found["whole"]
    tokens = f", {whole['tokens']:,} tokens" if found["tokenized"] and whole["tokens"] else ""
    out.print(
        f"{found['name']}: {whole['documents']:,} documents, {in_bytes(whole['bytes'])} of text{tokens}", soft_wrap=True
    )
    if not found["tokenized"]:
        out.print("no tokens: prepare the data, or give a tokenizer.json by --set data.tokenizer=PATH", soft_wrap=True)
    _domains(found, held_out)
    _lengths(found)
    _languages(found)
    _unread(found)
    _copies(found)
    _prepared(found["prepared"])


def show_sample(sample: "Shown") -> None:
    """Print one packed training sample, with a line before each document in it."""
    padding = f", {sample.padding:,} tokens of padding" if sample.padding else ""
    out.print(
        f"position {sample.position:,} (step {sample.step:,}): {sample.domain}, its sample {sample.sample:,}{padding}",
        style="bold",
        soft_wrap=True,
    )
    for part in sample.parts:
        if part is sample.parts[-1] and part.begins and not part.text:  # a target only
            out.print("--- the document ends", style="cyan")
            continue
        how = "a document begins" if part.begins else "it goes on from the sample before"
        out.print(f"--- {how}, {part.tokens:,} tokens", style="cyan")
        out.print(part.text, soft_wrap=True)
    out.print()


def _nested(found: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each domain with its name indented, below a line with the name of its source."""
    source = None
    for name, row in found["domains"].items():
        if source_of(name) != source:
            source = source_of(name)
            yield source, {}
        yield f"  {subfolder_of(name)}", row


def _table(title: str, columns: Sequence[str], rows: list[list[str]]) -> None:
    if any(any(row[1:]) for row in rows):
        out.print(f"\n{title}", style="bold")
        print_whole(number_table(["", *columns], rows))


def _domains(found: dict[str, Any], held_out: bool) -> None:
    columns = ["files", "stored", "documents", *(["held out"] if held_out else []), *_SIZES]
    columns += _FERTILITY if found["tokenized"] else []
    rows = []
    for name, row in _nested(found):
        if not row:
            rows.append([name, *[""] * len(columns)])
            continue
        share = [_percent(row["held_out"], row["documents"])] if held_out else []
        counts = [f"{row['files']:,}", in_bytes(row["stored_bytes"]), f"{row['documents']:,}"]
        rows.append([name, *counts, *share, *_sizes(row), *(_fertility(row) if found["tokenized"] else [])])
    _table("by domain", columns, rows)


_SIZES = ["text", "characters", "words"]
_FERTILITY = ["tokens", "bytes/token", "tokens/char", "tokens/word"]


def _sizes(row: dict[str, Any]) -> list[str]:
    return [in_bytes(row["bytes"]), f"{row['characters']:,}", f"{row['words']:,}"]


def _fertility(row: dict[str, Any]) -> list[str]:
    tokens = "" if row["tokens"] is None else f"{row['tokens']:,}"
    return [tokens, *(_decimal(row[k]) for k in ("bytes_per_token", "tokens_per_character", "tokens_per_word"))]


def _lengths(found: dict[str, Any]) -> None:
    key, unit = ("lengths_in_tokens", "tokens") if found["tokenized"] else ("lengths_in_characters", "characters")
    ranges = [int(o) for row in found["domains"].values() for o in (row[key] or {"octaves": ()})["octaves"]]
    if not ranges:
        return
    octaves = [o for o in [0, *(1 << i for i in range(64))] if min(ranges) <= o <= max(ranges)]
    rows = []
    for name, row in _nested(found):
        lengths = row.get(key)
        if not lengths:
            rows.append([name, *[""] * 7])
            continue
        quantiles = [f"{value:,}" for quantile, value in lengths.items() if quantile != "octaves"]
        counts = {int(o): n for o, n in lengths["octaves"].items()}
        bars = _bars([counts.get(o, 0) for o in octaves])
        rows.append([name, bars, *quantiles, f"{row['longest']:,}", row["longest_at"]])
    title = f"lengths of documents in {unit}; bars: by powers of two, from {octaves[0]:,} to {2 * octaves[-1]:,}"
    _table(title, ["", "p10", "median", "p90", "p99", "longest (characters)", "at"], rows)


def _languages(found: dict[str, Any]) -> None:
    """Print the languages over all domains, then those of each domain that has several."""
    if set(found["languages"]) <= {""}:
        return
    columns = ["documents", *_SIZES, *(_FERTILITY if found["tokenized"] else [])]

    def line(name: str, row: dict[str, Any]) -> list[str]:
        fertility = _fertility(row) if found["tokenized"] else []
        return [name, f"{row['documents']:,}", *_sizes(row), *fertility]

    _table("by language", columns, [line(name or UNNAMED, row) for name, row in found["languages"].items()])
    rows = []
    for domain, whole in found["domains"].items():
        if len(whole["languages"]) > 1:
            rows.append([domain, *[""] * len(columns)])
            rows += [line(f"  {name or UNNAMED}", row) for name, row in whole["languages"].items()]
    _table("languages of domains that have several", columns, rows)


def _unread(found: dict[str, Any]) -> None:
    rows = []
    for name, row in found["domains"].items():
        for kind, label in (("quarantined", "in quarantine"), ("dropped", "filtered out")):
            rows += [[name, f"{n:,}", label, reason] for reason, n in sorted(row[kind].items())]
    _table("not read", ["", "", ""], rows)


def _copies(found: dict[str, Any]) -> None:
    whole = found["whole"]
    rows = [
        [
            name,
            f"{row['copies']:,}",
            _percent(row["copies"], row["documents"]),
            in_bytes(row["copied_bytes"]),
            f"{row['texts_elsewhere']:,}",
        ]
        for name, row in found["domains"].items()
        if row["copies"] or row["texts_elsewhere"]
    ]
    title = f"exact copies of other documents: {whole['copies']:,}, {in_bytes(whole['copied_bytes'])} of text"
    if not rows:
        out.print("\nno exact copies", style="bold")
    _table(title, ["copies in it", "share", "text", "texts elsewhere too"], rows)
    for pair, count in list(whole["shared_texts"].items())[:LISTED]:
        out.print(f"texts in both {' and '.join(pair.split(', '))}: {count:,}", soft_wrap=True)
    for most in whole["most_copied"]:
        more = ", ..." if most["documents"] > 2 else ""
        out.print(f"{most['documents']:,} times: {most['first']}, {most['second']}{more}", soft_wrap=True)


def _prepared(prepared: dict[str, Any] | None) -> None:
    if prepared is None:
        return
    domains = prepared["domains"]
    columns = [key for key, value in next(iter(domains.values())).items() if isinstance(value, int | float)]
    rows = [[name, *(f"{row[key]:,}" for key in columns)] for name, row in domains.items()]
    _table(f"prepared in {prepared['folder']}", [key.replace("_", " ") for key in columns], rows)


def _bars(counts: list[int]) -> str:
    """Return a bar for each count, whose height is its share of the largest count; blank for a count of 0."""
    most = max(counts)
    return "".join(BARS[(len(BARS) - 1) * n // most] if n else " " for n in counts)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2g}%" if whole else ""


def _decimal(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


BAR_INCHES = 0.2  # of the scale of shades


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw a survey.

    Args:
        found: the survey, as `mhmoe data inspect --json` prints it.
        path: path of the PNG file to write.

    Raises:
        DataError: matplotlib is not installed, or the file cannot be written.
    """
    with style():
        save(_picture(found), path)


def _picture(found: dict[str, Any]) -> "Figure":
    rows = max(len(found["domains"]), len(found["languages"]))
    figure = new_figure(13, 2.4 + ROW_INCHES * rows)
    panels = 3 if found["tokenized"] else 2
    axes = figure.subplots(1, panels, width_ratios=[1.6, *[1] * (panels - 1)])
    for axis in axes:
        axis.xaxis.tick_top()
    _plot_lengths(figure, axes[0], found)
    languages = {name or "(not named)": row for name, row in found["languages"].items()}
    if found["tokenized"]:
        _plot_bars(axes[1], {n: row["tokens_per_word"] for n, row in languages.items()}, "tokens per word", BLUE)
        _plot_bars(
            axes[2], {n: row["tokens_per_character"] for n, row in languages.items()}, "tokens per character", VERMILION
        )
    else:
        _plot_bars(axes[1], {n: row["bytes"] / 1e6 for n, row in languages.items()}, "MB of text", BLUE)
    for axis in axes:  # rows of one height, whether there are more domains or more languages
        axis.set_ylim(rows - 0.5, -0.5)
    return figure


def _plot_lengths(figure: Any, axis: Any, found: dict[str, Any]) -> None:
    """Plot a row of shades for each domain: the share of its documents in each octave of lengths."""
    key, unit = ("lengths_in_tokens", "tokens") if found["tokenized"] else ("lengths_in_characters", "characters")
    by_domain = {
        name: {int(octave): n for octave, n in row[key]["octaves"].items()}
        for name, row in found["domains"].items()
        if row[key]
    }
    every = [octave for counts in by_domain.values() for octave in counts if octave]
    powers = range(min(every, default=1).bit_length() - 1, max(every, default=1).bit_length())
    shares = [
        [100 * counts.get(1 << power, 0) / max(1, sum(counts.values())) for power in powers]
        for counts in by_domain.values()
    ]
    image = axis.imshow(shares, aspect="auto", cmap="Blues", vmin=0, interpolation="none")
    axis.set_yticks(range(len(by_domain)), by_domain)
    step = -(-len(powers) // 8)
    axis.set_xticks([i - 0.5 for i in range(0, len(powers), step)], [short(1 << p) for p in powers[::step]])
    axis.set_title(f"length of documents in {unit}")
    figure.colorbar(
        image,
        ax=axis,
        label="per cent of a domain's documents",
        location="bottom",
        fraction=BAR_INCHES / figure.get_figheight(),
        pad=BAR_INCHES / figure.get_figheight() / 2,
        aspect=40,
    )


def _plot_bars(axis: Any, values: dict[str, float | None], title: str, color: str) -> None:
    """Plot one bar for each language; a language without a figure has none."""
    axis.barh(range(len(values)), [value or 0 for value in values.values()], color=color)
    axis.set_yticks(range(len(values)), values)
    axis.set_title(title)
    axis.grid(axis="x", alpha=0.3)
