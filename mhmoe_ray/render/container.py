"""The container file of all nodes: one image to train and one to serve with vLLM, whose versions exclude each other."""

from importlib.metadata import version

from mhmoe_ray.render.kuberay import UID
from mhmoe_ray.serving.config import ENVIRONMENT

TARGET_PACKAGES = {
    "serve": ("vision,vllm", ""),
    # The head node of `ray up` starts further machines with boto3 on AWS, and with Google's packages on Google Cloud. A
    # build without --target builds the last target.
    "train": ("deepspeed,eval,mlflow,vision,wandb", "boto3 google-api-python-client google-auth-httplib2"),
}
"""Extras of our package, and other packages, by target."""
_CONTAINERFILE = """\
# The image of all nodes, with or without GPUs: PyPI's torch for Linux includes CUDA. The folder dist has our wheel.
#   podman build -f cluster/Containerfile --target train -t IMAGE .    to train, and to serve with our engine
#   podman build -f cluster/Containerfile --target serve -t IMAGE .    to serve with vLLM
FROM python:3.11-slim AS base
# The operator's health probes need wget, and Ray's launcher runs `uptime` (in procps) on each new machine. Triton needs
# a C compiler for launchers of its kernels when they first run, and our kernels of backend `cpp` need g++.
RUN apt-get update \\
 && apt-get install -y --no-install-recommends wget procps rsync openssh-client gcc g++ libc6-dev \\
 && rm -rf /var/lib/apt/lists/*
# Run directories are open to their owner alone, so every node must run as the same user.
RUN useradd --create-home --uid {uid} ray
COPY dist/{wheel} /wheels/
# Ray Serve: its proxies answer errors as OpenAI's clients know them, and fewer threads hand a token on.
ENV {environment}
WORKDIR /home/ray
"""
_TARGET = """
FROM base AS {target}
RUN pip install --no-cache-dir '/wheels/{wheel}[{extras}]' \\
    'ray[default,train,data,serve]=={ray}'{packages}
USER ray
"""


def containerfile() -> str:
    """Return the text of the container file, for the installed versions of this package and of Ray."""
    wheel = f"mhmoe_ray-{version('mhmoe-ray')}-py3-none-any.whl"
    environment = " \\\n    ".join(f"{name}={value}" for name, value in ENVIRONMENT.items())
    return _CONTAINERFILE.format(uid=UID, wheel=wheel, environment=environment) + "".join(
        _TARGET.format(
            target=target, wheel=wheel, extras=extras, ray=version("ray"), packages=packages and f" {packages}"
        )
        for target, (extras, packages) in TARGET_PACKAGES.items()
    )
