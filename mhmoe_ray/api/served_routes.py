"""Ask a server for answers with routes, and compare these with the routes of a run's checkpoint."""

import os
from itertools import islice
from typing import TYPE_CHECKING, Any

from mhmoe_ray.api.checkpoints import CheckpointName, pick_checkpoint
from mhmoe_ray.api.defaults import OnNote
from mhmoe_ray.api.service import API_KEY_VARIABLE
from mhmoe_ray.errors import RunError, ServeError
from mhmoe_ray.runs.directory import RunDir

if TYPE_CHECKING:
    from mhmoe_ray.evaluate.served_routes import RouteAgreement, ServedRoutes

ANSWER_TOKENS = 16
"""Number of tokens that the server generates for each sample, after a prompt of half of the sample."""


def compare_served_routes(
    run: RunDir, checkpoint: CheckpointName | None, url: str, samples: int, on_note: OnNote
) -> tuple[str, "list[RouteAgreement]"]:
    """Return the checkpoint's name, and for each layer how often a server's experts are those of training's code.

    Prompts are held-out samples of the run. Errors are those of `pick_checkpoint`; a run without such samples is a
    RunError, and a server that does not answer, or that has other weights, is a ServeError.
    """
    # These imports load torch.
    from mhmoe_ray.checkpoint.load import load_verified_model
    from mhmoe_ray.evaluate.measure import held_out_samples
    from mhmoe_ray.evaluate.served_routes import compare_routes

    if run.is_imported:
        raise RunError(f"run {run.id}", "it was imported, so it has no held-out text to ask about", "name another run")
    path, manifest = pick_checkpoint(run, checkpoint, verify_hashes=True, on_note=on_note)
    domains = held_out_samples(run.spec().data.prepared)
    token_ids = (ids for domain in domains for ids in domain.tokens.tolist())
    prompts = [ids[: max(1, len(ids) // 2)] for ids in islice(token_ids, samples)]
    answers = _ask(url, prompts, manifest.weights_sha256, f"{run.id}, {path.name}")
    return path.name, compare_routes(load_verified_model(path, manifest), answers)


def _ask(url: str, prompts: list[list[int]], digest: str, expected_weights: str) -> "list[ServedRoutes]":
    import requests

    from mhmoe_ray.evaluate.served_routes import ServedRoutes

    key, subject = os.environ.get(API_KEY_VARIABLE, "").strip(), f"server {url}"
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    body: dict[str, Any] = {
        "prompt": prompts,
        "max_tokens": ANSWER_TOKENS,
        "temperature": 1,
        "seed": 0,
        "return_routes": True,
    }
    try:
        response = requests.post(f"{url.rstrip('/')}/v1/completions", json=body, headers=headers, timeout=600)
    except requests.RequestException as e:
        raise ServeError(subject, f"it does not answer ({type(e).__name__})", "give the URL of a server") from e
    if response.headers.get("x-mhmoe-digest", digest) != digest:
        weights = f"{response.headers['x-mhmoe-run']}, step {response.headers['x-mhmoe-step']}"
        raise ServeError(subject, f"it serves {weights}, and not {expected_weights}", "name the run and step it serves")
    if response.status_code != 200:
        raise ServeError(subject, f"it answers {response.status_code}: {response.text[:300]}", "see its log")
    return [ServedRoutes(**choice["routes"]) for choice in response.json()["choices"]]
