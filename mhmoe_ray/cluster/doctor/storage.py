"""The folder that holds run directories: whether it can be written and read, how fast, and by whom."""

import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from mhmoe_ray.cluster.doctor.finding import Finding
from mhmoe_ray.storage import Location, replace_file

SIZE = 8 << 20


def storage_findings(folder: Location) -> Iterator[Finding]:
    data = secrets.token_bytes(SIZE)
    probe = folder / f".doctor-{secrets.token_hex(4)}"
    made = isinstance(folder, Path) and not folder.exists()
    try:
        start = time.perf_counter()
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(probe, data)
        written = time.perf_counter()
        same = probe.read_bytes() == data
        read = time.perf_counter()
        probe.unlink()
        if made and isinstance(folder, Path):
            folder.rmdir()
    except OSError as e:
        yield Finding(
            "error",
            "storage",
            f"{folder}: {getattr(e, 'strerror', None) or e}",
            "name one that you can write: --storage",
        )
        return
    if not same:
        yield Finding("error", "storage", f"{folder}: what was written is not what is read", "use another one")
        return
    rates = f"writes {SIZE / (written - start) / 1e6:,.0f} MB/s, reads {SIZE / (read - written) / 1e6:,.0f} MB/s"
    yield Finding("ok", "storage", f"{folder}: {rates}")
    if isinstance(folder, Path) and not made:
        loose = [p.name for p in folder.iterdir() if _is_loose_run(p)]
        if loose:
            said = f"others can read {', '.join(loose[:3])}" + (f" and {len(loose) - 3} more" if len(loose) > 3 else "")
            yield Finding("warning", "run directories", said, "chmod 700 them")


def _is_loose_run(path: Path) -> bool:
    try:
        return bool(path.stat().st_mode & (stat.S_IRWXO | stat.S_IRWXG)) and (path / "run.json").exists()
    except OSError:  # somebody else's, or gone meanwhile
        return False
