"""`mhmoe data`: sample text, looking at raw text, preparing it for training, and the mixture that training reads."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from mhmoe_ray.cli import inspect, job, launch, lint, mix
from mhmoe_ray.cli.common import AddressOption, JsonOption, SetOption, SpecArg, out, print_json, read_spec

app = typer.Typer(help="Make, inspect and prepare training text.", no_args_is_help=True)
app.command("inspect")(inspect.inspect)
app.command("lint")(lint.lint)
app.command("mix")(mix.mix)


@app.command()
def sample(folder: Annotated[Path, typer.Argument(help="Where to write it.")], json: JsonOption = False) -> None:
    """Write real text in RedPajama's layout, and one folder per language, from installed packages."""
    from mhmoe_ray.data.corpus.small import write_sample

    written = write_sample(folder)
    if json:
        print_json(written)
        return
    out.print(f"{sum(written.values())} documents in {len(written)} domains and languages below {folder}")


@app.command()
def prepare(
    spec: SpecArg,
    set_: SetOption = [],  # noqa: B006
    address: AddressOption = None,
    json: JsonOption = False,
) -> None:
    """Tokenise and pack a spec's text into shards, as a job on the cluster. Does nothing if that was done."""
    from mhmoe_ray.data import SAYS
    from mhmoe_ray.data.shards.manifest import check_recipe, read_data_manifest
    from mhmoe_ray.data.sources import find_files
    from mhmoe_ray.spec import dump_spec

    resolved = read_spec(spec, set_)
    folder = resolved.data.prepared
    manifest = read_data_manifest(folder)
    if manifest is None:
        find_files(resolved.data)
        connection = launch.cluster_for(resolved.cluster, resolved.storage, resolved.cluster.cpus, address)
        ended = job.run(
            connection,
            resolved.cluster,
            "mhmoe_ray.data.prepare.job",
            f"prepare-{folder.name}",
            {"MHMOE_SPEC": dump_spec(resolved)},
            SAYS,
        )
        manifest = read_data_manifest(folder)
        if manifest is None:
            raise ended.error(f"prepared data {folder}")
    check_recipe(folder, manifest, resolved)
    if json:
        print_json(manifest.model_dump())
        return
    table = Table("domain", "documents", "tokens", "samples", box=None, pad_edge=False)
    for name, d in manifest.domains.items():
        table.add_row(name, f"{d.documents:,}", f"{d.tokens:,}", f"{d.samples:,}")
    out.print(table)
    out.print(
        f"{manifest.validation_tokens:,} held-out tokens: unigram entropy {manifest.baselines.unigram_entropy:.4f}, "
        f"bigram model {manifest.baselines.bigram:.4f} nats per token"
    )
    out.print(f"in {folder}", soft_wrap=True)
