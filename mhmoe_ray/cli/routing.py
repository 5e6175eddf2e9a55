"""`mhmoe routing`: show to which experts a run routes its tokens."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mhmoe_ray.cli import options
from mhmoe_ray.cli.eval import evaluate
from mhmoe_ray.cli.formats import format_figure
from mhmoe_ray.cli.output import out, print_json, print_line, print_note, print_table, show_activity

if TYPE_CHECKING:
    from mhmoe_ray.runs.directory import RunDir


# Largest number of rows in the table of training metrics: enough for a trend, and few enough for one screen.
CURVE_POINTS = 8
SERVED_SAMPLES = 16
"""Number of held-out samples that a server is asked about, by default."""


def routing(
    run: options.RunArg = None,
    text: options.TextOption = [],  # noqa: B006 - typer needs the list
    samples: options.SamplesOption = None,
    set_: options.TextSetOption = [],  # noqa: B006 - typer needs the list
    checkpoint: options.CheckpointOption = None,
    gpus: options.GpusOption = None,
    recompute: options.AgainOption = False,
    storage: options.StorageOption = options.STORAGE,
    address: options.AddressOption = None,
    json: options.JsonOption = False,
    served: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Compare the experts that a server of the checkpoint reports with ours."),
    ] = None,
) -> None:
    """Show how evenly a run's router loaded the experts in training, and where its checkpoint sends the tokens of its
    held-out text or any other text: loads, share of experts in use by threshold, how many experts a token's sub-tokens
    go to, how often heads agree, and how domains and languages, or images and texts, differ.

    For example `mhmoe routing --text books/ --samples 100`. With --served, the server answers prompts of held-out text,
    and the experts of each sub-token are compared with those of training's forward pass.
    """
    show_activity("looking for the checkpoint")
    from mhmoe_ray.checkpoint.find import split_step
    from mhmoe_ray.errors import RunError
    from mhmoe_ray.runs.directory import find_run

    run, checkpoint = split_step(run, checkpoint)
    run_dir = find_run(run, storage)
    dense_error = RunError(f"run {run_dir.id}", "it is a dense model, without a router", "name a run with experts")
    moe = None if run_dir.is_imported else run_dir.spec().model.moe
    if moe is not None and moe.router == "smear":
        reason = "router smear averages all experts, so that no token chooses any"
        raise RunError(f"run {run_dir.id}", reason, "name a run with another router")
    if not run_dir.is_imported and moe is None:
        # The evaluation could take minutes on the cluster, so this error comes first.
        raise dense_error
    if served is not None:
        if text or set_ or gpus or recompute or address:
            reason = "it takes no other options than --samples, --checkpoint, --storage and --json"
            raise typer.BadParameter(reason, param_hint="--served")
        _compare_served(run_dir, checkpoint, served, samples or SERVED_SAMPLES, json)
        return
    evaluation = evaluate(
        run_dir, checkpoint, recompute, address, text=text, overrides=set_, samples=samples, gpus=gpus
    )
    # An imported run has no spec, so only its evaluation shows that it is dense.
    if not evaluation.routing and moe is None:
        raise dense_error
    if not evaluation.routing:
        reason = "there are no pairs of an image and a text to count routes of"
        raise RunError(f"run {run_dir.id}", reason, "name images with captions by --text")
    request, figures = evaluation.request, routing_figures(evaluation.routing)
    training = [] if run_dir.is_imported else _training_metrics(run_dir)
    if json:
        print_json({"run": run_dir.id, "checkpoint": request.checkpoint, "training": training, **figures})
        return
    if training:
        _print_training(training)
    print_line(f"\n{run_dir.id}, {request.checkpoint}: {figures['tokens']:,} tokens of {request.description}")
    _print_figures(figures)


def _compare_served(run_dir: "RunDir", checkpoint: str | int | None, url: str, samples: int, json: bool) -> None:
    from mhmoe_ray.api.served_routes import compare_served_routes

    name, agreements = compare_served_routes(run_dir, checkpoint, url, samples, print_note)
    if json:
        print_json({"run": run_dir.id, "checkpoint": name, "layers": [layer._asdict() for layer in agreements]})
        return
    print_line(f"{run_dir.id}, {name}: sub-tokens of prompts and answers, and their experts at {url}")
    rows = [[str(number), *(f"{count:,}" for count in layer)] for number, layer in enumerate(agreements)]
    print_table(["layer", "sub-tokens", "near ties", "of them different", "others different"], rows)


def routing_figures(by_domain: "dict[str, Any]") -> dict[str, Any]:
    """Return statistics of routing, as `mhmoe routing --json` prints them, from the counts of routes of each domain."""
    from mhmoe_ray.evaluate import activation

    total_counts = activation.sum_counts(by_domain.values())
    agreement = activation.mean_head_agreement(total_counts)
    layers = [
        {
            "entropy": float(activation.load_entropy(total_counts)[layer]),
            "least": float(activation.expert_loads(total_counts.counts)[layer].min()),
            "most": float(activation.expert_loads(total_counts.counts)[layer].max()),
            "distinct": float(activation.mean_distinct_experts(total_counts)[layer]),
            "agreement": None if agreement is None else float(agreement[layer]),
            "first_weight": float(activation.first_choice_weight(total_counts)[layer]),
            "load": activation.expert_loads(total_counts.counts)[layer].tolist(),
        }
        for layer in range(len(total_counts.counts))
    ]
    return {
        "tokens": total_counts.tokens,
        "layers": layers,
        "routes_per_token": activation.routes_per_token(total_counts),
        "activated": dict(zip(activation.THRESHOLDS, activation.activated_shares(total_counts), strict=True)),
        "activated_relative": dict(
            zip(activation.RELATIVE_THRESHOLDS, activation.relative_activated_shares(total_counts.counts), strict=True)
        ),
        "head_agreement": activation.head_agreement(total_counts).tolist(),
        "domains": {
            name: {
                "tokens": counts.tokens,
                "entropy": float(activation.load_entropy(counts).mean()),
                "specialisation": activation.specialisation(counts, total_counts),
                "load": activation.expert_loads(counts.counts).tolist(),
            }
            for name, counts in by_domain.items()
        },
    }


def _training_metrics(run: "RunDir") -> list[dict[str, Any]]:
    """Return the router's metrics at evenly spread steps of the training, at most CURVE_POINTS of them."""
    from mhmoe_ray.runs import metrics
    from mhmoe_ray.runs.history import read_trend

    names = (metrics.STEP, metrics.BALANCE, metrics.ENTROPY, metrics.LEAST_EXPERT, metrics.DROPPED)
    lines = read_trend(run, run.spec().train.validate_every).curve
    points = [round(i * (len(lines) - 1) / (CURVE_POINTS - 1)) for i in range(CURVE_POINTS)]
    # In a curve with fewer lines than CURVE_POINTS, some indices occur more than once.
    return [{name: lines[i].get(name) for name in names} for i in dict.fromkeys(points)] if lines else []


def _print_training(training: list[dict[str, Any]]) -> None:
    from mhmoe_ray.runs import metrics

    formats = {metrics.BALANCE: ".3f", metrics.ENTROPY: ".3f", metrics.LEAST_EXPERT: ".2f", metrics.DROPPED: ".1%"}
    rows = [
        [f"{line[metrics.STEP]:,}", *(format_figure(line[name], form, "") for name, form in formats.items())]
        for line in training
    ]
    print_table(["step", "balance loss", "lowest entropy", "least expert", "dropped"], rows)


def _print_figures(figures: dict[str, Any]) -> None:
    rows = []
    for layer_number, layer in enumerate(figures["layers"]):
        agreement = format_figure(layer["agreement"], ".1%", "")
        loads = [f"{layer['entropy']:.3f}", f"{layer['least']:.2f}", f"{layer['most']:.2f}"]
        rows.append([str(layer_number), *loads, f"{layer['distinct']:.2f}", agreement, f"{layer['first_weight']:.3f}"])
    experts = f"experts of {figures['routes_per_token']:.4g}"
    columns = ["layer", "entropy", "least", "most", experts, "heads agree", "first weight"]
    print_table(columns, rows)
    out.print("least and most: loads, 1 is uniform; experts: different ones that a token sees, of its routes\n")
    for title, key in [
        ("experts that more than this share of the tokens see", "activated"),
        ("experts with more than this part of a uniform load", "activated_relative"),
    ]:
        curve = figures[key]
        out.print(title)
        print_table([f"{t:g}" for t in curve], [[f"{share:.1%}" for share in curve.values()]])
    rows = [
        [name, f"{d['tokens']:,}", f"{d['entropy']:.3f}", f"{d['specialisation']:.3f}"]
        for name, d in figures["domains"].items()
    ]
    out.print()
    print_table(["", "tokens", "entropy", "off the whole"], rows)
    out.print("off the whole: share of routes that go to other experts than those of all texts together")
