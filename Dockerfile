# Three images: `service` (CPU, without torch and training/), `service-gpu` (NVIDIA) and `train` (makes new versions).
#   docker build --target service --tag useg/service .
# Left out, 150 MB: OpenVINO's plug-ins for GPUs and NPUs and its readers of other formats, ONNX Runtime's C library and
# model tools, NumPy's tests.
# The build secret `pip`, if given, is pip's configuration; it leaves no trace in an image.
# Pin a base by its digest with --build-arg, e.g. PYTHON_IMAGE=python:3.11-slim-bookworm@sha256:…
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
# For TensorRT: NVIDIA's TensorRT image of CUDA 13 and Ubuntu 24.04.
ARG CUDA_IMAGE=nvidia/cuda:13.0.1-cudnn-runtime-ubuntu24.04

# ---- service: first the environment (dependencies before code, which changes more often), then the image.
FROM ${PYTHON_IMAGE} AS service-venv
ARG EXTRAS=service,grpc,heic,otel,signing
WORKDIR /useg
RUN python -m venv /opt/venv
COPY constraints.txt pyproject.toml README.md LICENSE ./
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    /opt/venv/bin/pip install --no-cache-dir --constraint constraints.txt ".[${EXTRAS}]" \
    && /opt/venv/bin/pip uninstall --yes useg \
    && find /opt/venv/lib/python3*/site-packages -regextype posix-extended -regex '.*/(tests|[^/]+\.pyi|\
onnxruntime/(datasets|quantization|tools|transformers|capi/libonnxruntime\.so.*)|openvino/(cmake|include|tools)|\
openvino/libs/(cache.json|libopenvino_(auto.*|hetero|intel_[gn]pu)_plugin.*|\
libopenvino_(gguf|jax|paddle|pytorch|tensorflow|tensorflow_lite)_frontend.*))' -prune -exec rm -rf {} +
COPY model model
COPY service service
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    /opt/venv/bin/pip install --no-cache-dir --constraint constraints.txt ".[${EXTRAS}]" \
    && /opt/venv/bin/pip uninstall --yes setuptools pip

FROM ${PYTHON_IMAGE} AS service
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="useg service" \
      org.opencontainers.image.description="Instance, semantic and panoptic segmentation as a REST service" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
RUN install --directory --owner=65532 --group=65532 /registry
COPY --from=service-venv /opt/venv /opt/venv
COPY deploy/seed.sh /useg/deploy/seed.sh
ENV PATH=/opt/venv/bin:$PATH PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp \
    ORT_DISABLE_TELEMETRY=1 OPENBLAS_NUM_THREADS=1 USEG_HOST=0.0.0.0 USEG_SHUTDOWN_DELAY_S=5
USER 65532:65532
EXPOSE 8000
HEALTHCHECK --start-period=30s --interval=10s --timeout=3s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=2)"]
# Needs API keys (USEG_API_KEY_FILE or USEG_API_KEYS), or USEG_ALLOW_UNAUTHENTICATED=true to run without authentication.
ENTRYPOINT ["useg", "serve"]

# ---- train
FROM ${PYTHON_IMAGE} AS train-venv
# Index of the CPU build of torch; if empty, PyPI's build for CUDA is installed.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /useg
RUN python -m venv /opt/venv
COPY constraints.txt pyproject.toml README.md LICENSE ./
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    /opt/venv/bin/pip install --no-cache-dir --constraint constraints.txt ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} \
      ".[train,quantize,heic,signing]" \
    && /opt/venv/bin/pip uninstall --yes useg
COPY model model
COPY training training
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    /opt/venv/bin/pip install --no-cache-dir --constraint constraints.txt ".[train,quantize,heic,signing]" \
    && /opt/venv/bin/pip uninstall --yes pip

FROM ${PYTHON_IMAGE} AS train
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="useg train" \
      org.opencontainers.image.description="Trains a new model version from photos without labels and adds it to a registry" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
RUN install --directory --owner=65532 --group=65532 /registry /runs
COPY --from=train-venv /opt/venv /opt/venv
COPY deploy/*.sh /useg/deploy/
ENV PATH=/opt/venv/bin:$PATH PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp \
    ORT_DISABLE_TELEMETRY=1 OPENBLAS_NUM_THREADS=1
USER 65532:65532
WORKDIR /
HEALTHCHECK NONE
ENTRYPOINT ["/useg/deploy/retrain.sh"]

# ---- service-gpu
FROM ${CUDA_IMAGE} AS service-gpu-venv
WORKDIR /useg
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
COPY constraints.txt pyproject.toml README.md LICENSE ./
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    /opt/venv/bin/pip install --no-cache-dir --constraint constraints.txt '.[service-gpu,grpc,heic,otel,signing]' onnx \
    && /opt/venv/bin/pip uninstall --yes useg
COPY model model
COPY service service
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    /opt/venv/bin/pip install --no-cache-dir --constraint constraints.txt '.[service-gpu,grpc,heic,otel,signing]' onnx \
    && /opt/venv/bin/pip uninstall --yes pip

FROM ${CUDA_IMAGE} AS service-gpu
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="useg service on a GPU" \
      org.opencontainers.image.description="Instance, semantic and panoptic segmentation as a REST service, on CUDA or TensorRT" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends python3 && rm -rf /var/lib/apt/lists/* \
    && install --directory --owner=65532 --group=65532 /registry /engines
COPY --from=service-gpu-venv /opt/venv /opt/venv
COPY deploy/seed.sh /useg/deploy/
# Mount a volume at /engines: building them takes minutes.
ENV PATH=/opt/venv/bin:$PATH PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp \
    USEG_COMPILE_CACHE=/engines ORT_DISABLE_TELEMETRY=1 OPENBLAS_NUM_THREADS=1 \
    USEG_HOST=0.0.0.0 USEG_SHUTDOWN_DELAY_S=5 USEG_BACKEND=cuda
USER 65532:65532
EXPOSE 8000
HEALTHCHECK --start-period=120s --interval=10s --timeout=3s \
  CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=2)"]
ENTRYPOINT ["useg", "serve"]

# ---- The default target.
FROM service
