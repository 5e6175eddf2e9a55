"""`mhmoe presets`: list models by name, each compared with its reference model."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mhmoe_ray.cli import options
from mhmoe_ray.cli.output import print_json, print_line, print_table

if TYPE_CHECKING:
    from mhmoe_ray.planner.presets import Preset


LEFT_COLUMNS = ("preset", "reference: ratio of parameters, of multiply-adds")
RIGHT_COLUMNS = ("h", "E", "k", "f", "parameters", "active", "multiply-adds")


def presets(
    part: Annotated[str, typer.Argument(help="List only presets with this in their names.", show_default=False)] = "",
    json: options.JsonOption = False,
) -> None:
    """List the models that `preset:` names in a spec, with sizes and ratios to their reference models."""
    from mhmoe_ray.errors import SpecError
    from mhmoe_ray.planner.resolve import all_presets

    rows = [_preset_row(name, size, preset) for name, size, preset in all_presets() if part in name]
    if not rows:
        raise SpecError(f"preset {part}", "no preset has this in its name", "see all of them with `mhmoe presets`")
    if json:
        print_json(rows)
        return
    cells = []
    for row in rows:
        ratios = [f"{row[key]:.3f}" if row[key] else "" for key in ("parameters_ratio", "multiply_adds_ratio")]
        names = f"{row['preset']} {row['size'] or ''}", f"{row['reference']}: {', '.join(ratios)}"
        shape = [str(row[key] or "") for key in "hEkf"]
        counts = [_format_count(row[key]) for key in ("parameters", "active", "multiply_adds")]
        cells.append([names[0], names[1] if row["reference"] else "", *shape, *counts])
    print_table([*LEFT_COLUMNS, *RIGHT_COLUMNS], cells, names=LEFT_COLUMNS)
    # The descriptions of all presets would drown the table.
    if len(rows) == 1:
        print_line(f"\n{rows[0]['about']}")


def _preset_row(name: str, size: Any, preset: "Preset") -> dict[str, Any]:
    from mhmoe_ray.planner.match import compare_models
    from mhmoe_ray.planner.resolve import preset_models
    from mhmoe_ray.planner.sizes import compute_sizes

    model, reference = preset_models(preset)
    model_sizes, moe = compute_sizes(model), model.moe
    ratios = compare_models(model, reference) if reference else {}
    return {
        "preset": name,
        "size": size,
        "about": preset.description,
        "h": moe.heads if moe else None,
        "E": moe.experts if moe else None,
        "k": moe.top_k if moe else None,
        "f": moe.d_expert if moe else None,
        "parameters": model_sizes.parameters,
        "active": model_sizes.active_parameters,
        "multiply_adds": model_sizes.macs_per_token,
        "reference": preset.reference,
        "parameters_ratio": ratios["parameters"].ratio if ratios else None,
        "multiply_adds_ratio": ratios["multiply-adds per token"].ratio if ratios else None,
    }


def _format_count(count: int) -> str:
    return f"{count / 1e9:.3g} G" if count >= 1e9 else f"{count / 1e6:.3g} M"
