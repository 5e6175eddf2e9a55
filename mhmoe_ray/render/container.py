"""The container file: one image for head, data nodes and workers."""

from importlib.metadata import version

CONTAINERFILE = """\
# All nodes of a cluster, with or without GPUs: PyPI's torch for Linux brings CUDA along.
#   podman build -f Containerfile -t IMAGE .       in the project's root
FROM python:3.11-slim
# wget: the operator's health probes ask with it. procps: Ray's launcher ends old processes with it.
RUN apt-get update \\
 && apt-get install -y --no-install-recommends wget procps rsync openssh-client \\
 && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml README.md /src/
COPY mhmoe_ray /src/mhmoe_ray
COPY kernels /src/kernels
RUN pip install --no-cache-dir /src 'ray[default,train,data,serve]=={ray}' && rm -rf /src
# Run directories are open to their owner alone: every node must be the same user.
RUN useradd --create-home --uid 1000 ray
USER ray
WORKDIR /home/ray
"""


def containerfile() -> str:
    return CONTAINERFILE.format(ray=version("ray"))
