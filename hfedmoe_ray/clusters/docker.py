"""Dockerfiles of the image that every node of a cluster runs, for CPUs and for NVIDIA GPUs."""

from hfedmoe_ray.clusters.document import comment
from hfedmoe_ray.clusters.pins import BIN, IN_IMAGE, Pins

BASE = "python:3.11.13-slim-bookworm"
DECIDES = ("pyproject.toml", "constraints-cpu.txt", "Makefile", "README.md", "LICENSE")
"""Files that decide the environment."""
FOLDERS = ("hfedmoe_ray", "configs", "jobs")

_CPU = """\
# As constraints-cpu.txt explains, a plain package index serves the CUDA build of torch. For an image of 2 instead of
# 8 GB give pip the index of the CPU builds: --build-arg PIP_EXTRA_INDEX_URL=…"""
_CUDA = """\
# A plain package index serves the CUDA build of torch, which brings CUDA's libraries; the driver is the machine's. Give
# pip no index of CPU builds. (Nothing is compiled here, so that no CUDA toolkit is needed.)"""
_BODY = """\
FROM {base}

# wget: KubeRay's health probes. rsync: how Ray's launcher copies the token. make: the one description of how to
# install. Login shells, which the launcher starts, reset PATH.
RUN apt-get update \\
    && apt-get install --yes --no-install-recommends make rsync wget \\
    && rm -rf /var/lib/apt/lists/* \\
    && echo 'export PATH={bin}:$PATH' > /etc/profile.d/hfedmoe.sh \\
    && useradd --create-home --uid 1000 ray

WORKDIR {place}
RUN chown ray {place}
USER ray
{arguments}

# Only what decides the environment, so that a change of code does not install again.
COPY --chown=ray {decides} ./
COPY --chown=ray hfedmoe_ray/__init__.py hfedmoe_ray/__init__.py
RUN make install PYTHON=python3.11
ENV PATH={bin}:$PATH

{copies}
"""


def dockerfile(pins: Pins, *, gpus: bool) -> str:
    """Returns the text of the CPU or the CUDA image's Dockerfile."""
    file = f"cluster/docker/{file_name(gpus=gpus)}"
    what = "Image for nodes with NVIDIA GPUs" if gpus else "CPU image"
    header = f"{what}: exactly what `make install` installs, so that a cluster runs the pinned Ray.\n"
    header += "Rendered by `hfedmoe cluster render`; edit hfedmoe_ray/clusters/docker.py instead.\n\n"
    header += f"Build from the repository root:\n  docker build -f {file} -t {pins.image(gpus=gpus)} ."
    arguments = ["ENV PIP_NO_CACHE_DIR=1"]
    if gpus:
        arguments += ["ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility"]
    else:
        arguments = ['ARG PIP_EXTRA_INDEX_URL=""', *arguments]
    body = _BODY.format(
        base=BASE,
        bin=BIN,
        place=IN_IMAGE,
        arguments="\n".join(arguments),
        decides=" ".join(DECIDES),
        copies="\n".join(f"COPY --chown=ray {folder} {folder}" for folder in FOLDERS),
    )
    return f"{comment(header)}#\n{_CUDA if gpus else _CPU}\n{body}"


def dockerignore() -> str:
    """Returns the text of the list of what the build may see."""
    allowed = "\n".join(f"!{name}" for name in (*DECIDES, *FOLDERS))
    return f"# Only what the Dockerfile copies.\n*\n{allowed}\n**/__pycache__\n"


def file_name(*, gpus: bool) -> str:
    """Name of the Dockerfile."""
    return "Dockerfile.cuda" if gpus else "Dockerfile"
