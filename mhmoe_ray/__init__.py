"""Train, inspect and serve Multi-Head Mixture-of-Experts language models on Ray.

    import mhmoe_ray as mh

    run = mh.submit(mh.load_spec("jobs/quickstart.yaml"))
    run.wait()
    with mh.load(run) as model:
        print(model.generate("Fellow citizens", max_tokens=40).text)

`__all__` is the Python interface, and mhmoe_ray/api/README.md walks through it. Each name of the interface is imported
when it is first used, so that `import mhmoe_ray` loads neither torch nor ray. The import also prepares transformers'
auto classes to load exported MH-MoE models. It does not matter whether transformers was imported before.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mhmoe_ray.registration import register_with_transformers

if TYPE_CHECKING:
    from mhmoe_ray.api.checkpoints import Checkpoint
    from mhmoe_ray.api.engine_thread import Answer
    from mhmoe_ray.api.model import LoadedModel, load
    from mhmoe_ray.api.model_plan import plan_model
    from mhmoe_ray.api.plan import plan
    from mhmoe_ray.api.run import Run, find_run, list_runs, submit
    from mhmoe_ray.api.search import search_plans
    from mhmoe_ray.api.service import Service, ServiceUpdate, find_service, serve
    from mhmoe_ray.api.spec import load_spec
    from mhmoe_ray.checkpoint.huggingface.config import ExportResult
    from mhmoe_ray.errors import MhmoeError
    from mhmoe_ray.evaluate.request import Evaluation
    from mhmoe_ray.serving.answer import AnswerPiece
    from mhmoe_ray.spec import RunSpec

__all__ = [
    "Answer",
    "AnswerPiece",
    "Checkpoint",
    "Evaluation",
    "ExportResult",
    "LoadedModel",
    "MhmoeError",
    "Run",
    "RunSpec",
    "Service",
    "ServiceUpdate",
    "find_run",
    "find_service",
    "list_runs",
    "load",
    "load_spec",
    "plan",
    "plan_model",
    "search_plans",
    "serve",
    "submit",
]
__version__ = "0.3.0"

_MODULES = {
    "Answer": "mhmoe_ray.api.engine_thread",
    "AnswerPiece": "mhmoe_ray.serving.answer",
    "Checkpoint": "mhmoe_ray.api.checkpoints",
    "Evaluation": "mhmoe_ray.evaluate.request",
    "ExportResult": "mhmoe_ray.checkpoint.huggingface.config",
    "LoadedModel": "mhmoe_ray.api.model",
    "MhmoeError": "mhmoe_ray.errors",
    "Run": "mhmoe_ray.api.run",
    "RunSpec": "mhmoe_ray.spec",
    "Service": "mhmoe_ray.api.service",
    "ServiceUpdate": "mhmoe_ray.api.service",
    "find_run": "mhmoe_ray.api.run",
    "find_service": "mhmoe_ray.api.service",
    "list_runs": "mhmoe_ray.api.run",
    "load": "mhmoe_ray.api.model",
    "load_spec": "mhmoe_ray.api.spec",
    "plan": "mhmoe_ray.api.plan",
    "plan_model": "mhmoe_ray.api.model_plan",
    "search_plans": "mhmoe_ray.api.search",
    "serve": "mhmoe_ray.api.service",
    "submit": "mhmoe_ray.api.run",
}
"""Module of each name of the Python interface; it is imported at the first use of the name."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_transformers()
