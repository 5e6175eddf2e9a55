"""Tables in which `mhmoe eval` shows the evaluation of a vision model."""

from typing import TYPE_CHECKING

from mhmoe_ray.cli.common import number_table, print_untruncated

if TYPE_CHECKING:
    from mhmoe_ray.evaluate.score import VisionFigures


def print_vision_figures(figures: "VisionFigures") -> None:
    """Print a vision model's losses by task, the accuracy of classification, and the average precision of detection."""
    rows = [[name, f"{loss:.4f}"] for name, loss in figures.losses.items()]
    print_untruncated(number_table(["", "loss"], rows))
    if figures.classes:
        columns = ["classes of", "top 1", "top 5", "nearest pixels", "largest class", "classes", "images"]
        rows = []
        for name, score in figures.classes.items():
            shares = (score.top_1, score.top_5, score.baseline, score.largest_class)
            texts = ["-" if share is None else f"{share:.1%}" for share in shares]
            rows.append([name, *texts, f"{score.classes:,}", f"{score.images:,}"])
        print_untruncated(number_table(columns, rows))
    if figures.objects:
        columns = ["objects of", "box AP", "AP50", "AP75", "mask AP", "AP50", "any class AP50", "objects", "images"]
        rows = []
        for name, task in figures.objects.items():
            p = task.precision
            values = (p.box_ap, p.box_ap50, p.box_ap75, p.mask_ap, p.mask_ap50, p.any_class_box_ap50)
            texts = ["-" if value is None else f"{value:.3f}" for value in values]
            rows.append([name, *texts, f"{task.objects:,}", f"{task.images:,}"])
        print_untruncated(number_table(columns, rows))
