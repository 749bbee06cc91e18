# An image for GPU nodes. PyTorch's wheels bring CUDA and NCCL, so a node needs only its driver and
# the NVIDIA Container Toolkit.
#
#   docker build -t megaconsa .
#   docker run --rm --gpus all --ipc=host -v "$PWD/runs:/workspace/runs" megaconsa megaconsa quickstart
#
# docs/container.md has more, Slurm and Apptainer too.

# Debian 12 or later, or Ubuntu 24.04.
ARG BASE=debian:12-slim
FROM ${BASE}

# Triton and PyTorch compile small launchers with gcc and Python's headers. NCCL finds InfiniBand by
# libibverbs.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates gcc g++ ibverbs-providers libibverbs1 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

# The libraries come before the sources: a change of the sources does not install them again.
WORKDIR /opt/megaconsa
COPY pyproject.toml ./
RUN python -c "import tomllib; file = open('pyproject.toml', 'rb'); \
print(*tomllib.load(file)['project']['dependencies'], sep='\n')" > /tmp/requirements.txt \
    && pip install --no-cache-dir --requirement /tmp/requirements.txt

COPY . ./
RUN pip install --no-cache-dir --no-deps .

# Runs, data and Triton's cache go where the user mounts a folder. It must not be the folder of the
# sources, which would hide the installed package.
WORKDIR /workspace
CMD ["megaconsa", "--help"]
