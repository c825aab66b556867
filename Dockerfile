# The service on the CPU: no torch, no compiler, no root.
FROM python:3.12-slim-bookworm AS build
WORKDIR /useg
RUN python -m venv /opt/venv
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY model model
COPY service service
COPY training training
RUN /opt/venv/bin/pip install --no-cache-dir --constraint constraints.txt '.[service]'

FROM python:3.12-slim-bookworm AS service
LABEL org.opencontainers.image.title="useg" \
      org.opencontainers.image.description="Instance, semantic and panoptic segmentation as a REST service" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 USEG_HOST=0.0.0.0 ORT_DISABLE_TELEMETRY=1 \
    OPENBLAS_NUM_THREADS=1 USEG_DRAIN_DELAY_S=5
USER 65532:65532
EXPOSE 8000
HEALTHCHECK --start-period=30s --interval=10s --timeout=3s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=2)"]
# Refuses to start without API keys (USEG_KEY_FILE, USEG_KEYS), unless USEG_ALLOW_ANYONE=true says that whoever reaches it may ask.
ENTRYPOINT ["useg-serve"]
