# latent-medi in a container. The folder mounted at /data holds data and results; no process is root.
#
#   docker build -t latent-medi .                                      # torch of PyPI, with CUDA
#   docker build -t latent-medi:cpu \
#       --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu . # without CUDA
#   docker run --rm --gpus all --shm-size 2g --user "$(id -u):$(id -g)" -v "$PWD:/data" latent-medi demo
ARG PYTHON=3.12
FROM python:${PYTHON}-slim
ARG TORCH_INDEX=

# The layer that changes least comes first: torch, the other packages, latent-medi. New code is a new last layer of a
# few MB. Downloads stay in the builder's cache, and the source is mounted: neither is in a layer.
RUN python -m venv /opt/venv
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=bind,source=requirements/constraints.txt,target=/src/requirements/constraints.txt \
    /opt/venv/bin/pip install --constraint /src/requirements/constraints.txt \
    ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch torchvision
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=bind,source=requirements/constraints.txt,target=/src/requirements/constraints.txt \
    --mount=type=bind,source=pyproject.toml,target=/src/pyproject.toml \
    /opt/venv/bin/python -c "import tomllib; project = tomllib.load(open('/src/pyproject.toml', 'rb'))['project']; \
    print(*project['dependencies'], *(p for x in ('lora', 'track', 'slides') for p in project['optional-dependencies'][x]), sep='\n')" \
    | /opt/venv/bin/pip install --constraint /src/requirements/constraints.txt --requirement /dev/stdin
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=bind,target=/src \
    /opt/venv/bin/pip install --no-deps /src

RUN useradd --create-home medi && mkdir /data && chown medi /data
USER medi
WORKDIR /data
# Caches lie in the mounted folder, so that weights are downloaded once, whatever --user says.
ENV PATH=/opt/venv/bin:$PATH HF_HOME=/data/.cache/huggingface TORCH_HOME=/data/.cache/torch MPLCONFIGDIR=/tmp
ENTRYPOINT ["latent-medi"]
CMD ["--help"]
