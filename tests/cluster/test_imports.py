import subprocess
import sys
from pathlib import Path

import mhmoe_ray.cluster


def test_cluster_modules_import_neither_ray_nor_torch_nor_requests():
    folder = Path(mhmoe_ray.cluster.__file__).parent
    modules = ", ".join(f"mhmoe_ray.cluster.{p.stem}" for p in folder.glob("[!_]*.py") if p.stem != "doctor")
    code = (
        f"import sys, {modules}; sys.exit('ray' in sys.modules or 'torch' in sys.modules or 'requests' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
