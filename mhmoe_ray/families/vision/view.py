"""The lines and tables that commands show of vision models."""

from typing import TYPE_CHECKING

from mhmoe_ray.planner.view import FamilyView, FigureTable
from mhmoe_ray.spec import RunSpec

if TYPE_CHECKING:
    from mhmoe_ray.evaluate.score import VisionFigures


class VisionView(FamilyView):
    """View of vision models."""

    def summary(self, spec: RunSpec) -> dict[str, str]:
        vision = spec.model.vision
        assert vision is not None
        tasks = [
            f"{name}: images of {task.image_size} x {task.image_size} pixels in {vision.patches(task)} patches, "
            + (f"{task.classes} classes" if task.detector is None else f"objects of {task.classes} classes")
            for name, task in vision.tasks.items()
        ]
        if spec.model.moe is not None:
            router = "one router for all tasks" if vision.routers == "shared" else "a router for each task"
            adaptive = vision.adaptive
            tasks.append(router + (f", which chooses up to {adaptive.largest} experts" if adaptive else ""))
        return {"vision": "\n".join(tasks)}

    def micro_batch(self, spec: RunSpec) -> str:
        return f"{spec.tokens_per_micro_batch:,} patches"

    def tables(self, figures: "VisionFigures") -> list[FigureTable]:
        tables = [FigureTable(["", "loss"], [[name, f"{loss:.4f}"] for name, loss in figures.losses.items()])]
        if figures.classes:
            columns = ["classes of", "top 1", "top 5", "nearest pixels", "largest class", "classes", "images"]
            rows = []
            for name, score in figures.classes.items():
                shares = (score.top_1, score.top_5, score.baseline, score.largest_class)
                texts = ["-" if share is None else f"{share:.1%}" for share in shares]
                rows.append([name, *texts, f"{score.classes:,}", f"{score.images:,}"])
            tables.append(FigureTable(columns, rows))
        if figures.objects:
            columns = ["objects of", "box AP", "AP50", "AP75", "mask AP", "AP50", "any class AP50", "objects", "images"]
            rows = []
            for name, task in figures.objects.items():
                p = task.precision
                values = (p.box_ap, p.box_ap50, p.box_ap75, p.mask_ap, p.mask_ap50, p.any_class_box_ap50)
                texts = ["-" if value is None else f"{value:.3f}" for value in values]
                rows.append([name, *texts, f"{task.objects:,}", f"{task.images:,}"])
            tables.append(FigureTable(columns, rows))
        return tables
