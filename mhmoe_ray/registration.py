"""Registration of this package's model with transformers' auto classes, without importing transformers.

`AutoModelForCausalLM.from_pretrained` then loads an exported MH-MoE model without `trust_remote_code`. Importing
transformers takes seconds, so the classes are registered when other code imports the auto classes.
"""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from importlib.util import find_spec
from types import ModuleType

OLDEST_TRANSFORMERS = (5, 16)
"""Oldest version of transformers tested with our model classes; with an older one nothing is registered."""
CONFIG_MODULE = "transformers.models.auto.configuration_auto"
MODEL_MODULE = "transformers.models.auto.modeling_auto"
OWN_MODULE = "mhmoe_ray.checkpoint.huggingface.modeling_mhmoe"


def _register_config(module: ModuleType) -> None:
    from mhmoe_ray.checkpoint.huggingface.configuration_mhmoe import MhmoeConfig

    module.AutoConfig.register(MhmoeConfig.model_type, MhmoeConfig, exist_ok=True)


def _register_models(module: ModuleType) -> None:
    from mhmoe_ray.checkpoint.huggingface.configuration_mhmoe import MhmoeConfig

    models = import_module(OWN_MODULE)
    if not hasattr(models, "MhmoeForCausalLM"):
        # The module with our model classes is still being imported, and one of its own imports has led to this call.
        # `_register_own_models` registers the classes when their module is complete.
        return
    module.AutoModel.register(MhmoeConfig, models.MhmoeModel, exist_ok=True)
    module.AutoModelForCausalLM.register(MhmoeConfig, models.MhmoeForCausalLM, exist_ok=True)
    module.AutoModelForSequenceClassification.register(
        MhmoeConfig, models.MhmoeForSequenceClassification, exist_ok=True
    )


def _register_own_models(_: ModuleType) -> None:
    if MODEL_MODULE in sys.modules:
        _register_models(sys.modules[MODEL_MODULE])


REGISTRATIONS: dict[str, Callable[[ModuleType], None]] = {
    CONFIG_MODULE: _register_config,
    MODEL_MODULE: _register_models,
    OWN_MODULE: _register_own_models,
}
"""Functions that register our classes, by module name; each is called with this module after its import."""


def _is_supported() -> bool:
    # With an older version of transformers, importing our model classes could fail and break the user's own import of
    # transformers.
    numbers = version("transformers").split(".")[:2]
    return tuple(map(int, numbers)) >= OLDEST_TRANSFORMERS


class _RegisteringLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        if _is_supported():
            REGISTRATIONS[module.__name__](module)


class _RegisteringFinder(MetaPathFinder):
    """Finder that wraps the loader which other finders return for a module in `REGISTRATIONS`."""

    def __init__(self) -> None:
        self._names = set(REGISTRATIONS)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self._names:
            return None
        # The name is removed, so that this finder ignores it in the nested call of `find_spec`, which asks the other
        # finders.
        self._names.remove(fullname)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


def register_with_transformers() -> None:
    """Register our model classes with transformers: at once if its modules are imported, else at their import."""
    for name, register in REGISTRATIONS.items():
        if name in sys.modules and _is_supported():
            register(sys.modules[name])
    if not any(isinstance(finder, _RegisteringFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisteringFinder())
