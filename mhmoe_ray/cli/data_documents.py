"""`mhmoe data at` and `mhmoe data find`: the documents of a step of a run, and the steps that read a document."""

import re
from typing import Annotated

import typer

import mhmoe_ray as mh
from mhmoe_ray.cli import options
from mhmoe_ray.cli.formats import format_count
from mhmoe_ray.cli.output import print_json, print_line, print_note, print_table, show_activity

SHOWN_CHARACTERS = 80


def step_documents(
    step: Annotated[str, typer.Argument(metavar="RUN@STEP[:RANK]", help="A step of a run, and perhaps one worker.")],
    storage: options.StorageOption = options.STORAGE,
    json: options.JsonOption = False,
) -> None:
    """Show the documents that a step of a run read, each with its share of the step's loss and its text.

    Steps count from 1, as in metrics.jsonl. Texts are shortened; --json has them in full.
    """
    parts = re.fullmatch(r"(.+)@(\d+)(?::(\d+))?", step)
    if parts is None:
        raise typer.BadParameter(f"{step}: name a step of a run as RUN@STEP or RUN@STEP:RANK")
    show_activity("reading the documents")
    documents = mh.find_run(parts[1], storage).documents_at(int(parts[2]), int(parts[3]) if parts[3] else None)
    if json:
        print_json([document._asdict() for document in documents])
        return
    rows = []
    for d in documents:
        text = " ".join((d.text or "").split())
        text = ("... " if d.begins is False else "") + text[:SHOWN_CHARACTERS] + " ..." * (len(text) > SHOWN_CHARACTERS)
        weight, origin = "" if d.weight is None else f"{d.weight:.2%}", "" if d.file is None else f"{d.file}:{d.line}"
        rows.append([f"{d.rank}", f"{d.position:,}", weight, d.domain, origin, text])
    print_table(["rank", "sample", "weight", "domain", "document", "text"], rows, names=["domain", "document", "text"])
    if any(d.file is None for d in documents):
        print_note("the prepared data has no index of documents, because an earlier version prepared it")


def document_steps(
    run: Annotated[str, typer.Argument(help="A run's id, the start of one, or its path.")],
    document: Annotated[str, typer.Argument(metavar="FILE[:LINE]", help="A raw file, and perhaps a line or row.")],
    storage: options.StorageOption = options.STORAGE,
    json: options.JsonOption = False,
) -> None:
    """Show at which steps a run, or one that it started from, read a document: in each sample that has text of it.

    FILE is a path or URI, or the end of one. Without LINE, all documents of the file are meant.
    """
    show_activity("reading the order of samples")
    parts = re.fullmatch(r"(.+?)(?::(\d+))?", document)
    if parts is None:
        raise typer.BadParameter("the document has no name: give FILE or FILE:LINE")
    line = int(parts[2]) if parts[2] else None
    reads = mh.find_run(run, storage).find_document(parts[1], line, print_note)
    if json:
        print_json([read._asdict() for read in reads])
        return
    columns = ["run", "step", "rank", "sample", "domain", "document"]
    rows = [[r.run, f"{r.step:,}", f"{r.rank}", f"{r.position:,}", r.domain, f"{r.file}:{r.line}"] for r in reads]
    if rows:
        print_table(columns, rows, names=["run", "domain", "document"])
    steps = len({(read.run, read.step) for read in reads})
    print_line(f"{format_count(len(reads), 'read')} at {format_count(steps, 'step')}")
