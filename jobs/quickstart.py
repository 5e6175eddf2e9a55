"""Run the quickstart, from raw text to a served completion: the commands that a user would type, one after another.

`make quickstart` runs this script. The environment variable KEEP=1 leaves the cluster and the served model running. If
RAY_API_SERVER_ADDRESS names a cluster, the script neither starts nor stops a cluster, and stops only the served model.
"""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import urllib.request
from typing import Any

from mhmoe_ray.serving.family import curl_command

SPEC = "jobs/quickstart.yaml"
PROMPT = "Fellow citizens of the Senate and of the House of Representatives:"


def mhmoe(*args: str) -> None:
    """Print an `mhmoe` command as a user would type it, and run it; raise CalledProcessError if it fails."""
    print(f"\n$ mhmoe {shlex.join(args)}", flush=True)
    subprocess.run([sys.executable, "-m", "mhmoe_ray.cli.app", *args], check=True)


def ask(*args: str) -> Any:
    """Run an `mhmoe` command with --json, and return the parsed output."""
    return json.loads(subprocess.check_output([sys.executable, "-m", "mhmoe_ray.cli.app", *args, "--json"]))


def free_port(preferred_port: int) -> int:
    """Return `preferred_port`, or any free port if it is taken."""
    for port in (preferred_port, 0):
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(s.getsockname()[1])
    raise AssertionError("a free port always exists")


def complete(url: str, prompt: str) -> str:
    """Return the completion of `prompt` by the served model at `url`."""
    body = json.dumps({"prompt": prompt, "max_tokens": 48, "temperature": 0.7, "seed": 1}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return str(json.load(answer)["choices"][0]["text"])


def refuse_served_models() -> None:
    """End the script with a message if the cluster serves a model already.

    Ray Serve has one address for all models of a cluster, and the served model may have the name of the new one.
    """
    if served := ask("serve", "status"):
        names = ", ".join(application["name"] for application in served)
        print(f"error: the cluster serves {names} already; stop it first: mhmoe serve down NAME", file=sys.stderr)
        sys.exit(10)


def main() -> None:
    """Prepare sample text, train a model on it, serve the model, and print a completion.

    The command line's arguments are `key=value` overrides of the spec.
    """
    overrides = sys.argv[1:]
    sets = [word for override in overrides for word in ("--set", override)]
    values = dict(override.split("=", 1) for override in overrides if "=" in override)
    storage = ("--storage", values["storage"]) if "storage" in values else ()
    is_running = ask("cluster", "status") is not None
    starts_cluster = not os.environ.get("RAY_API_SERVER_ADDRESS") and not is_running
    keep = os.environ.get("KEEP") == "1"
    deployed = False
    if is_running:
        refuse_served_models()
    try:
        mhmoe("data", "sample", "data/sample")
        mhmoe("data", "prepare", SPEC, *sets)
        earlier_runs = {run["run"] for run in ask("list", *storage)}
        mhmoe("submit", SPEC, *sets)
        # Others may submit runs at the same time, so the run is the one with this name that was not listed before.
        run_id = next(
            run["run"]
            for run in ask("list", values.get("name", "quickstart"), *storage)
            if run["run"] not in earlier_runs
        )
        mhmoe("status", run_id, *storage)
        run = ask("status", run_id, *storage)
        port = free_port(8000)
        deployed = True
        mhmoe("serve", "deploy", run_id, *storage, "--set", f"serve.port={port}")
        url = f"http://127.0.0.1:{port}"
        print(f"\n{PROMPT} ...{complete(url, PROMPT)}")
        print(f"\nrun directory  {run['path']}\ndashboard      {run['dashboard']}")
        print(f"ask it         {curl_command(url, 'v1/completions', {'prompt': PROMPT})}", flush=True)
    finally:
        if keep:
            print("\nstill running; end it with: .venv/bin/mhmoe cluster down")
        elif starts_cluster:
            mhmoe("cluster", "down")
        elif deployed:
            mhmoe("serve", "down")
    if not keep:
        print("\nthe server is stopped; KEEP=1 make quickstart leaves it running")


if __name__ == "__main__":
    # The default action of SIGTERM would end the process at once. An exception runs the `finally` that stops the server
    # and the cluster.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    except subprocess.CalledProcessError as e:
        sys.exit(e.returncode)
    except KeyboardInterrupt:
        sys.exit(130)
