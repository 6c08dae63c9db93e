# The page: `fathom client` on port 7860. It speaks HTTP with the API and needs no torch. From the root of the repository:
#   docker build -f docker/client.Dockerfile -t fathom-client .
#   docker run --rm -p 127.0.0.1:7860:7860 -e FATHOM_API_URL=http://HOST:5000 fathom-client
ARG PYTHON_IMAGE=python:3.11.15-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/fathom
ENV PATH=/opt/fathom/bin:$PATH
WORKDIR /src
COPY docker/requirements.py pyproject.toml constraints.txt ./
# Of the base packages only those that the command line and the page import.
RUN python requirements.py --base typer rich pydantic --extra client > packages.txt \
    && pip install -c constraints.txt -r packages.txt
COPY . .
RUN pip install --no-deps .

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="fathom-client" \
      org.opencontainers.image.description="Fathom's page: text, chat, and the experts of every token" \
      org.opencontainers.image.licenses="MIT"
RUN groupadd --gid 10001 fathom \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin fathom
COPY --from=build /opt/fathom /opt/fathom
COPY docker/healthcheck.py /opt/docker/
ENV PATH=/opt/fathom/bin:$PATH \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp GRADIO_TEMP_DIR=/tmp/gradio GRADIO_ANALYTICS_ENABLED=False HF_HUB_OFFLINE=1 \
    FATHOM_API_URL=http://model-service:5000
USER 10001:10001
WORKDIR /tmp
EXPOSE 7860
HEALTHCHECK --interval=10s --timeout=6s --start-period=60s --retries=3 \
    CMD ["python", "/opt/docker/healthcheck.py", "http://127.0.0.1:7860/health"]
ENTRYPOINT ["fathom", "client", "--host", "0.0.0.0"]
