"""`mhmoe routing`: show which experts a run's tokens go to."""

from typing import TYPE_CHECKING, Any

from mhmoe_ray.cli.common import (
    STORAGE,
    AddressOption,
    CheckpointOption,
    JsonOption,
    RunArg,
    StorageOption,
    number_table,
    out,
    print_json,
    print_whole,
)
from mhmoe_ray.cli.eval import (
    AgainOption,
    GpusOption,
    SamplesOption,
    TextOption,
    TextSetOption,
    evaluation_of,
    make_request,
)

if TYPE_CHECKING:
    from mhmoe_ray.runs.directory import RunDir


CURVE_POINTS = 8


def routing(
    run: RunArg = None,
    text: TextOption = [],  # noqa: B006 - typer needs the list
    samples: SamplesOption = None,
    set_: TextSetOption = [],  # noqa: B006 - typer needs the list
    checkpoint: CheckpointOption = None,
    gpus: GpusOption = None,
    again: AgainOption = False,
    storage: StorageOption = STORAGE,
    address: AddressOption = None,
    json: JsonOption = False,
) -> None:
    """Show how a run's router balanced in training, and where its checkpoint sends the tokens of its held-out text or
    any other: loads, share of experts in use by threshold, how many experts a token's sub-tokens see, how often heads
    agree, and how domains and languages differ.

    For example `mhmoe routing --text books/ --samples 100`.
    """
    from mhmoe_ray.errors import RunError
    from mhmoe_ray.runs.directory import find_run

    found = find_run(run, storage)
    dense = RunError(f"run {found.id}", "it is a dense model, without a router", "name a run with experts")
    if not found.is_imported and found.spec().model.moe is None:
        raise dense  # before anything is evaluated
    request = make_request(found, checkpoint, text, set_, samples, [], [], None, gpus)
    evaluation = evaluation_of(found, request, again, address)
    if not evaluation.routing:
        raise dense
    figures = figures_of(evaluation.routing)
    training = [] if found.is_imported else _training(found)
    if json:
        print_json({"run": found.id, "checkpoint": request.checkpoint, "training": training, **figures})
        return
    if training:
        _show_training(training)
    out.print(f"\n{found.id}, {request.checkpoint}: {figures['tokens']:,} tokens of {request.said}", soft_wrap=True)
    _show(figures)


def figures_of(by_domain: "dict[str, Any]") -> dict[str, Any]:
    """Return the figures that are shown, for JSON, from the counts of routes by domain."""
    from mhmoe_ray.evaluate import activation

    whole = activation.joined(by_domain.values())
    agreement = activation.mean_agreement(whole)
    layers = [
        {
            "entropy": float(activation.entropy(whole)[layer]),
            "least": float(activation.load(whole.counts)[layer].min()),
            "most": float(activation.load(whole.counts)[layer].max()),
            "distinct": float(activation.distinct_experts(whole)[layer]),
            "agreement": None if agreement is None else float(agreement[layer]),
            "first_weight": float(activation.first_weight(whole)[layer]),
            "load": activation.load(whole.counts)[layer].tolist(),
        }
        for layer in range(len(whole.counts))
    ]
    return {
        "tokens": whole.tokens,
        "layers": layers,
        "routes_per_token": len(whole.distinct[0]) - 1,
        "activated": dict(zip(activation.THRESHOLDS, activation.activated(whole), strict=True)),
        "activated_relative": dict(zip(activation.RELATIVE, activation.activated_relative(whole.counts), strict=True)),
        "head_agreement": activation.head_agreement(whole).tolist(),
        "domains": {
            name: {
                "tokens": counts.tokens,
                "entropy": float(activation.entropy(counts).mean()),
                "specialisation": activation.specialisation(counts, whole),
                "load": activation.load(counts.counts).tolist(),
            }
            for name, counts in by_domain.items()
        },
    }


def _training(run: "RunDir") -> list[dict[str, Any]]:
    """Return the router's metrics at CURVE_POINTS or fewer steps of the training, evenly spread."""
    from mhmoe_ray.runs import metrics
    from mhmoe_ray.runs.history import course

    names = (metrics.STEP, metrics.BALANCE, metrics.ENTROPY, metrics.LEAST_EXPERT, metrics.DROPPED)
    lines = course(run, run.spec().train.validate_every).curve
    points = [round(i * (len(lines) - 1) / (CURVE_POINTS - 1)) for i in range(CURVE_POINTS)]
    return [{name: lines[i].get(name) for name in names} for i in dict.fromkeys(points)] if lines else []


def _show_training(training: list[dict[str, Any]]) -> None:
    from mhmoe_ray.runs import metrics

    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    rows = [
        [
            f"{line[metrics.STEP]:,}",
            cell(line[metrics.BALANCE], ".3f"),
            cell(line[metrics.ENTROPY], ".3f"),
            cell(line[metrics.LEAST_EXPERT], ".2f"),
            cell(line[metrics.DROPPED], ".1%"),
        ]
        for line in training
    ]
    print_whole(number_table(["step", "balance loss", "lowest entropy", "least expert", "dropped"], rows))


def _show(figures: dict[str, Any]) -> None:
    rows = []
    for number, layer in enumerate(figures["layers"]):
        agreement = "" if layer["agreement"] is None else f"{layer['agreement']:.1%}"
        loads = [f"{layer['entropy']:.3f}", f"{layer['least']:.2f}", f"{layer['most']:.2f}"]
        rows.append([str(number), *loads, f"{layer['distinct']:.2f}", agreement, f"{layer['first_weight']:.3f}"])
    experts = f"experts of {figures['routes_per_token']}"
    columns = ["layer", "entropy", "least", "most", experts, "heads agree", "first weight"]
    print_whole(number_table(columns, rows))
    out.print("least and most: loads, 1 is uniform; experts: different ones that a token sees, of its routes\n")
    for title, key in [
        ("experts that more than this share of the tokens see", "activated"),
        ("experts with more than this part of a uniform load", "activated_relative"),
    ]:
        curve = figures[key]
        out.print(title)
        print_whole(number_table([f"{t:g}" for t in curve], [[f"{share:.1%}" for share in curve.values()]]))
    rows = [
        [name, f"{d['tokens']:,}", f"{d['entropy']:.3f}", f"{d['specialisation']:.3f}"]
        for name, d in figures["domains"].items()
    ]
    out.print()
    print_whole(number_table(["", "tokens", "entropy", "off the whole"], rows))
    out.print("off the whole: share of routes that go to other experts than those of all texts together")
