"""Which of the contestants can be measured here: those whose package is installed."""

from collections.abc import Callable, Mapping
from importlib.util import find_spec


def there(needs: Mapping[str, str | None], tell: Callable[[str], None]) -> list[str]:
    """Names of those that can, in their order.

    Args:
        needs: the package of each; None where it needs none beside ours.
        tell: gets a line for each of the others.
    """
    missing = {name: package for name, package in needs.items() if package and find_spec(package) is None}
    for name, package in missing.items():
        tell(f"{name} is not measured: {package} is not installed")
    return [name for name in needs if name not in missing]
