"""mhmoe_ray.data.prepare.job in small chunks, killed by SIGKILL when so many parts are there."""

import os
import signal
import sys
import threading
import time

import yaml

from mhmoe_ray.data.prepare.job import main
from mhmoe_ray.data.prepare.work import shared_folder
from mhmoe_ray.spec import RunSpec
from tests.data.prepare.prepare_serially import in_small_chunks


def die_at(parts: int) -> None:
    work = shared_folder(RunSpec.model_validate(yaml.safe_load(os.environ["MHMOE_SPEC"])))
    while len(list(work.glob("parts/*/*.json"))) < parts:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    in_small_chunks()
    threading.Thread(target=die_at, args=[int(sys.argv[1])], daemon=True).start()
    main()
