"""Run the tests marked `cpu` once at each level that this machine has, each time in a new pytest: `make test-cpu`.

Further arguments go to every pytest. The exit code is 1 if one of them failed.
"""

import os
import subprocess
import sys

from mhmoe_kernels.cpu import CpuLevel, level_environment, machine_level

MARKED = "cpu and not slow and not system and not soak and not gpu"


def main() -> None:
    failed = []
    for level in (level for level in CpuLevel if level <= machine_level()):
        name = level.name.lower()
        print(f"--- tests marked cpu, at {name}", flush=True)
        command = [sys.executable, "-m", "pytest", "-m", MARKED, *sys.argv[1:]]
        if subprocess.run(command, env=os.environ | level_environment(level)).returncode:
            failed.append(name)
    if failed:
        sys.exit(f"failed at {', '.join(failed)}")


if __name__ == "__main__":
    main()
