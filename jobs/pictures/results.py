"""Draw results.svg, which compares MH-MoE with SMoE, from the losses in jobs/paper/losses.

It runs as `python jobs/pictures/results.py`.
"""

import json
from pathlib import Path

from mhmoe_ray import plotting
from mhmoe_ray.report.seeds import pair_values

LOSSES = Path(__file__).parent.parent / "paper" / "losses" / "gates.json"
VARIANTS = {"fine-grained": "fine-grained SMoE", "mhmoe-h2": "MH-MoE, h 2", "mhmoe-h3": "MH-MoE, h 3"}


def difference(variant: str) -> tuple[float, float, float]:
    """Return a variant's loss on held-out text less SMoE's, in nats per token, and the ends of its 95% interval."""
    rows = json.loads(LOSSES.read_text())
    losses = pair_values(rows["smoe"]["losses"], rows[variant]["losses"])
    assert losses is not None
    test = losses.test()
    assert test is not None
    return losses.difference, test.low, test.high


def main() -> None:
    """Draw the differences with raw gates and with gates that add up to 1, and save results.svg beside this file."""
    with plotting.style():
        figure = plotting.new_figure(6.4, 2.7)
        axis = figure.subplots()
        axis.axvline(0, color=plotting.GREY, linewidth=1)
        for shift, colour, label, ending in (
            (-0.12, plotting.VERMILION, "gate weights as in the paper's code", "-raw"),
            (0.12, plotting.BLUE, "gate weights that add up to 1", ""),
        ):
            for position, name in enumerate(VARIANTS):
                mean, low, high = difference(name + ending)
                axis.errorbar(
                    mean, position + shift, xerr=[[mean - low], [high - mean]], fmt="o", color=colour, capsize=3,
                    label=label if position == 0 else None,
                )  # fmt: skip
        axis.set_yticks(range(len(VARIANTS)), list(VARIANTS.values()))
        axis.invert_yaxis()
        axis.set(xlabel="nats per token of held-out text, less SMoE's; left is better", ylim=(2.5, -0.5))
        figure.legend(loc="outside lower center", ncols=2)
        figure.savefig(Path(__file__).with_name("results.svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
