"""Models that a run can start from, without files."""

from pathlib import Path

from mhmoe_ray.checkpoint.start.source import StartModel
from mhmoe_ray.runs.start import Ancestor
from mhmoe_ray.spec import ModelSpec


def start_model(model: ModelSpec) -> StartModel:
    """Return a model to start from, of which only the spec exists."""
    return StartModel(
        source="run",
        ancestor=Ancestor(name="run", path="", step=0, tokens=0),
        path=Path(),
        manifest=None,
        model_type=None,
        model=model,
        seq_len=64,
        tokenizer_file=Path(),
        adds_start=True,
        ends=[],
        chat_template=None,
    )
