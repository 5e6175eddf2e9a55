"""Run the tests marked `cpu` once at each instruction level that this machine's CPU supports: `make test-cpu`.

Each level has a pytest process of its own, which gets the arguments of this script. The exit code is 1 if a test failed
at any level.
"""

import os
import subprocess
import sys

from mhmoe_kernels.cpu import CpuLevel, level_environment, machine_level

MARKER_EXPRESSION = "cpu and not slow and not system and not soak and not gpu"


def main() -> None:
    """Run the tests at each level of this machine; exit with an error that names the levels where tests failed."""
    failed_levels = []
    for level in (level for level in CpuLevel if level <= machine_level()):
        name = level.name.lower()
        print(f"--- tests marked cpu, at {name}", flush=True)
        command = [sys.executable, "-m", "pytest", "-m", MARKER_EXPRESSION, *sys.argv[1:]]
        if subprocess.run(command, env=os.environ | level_environment(level)).returncode:
            failed_levels.append(name)
    if failed_levels:
        sys.exit(f"failed at {', '.join(failed_levels)}")


if __name__ == "__main__":
    main()
