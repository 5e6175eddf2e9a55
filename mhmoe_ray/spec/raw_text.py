"""Spec sections for raw text that a user gives as paths, without a spec file."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mhmoe_ray.spec.base import Section
from mhmoe_ray.spec.cluster import ClusterSpec
from mhmoe_ray.spec.data import DataSpec, absolute_path
from mhmoe_ray.spec.load import apply_overrides, validate_section
from mhmoe_ray.storage import resolve_path


class RawTextSpec(Section):
    """Sections of a spec that apply to raw text without a spec file."""

    data: DataSpec
    cluster: ClusterSpec = ClusterSpec()


def raw_text_sections(paths: Sequence[str], overrides: Sequence[str] = ()) -> tuple[DataSpec, ClusterSpec]:
    """Return the sections data and cluster for raw text; each path (folder, file, pattern or URL) is a source.

    A source has the name of its path's last part without a pattern, with dashes added if another source has that name.
    A wrong override is a SpecError.
    """
    sources: dict[str, Any] = {}
    for path in paths:
        parts = [part for part in path.partition("?")[0].split("/") if part and "*" not in part]
        name = parts[-1] if parts else "text"
        # Several paths may end with the same name, but each source needs a name of its own.
        while name in sources:
            name += "-"
        sources[name] = {"path": absolute_path(Path.cwd(), path)}
    # A data section must have the keys `prepared` and `seq_len`. Raw text below `prepared` is skipped, so `prepared` is
    # the null device, which holds no text. seq_len has no meaning for raw text.
    tree: dict[str, Any] = {"data": {"sources": sources, "prepared": os.devnull, "seq_len": 1}}
    spec = validate_section(RawTextSpec, apply_overrides(tree, overrides), f"text {', '.join(paths)}")
    data = spec.data
    # Relative paths become absolute, because the job that reads them has another working directory.
    given_paths = {"tokenizer": data.tokenizer, "chat_template": data.chat_template}
    return data.model_copy(
        update={key: resolve_path(Path.cwd(), path) for key, path in given_paths.items() if path}
    ), spec.cluster
