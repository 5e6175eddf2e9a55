"""Tables and the plot of `mhmoe data inspect`: lengths of documents by domain, fertility by language.

Fertility is the number of tokens per word and per character.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mhmoe_ray.cli.formats import BARS, format_bytes, format_figure
from mhmoe_ray.cli.output import out, print_line, print_table
from mhmoe_ray.data.domains import source_of, subfolder_of
from mhmoe_ray.plotting import BLUE, ROW_INCHES, VERMILION, new_figure, save, short, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mhmoe_ray.data.inspect.samples import DecodedSample


UNNAMED = "(not named)"
MAX_PAIRS = 10
"""Largest number of listed pairs of domains that share texts."""


def print_survey(survey: dict[str, Any], *, held_out: bool) -> None:
    """Print a survey in the form of `mhmoe data inspect --json`; `held_out` documents are those that a spec defines."""
    totals = survey["whole"]
    tokens = f", {totals['tokens']:,} tokens" if survey["tokenized"] and totals["tokens"] else ""
    print_line(f"{survey['name']}: {totals['documents']:,} documents, {format_bytes(totals['bytes'])} of text{tokens}")
    if not survey["tokenized"]:
        print_line("no tokens: prepare the data, or give a tokenizer.json by --set data.tokenizer=PATH")
    _print_domains(survey, held_out)
    _print_lengths(survey)
    _print_images(survey)
    _print_classes(survey)
    _print_languages(survey)
    _print_unread(survey)
    _print_copies(survey)
    _print_prepared(survey["prepared"])


def print_sample(sample: "DecodedSample") -> None:
    """Print one packed training sample by documents. In conversations, learned text stands between {+ and +}."""
    padding = f", {sample.padding:,} tokens of padding" if sample.padding else ""
    out.print(
        f"position {sample.position:,} (step {sample.step:,}): {sample.domain}, its sample {sample.sample:,}{padding}",
        style="bold",
        soft_wrap=True,
    )
    for part in sample.parts:
        # If a sample ends with the start token of the next document, its last part holds this token alone, without
        # text. In this sample the token is only a target, which shows that the document before it ends.
        if part is sample.parts[-1] and part.begins and not part.text:
            out.print("--- the document ends", style="cyan")
            continue
        heading = "a document begins" if part.begins else "it goes on from the previous sample"
        out.print(f"--- {heading}, {part.tokens:,} tokens", style="cyan")
        if part.pieces is None:
            print_line(part.text)
            continue
        # Target tokens are marked {+like this+}, as `git diff --word-diff` marks added words.
        text = "".join(f"{{+{piece.text}+}}" if piece.is_target else piece.text for piece in part.pieces)
        print_line(text)
    out.print()


def _print_table(title: str, columns: Sequence[str], rows: list[list[str]]) -> None:
    # A table whose rows hold nothing but names would be useless, so it is left out.
    if any(any(row[1:]) for row in rows):
        out.print(f"\n{title}", style="bold")
        print_table(["", *columns], rows)


def _print_domain_table(
    title: str, columns: Sequence[str], survey: dict[str, Any], cells: Callable[[dict[str, Any]], list[str]]
) -> None:
    """Print a table of each source's domains. `cells` returns none if there is nothing to show of a domain."""
    empty_cells = [""] * len(columns)
    rows: list[list[str]] = []
    source = None
    for name, row in survey["domains"].items():
        if source_of(name) != source:
            source = source_of(name)
            rows.append([source, *empty_cells])
        rows.append([f"  {subfolder_of(name)}", *(cells(row) or empty_cells)])
    _print_table(title, columns, rows)


def _print_domains(survey: dict[str, Any], held_out: bool) -> None:
    columns = ["files", "stored", "documents", *(["held out"] if held_out else []), *_SIZE_COLUMNS]
    columns += _FERTILITY_COLUMNS if survey["tokenized"] else []

    def cells(row: dict[str, Any]) -> list[str]:
        share = [_format_percent(row["held_out"], row["documents"])] if held_out else []
        counts = [f"{row['files']:,}", format_bytes(row["stored_bytes"]), f"{row['documents']:,}"]
        return [*counts, *share, *_size_cells(row), *(_fertility_cells(row) if survey["tokenized"] else [])]

    _print_domain_table("by domain", columns, survey, cells)


_SIZE_COLUMNS = ["text", "characters", "words"]
_FERTILITY_COLUMNS = ["tokens", "bytes/token", "tokens/char", "tokens/word"]


def _size_cells(row: dict[str, Any]) -> list[str]:
    return [format_bytes(row["bytes"]), f"{row['characters']:,}", f"{row['words']:,}"]


def _fertility_cells(row: dict[str, Any]) -> list[str]:
    ratios = [format_figure(row[k], ".2f", "") for k in ("bytes_per_token", "tokens_per_character", "tokens_per_word")]
    return [format_figure(row["tokens"], ",", ""), *ratios]


def _print_lengths(survey: dict[str, Any]) -> None:
    key, unit = ("lengths_in_tokens", "tokens") if survey["tokenized"] else ("lengths_in_characters", "characters")
    used_octaves = [int(o) for row in survey["domains"].values() for o in (row[key] or {"octaves": ()})["octaves"]]
    if not used_octaves:
        return
    # Octaves (powers of two) without documents get an empty bar, so that the bars of all domains line up.
    octaves = [o for o in [0, *(1 << i for i in range(64))] if min(used_octaves) <= o <= max(used_octaves)]

    def cells(row: dict[str, Any]) -> list[str]:
        lengths = row[key]
        if not lengths or not lengths["octaves"]:
            return []
        counts = {int(o): n for o, n in lengths["octaves"].items()}
        bars = _format_bars([counts.get(o, 0) for o in octaves])
        return [bars, *_quantile_cells(lengths), f"{row['longest']:,}", row["longest_at"]]

    title = f"lengths of documents in {unit}; bars: by powers of two, from {octaves[0]:,} to {2 * octaves[-1]:,}"
    _print_domain_table(title, ["", *_QUANTILE_COLUMNS, "longest (characters)", "at"], survey, cells)


_QUANTILE_COLUMNS = ["p10", "median", "p90", "p99"]


def _quantile_cells(distribution: dict[str, Any]) -> list[str]:
    return [f"{value:,}" for quantile, value in distribution.items() if quantile != "octaves"]


def _print_images(survey: dict[str, Any]) -> None:
    from mhmoe_ray.data.inspect.figures import MAX_ASPECT_RATIO

    def cells(row: dict[str, Any]) -> list[str]:
        if (images := row.get("images")) is None:
            return []
        extreme = _format_percent(images["extreme_aspect_ratios"], images["images"])
        counts = [f"{images['images']:,}", format_bytes(images["bytes"])]
        return [*counts, *_quantile_cells(images["shorter_sides"]), extreme]

    columns = ["images", "stored", *_QUANTILE_COLUMNS, f"over {MAX_ASPECT_RATIO:g}:1"]
    _print_domain_table("images, and the quantiles of their shorter sides in pixels", columns, survey, cells)


def _print_classes(survey: dict[str, Any]) -> None:
    def cells(row: dict[str, Any]) -> list[str]:
        images = row.get("images") or {}
        counts = images.get("classes", {}).values()
        class_cells = [f"{value:,}" for value in (len(counts), min(counts), max(counts))] if counts else [""] * 3
        return class_cells + (_quantile_cells(images.get("objects_per_image", {})) or [""] * 4)

    title = "classes with their images or objects, and the quantiles of the objects of an image"
    _print_domain_table(title, ["classes", "smallest", "largest", *_QUANTILE_COLUMNS], survey, cells)


def _print_languages(survey: dict[str, Any]) -> None:
    """Print the languages of all domains together, then those of each domain that has several."""
    # If no language is named, a table by language would have a single row, so it is left out.
    if set(survey["languages"]) <= {""}:
        return
    columns = ["documents", *_SIZE_COLUMNS, *(_FERTILITY_COLUMNS if survey["tokenized"] else [])]

    def cells(name: str, row: dict[str, Any]) -> list[str]:
        fertility = _fertility_cells(row) if survey["tokenized"] else []
        return [name, f"{row['documents']:,}", *_size_cells(row), *fertility]

    _print_table("by language", columns, [cells(name or UNNAMED, row) for name, row in survey["languages"].items()])
    rows = []
    for domain, domain_row in survey["domains"].items():
        if len(domain_row["languages"]) > 1:
            rows.append([domain, *[""] * len(columns)])
            rows += [cells(f"  {name or UNNAMED}", row) for name, row in domain_row["languages"].items()]
    _print_table("languages of domains that have several", columns, rows)


def _print_unread(survey: dict[str, Any]) -> None:
    rows = []
    for name, row in survey["domains"].items():
        for kind, label in (("quarantined", "in quarantine"), ("dropped", "filtered out")):
            rows += [[name, f"{n:,}", label, reason] for reason, n in sorted(row[kind].items())]
    _print_table("not read", ["", "", ""], rows)


def _print_copies(survey: dict[str, Any]) -> None:
    totals = survey["whole"]
    rows = [
        [
            name,
            f"{row['copies']:,}",
            _format_percent(row["copies"], row["documents"]),
            format_bytes(row["copied_bytes"]),
            f"{row['texts_elsewhere']:,}",
        ]
        for name, row in survey["domains"].items()
        if row["copies"] or row["texts_elsewhere"]
    ]
    title = f"exact copies of other documents: {totals['copies']:,}, {format_bytes(totals['copied_bytes'])} of text"
    if not rows:
        out.print("\nno exact copies", style="bold")
    _print_table(title, ["copies in it", "share", "text", "texts elsewhere too"], rows)
    for pair, count in list(totals["shared_texts"].items())[:MAX_PAIRS]:
        print_line(f"texts in both {' and '.join(pair.split(', '))}: {count:,}")
    for copied_text in totals["most_copied"]:
        ellipsis = ", ..." if copied_text["documents"] > 2 else ""
        print_line(f"{copied_text['documents']:,} times: {copied_text['first']}, {copied_text['second']}{ellipsis}")


def _print_prepared(prepared: dict[str, Any] | None) -> None:
    if prepared is None:
        return
    domains = prepared["domains"]
    columns = [key for key, value in next(iter(domains.values())).items() if isinstance(value, int | float)]
    rows = [[name, *(f"{row[key]:,}" for key in columns)] for name, row in domains.items()]
    _print_table(f"prepared in {prepared['folder']}", [key.replace("_", " ") for key in columns], rows)


def _format_bars(counts: list[int]) -> str:
    largest_count = max(counts)
    return "".join(BARS[(len(BARS) - 1) * n // largest_count] if n else " " for n in counts)


def _format_percent(part: int, total: int) -> str:
    return f"{100 * part / total:.2g}%" if total else ""


BAR_INCHES = 0.2
"""Height of the colour bar in inches."""


def draw_survey(survey: dict[str, Any], path: Path) -> None:
    """Draw a survey of raw text as a PNG file. Missing matplotlib, or a file that cannot be written, is a DataError."""
    with style():
        save(_survey_figure(survey), path)


def _survey_figure(survey: dict[str, Any]) -> "Figure":
    """Return a figure of document lengths by domain, beside tokens per word and character or MB by language."""
    rows = max(len(survey["domains"]), len(survey["languages"]))
    figure = new_figure(13, 2.4 + ROW_INCHES * rows)
    panels = 3 if survey["tokenized"] else 2
    axes = figure.subplots(1, panels, width_ratios=[1.6, *[1] * (panels - 1)])
    for axis in axes:
        axis.xaxis.tick_top()
    _plot_lengths(figure, axes[0], survey)
    languages = {name or "(not named)": row for name, row in survey["languages"].items()}
    if survey["tokenized"]:
        _plot_bars(axes[1], {n: row["tokens_per_word"] for n, row in languages.items()}, "tokens per word", BLUE)
        _plot_bars(
            axes[2], {n: row["tokens_per_character"] for n, row in languages.items()}, "tokens per character", VERMILION
        )
    else:
        _plot_bars(axes[1], {n: row["bytes"] / 1e6 for n, row in languages.items()}, "MB of text", BLUE)
    # All panels get the same number of rows, so that rows are equally high for domains and for languages.
    for axis in axes:
        axis.set_ylim(rows - 0.5, -0.5)
    return figure


def _plot_lengths(figure: Any, axis: Any, survey: dict[str, Any]) -> None:
    """Plot a heat map with a row for each domain: the shares of its documents by length, in powers of two."""
    key, unit = ("lengths_in_tokens", "tokens") if survey["tokenized"] else ("lengths_in_characters", "characters")
    by_domain = {
        name: {int(octave): n for octave, n in row[key]["octaves"].items()}
        for name, row in survey["domains"].items()
        if row[key]
    }
    lengths = [octave for counts in by_domain.values() for octave in counts if octave]
    powers = range(min(lengths, default=1).bit_length() - 1, max(lengths, default=1).bit_length())
    shares = [
        [100 * counts.get(1 << power, 0) / max(1, sum(counts.values())) for power in powers]
        for counts in by_domain.values()
    ]
    axis.set_title(f"length of documents in {unit}")
    if not by_domain:
        # An encoder may have images without any text.
        return
    image = axis.imshow(shares, aspect="auto", cmap="Blues", vmin=0, interpolation="none")
    axis.set_yticks(range(len(by_domain)), by_domain)
    # At most eight labels fit on the axis, so only every `step`-th power of two gets a label.
    step = -(-len(powers) // 8)
    axis.set_xticks([i - 0.5 for i in range(0, len(powers), step)], [short(1 << p) for p in powers[::step]])
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
    axis.barh(range(len(values)), [value or 0 for value in values.values()], color=color)
    axis.set_yticks(range(len(values)), values)
    axis.set_title(title)
    axis.grid(axis="x", alpha=0.3)
