"""Draw results.svg, which compares MH-MoE with SMoE, from the tables of jobs/paper/RESULTS.md.

It runs as `python jobs/pictures/results.py`.
"""

import re
from pathlib import Path

from mhmoe_ray import plotting

RESULTS = Path(__file__).parent.parent / "paper" / "RESULTS.md"
RAW, NORMALISED = "The follow-up paper's comparison, at equal compute", "The same with gate weights that add up to 1"
VARIANTS = {"fine-grained": "fine-grained SMoE", "mhmoe-h2": "MH-MoE, h 2", "mhmoe-h3": "MH-MoE, h 3"}


def differences(section: str) -> dict[str, tuple[float, float, float]]:
    """Return each variant's loss on held-out text less SMoE's, in nats per token, with its 95% interval.

    Args:
        section: heading of the section of RESULTS.md whose table of differences is read.

    Returns:
        Difference, and lower and upper end of its interval, by the name of the variant.
    """
    text = re.search(rf"^## {re.escape(section)}\n(.*?)(?=^## )", RESULTS.read_text(), re.S | re.M)[1]
    row = re.compile(r"^\| ([\w-]+)(?:, normalised)? +\| ([+-][\d.]+) +\| ([+-][\d.]+) to ([+-][\d.]+) +\|", re.M)
    return {name: (float(mean), float(low), float(high)) for name, mean, low, high in row.findall(text)}


def main() -> None:
    """Draw the differences with raw gates and with gates that add up to 1, and save results.svg beside this file."""
    with plotting.style():
        figure = plotting.new_figure(6.4, 2.7)
        axis = figure.subplots()
        axis.axvline(0, color=plotting.GREY, linewidth=1)
        for shift, colour, label, section in (
            (-0.12, plotting.VERMILION, "gate weights as in the paper's code", RAW),
            (0.12, plotting.BLUE, "gate weights that add up to 1", NORMALISED),
        ):
            difference_by_variant = differences(section)
            for position, name in enumerate(VARIANTS):
                mean, low, high = difference_by_variant[name]
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
