"""The container file: one image for head, data nodes and workers."""

from importlib.metadata import version

from mhmoe_ray.serve.config import ENVIRONMENT

UID = 1000
"""The user's, and its group's."""
CONTAINERFILE = """\
# All nodes of a cluster, with or without GPUs: PyPI's torch for Linux brings CUDA along.
#   podman build -f cluster/Containerfile -t IMAGE .       in the project's root
FROM python:3.11-slim
# wget: the operator's health probes ask with it. procps: Ray's launcher ends old processes with it. A C compiler:
# Triton builds with it what starts its kernels, where they first run; g++ builds our kernels of backend `cpp`.
RUN apt-get update \\
 && apt-get install -y --no-install-recommends wget procps rsync openssh-client gcc g++ libc6-dev \\
 && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml README.md /src/
COPY mhmoe_ray /src/mhmoe_ray
COPY kernels /src/kernels
# The extras that jobs may need. boto3, and Google's two: the head of `ray up` starts machines with them.
RUN pip install --no-cache-dir '/src[deepspeed,eval,mlflow]' 'ray[default,train,data,serve]=={ray}' \\
    boto3 google-api-python-client google-auth-httplib2 \\
 && rm -rf /src
# Run directories are open to their owner alone: every node must be the same user.
RUN useradd --create-home --uid {uid} ray
# Of Ray Serve: errors of its proxies as OpenAI's clients know them, and fewer threads between a token and its client.
ENV {environment}
USER ray
WORKDIR /home/ray
"""


def containerfile() -> str:
    environment = " \\\n    ".join(f"{name}={value}" for name, value in ENVIRONMENT.items())
    return CONTAINERFILE.format(ray=version("ray"), uid=UID, environment=environment)
