# Two images:
#   docker build --target cpu  --build-arg TORCH_INDEX=<index of PyTorch's CPU builds> --tag linocut:cpu .
#   docker build --target cuda --tag linocut:cuda .
#   docker run --publish 8000:8000 --volume linocut:/cache linocut:cpu [MODEL] [OPTIONS of linocut serve]
# The GPU needs `--gpus all`. Models are kept in /cache: the embedded one is fetched there at the first start.
# pip's cache is a mount and in no layer (DL3042); system packages are those of the pinned base's release (DL3008).
# hadolint global ignore=DL3042,DL3008

# ---- CPU ----

FROM python:3.12-slim AS cpu-build
# Without this extra index PyTorch comes with several GB of CUDA libraries, which work but are of no use here.
ARG TORCH_INDEX=""
ENV PIP_CACHE_DIR=/var/cache/pip PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/linocut/bin:$PATH
RUN python -m venv /opt/linocut
WORKDIR /build
COPY constraints.txt ./
RUN --mount=type=cache,target=/var/cache/pip \
    pip install --constraint constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch setuptools
COPY pyproject.toml README.md LICENSE ./
COPY kernels ./kernels
COPY engine ./engine
COPY server ./server
RUN --mount=type=cache,target=/var/cache/pip \
    pip install --constraint constraints.txt --no-build-isolation '.[embedded,fast-http]'

FROM python:3.12-slim AS cpu
LABEL org.opencontainers.image.title="Linocut" org.opencontainers.image.licenses="Apache-2.0"
# The engine compiles its kernels for the CPU at the first start: hence a C compiler, and nothing more.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin linocut \
    && install --directory --owner linocut /cache
COPY --from=cpu-build /opt/linocut /opt/linocut
ENV PATH=/opt/linocut/bin:$PATH XDG_CACHE_HOME=/cache
USER 10001
VOLUME ["/cache"]
EXPOSE 8000
# /health answers once the model is loaded; the first start fetches it before that.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["linocut", "serve", "--host", "0.0.0.0"]

# ---- CUDA ----
# The release that PyTorch's default wheel is built for. The wheel brings CUDA's libraries, so `base` is enough.

FROM nvidia/cuda:13.0.3-base-ubuntu24.04 AS cuda-build
ENV PIP_CACHE_DIR=/var/cache/pip PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/linocut/bin:$PATH
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3.12-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3.12 -m venv /opt/linocut
WORKDIR /build
COPY constraints.txt ./
# triton comes with this wheel.
RUN --mount=type=cache,target=/var/cache/pip \
    pip install --constraint constraints.txt torch setuptools
COPY pyproject.toml README.md LICENSE ./
COPY kernels ./kernels
COPY engine ./engine
COPY server ./server
RUN --mount=type=cache,target=/var/cache/pip \
    pip install --constraint constraints.txt --no-build-isolation '.[embedded,fast-http]'

FROM nvidia/cuda:13.0.3-base-ubuntu24.04 AS cuda
LABEL org.opencontainers.image.title="Linocut" org.opencontainers.image.licenses="Apache-2.0"
# Triton compiles each kernel's launcher where it runs: hence a C compiler and Python's headers, and nothing more.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates gcc libc6-dev libpython3.12-dev python3.12 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin linocut \
    && install --directory --owner linocut /cache
COPY --from=cuda-build /opt/linocut /opt/linocut
ENV PATH=/opt/linocut/bin:$PATH XDG_CACHE_HOME=/cache TRITON_CACHE_DIR=/cache/triton
USER 10001
VOLUME ["/cache"]
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["linocut", "serve", "--host", "0.0.0.0"]
