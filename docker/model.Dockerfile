# The model service: `fathom serve` on port 5000. From the root of the repository:
#   docker build -f docker/model.Dockerfile -t fathom-model .
#   docker run --rm -p 127.0.0.1:5000:5000 -v ./runs/demo:/model:ro fathom-model
ARG PYTHON_IMAGE=python:3.11.15-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
# An index for torch alone. Empty: the registry's own wheel, which on Linux is the CUDA build (docker-compose.gpu.yml).
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/fathom
ENV PATH=/opt/fathom/bin:$PATH
WORKDIR /src
# What changes seldom comes first: torch, then the packages, then Fathom itself.
COPY docker/requirements.py pyproject.toml constraints.txt ./
RUN python requirements.py --pin torch > torch.txt \
    && pip install --no-deps ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} -r torch.txt \
    && python requirements.py --base --extra serve > packages.txt \
    && pip install -c constraints.txt -r packages.txt
COPY . .
RUN pip install --no-deps .

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="fathom-model" \
      org.opencontainers.image.description="A run of Fathom behind OpenAI's API" \
      org.opencontainers.image.licenses="MIT"
# The CPU kernels are compiled for the processor that they run on, when the service starts.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN groupadd --gid 10001 fathom \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin fathom
COPY --from=build /opt/fathom /opt/fathom
COPY docker/model.py docker/healthcheck.py /opt/docker/
# The root may be read-only: whatever is written goes to /tmp.
ENV PATH=/opt/fathom/bin:$PATH \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp FATHOM_CACHE=/tmp/fathom MPLCONFIGDIR=/tmp/matplotlib TRITON_CACHE_DIR=/tmp/triton \
    HF_HUB_OFFLINE=1 \
    FATHOM_MODEL=/model
USER 10001:10001
WORKDIR /tmp
EXPOSE 5000
HEALTHCHECK --interval=10s --timeout=6s --start-period=120s --retries=3 \
    CMD ["python", "/opt/docker/healthcheck.py", "http://127.0.0.1:5000/ready"]
# Options of `fathom serve` may follow the image's name, or stand in FATHOM_SERVE_OPTIONS.
ENTRYPOINT ["python", "/opt/docker/model.py"]
