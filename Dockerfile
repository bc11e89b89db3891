# streamproc in a container: the wheel and what it needs in a virtual environment, copied to a slim image, run by a user
# who is not root. It writes nothing but /tmp, so that it runs with a read-only root.
#
#   docker build -t streamproc .                                   with the demo's model and the embedded broker
#   docker build -t streamproc --build-arg EXTRAS= .               without
#   docker build -t streamproc --build-arg BASE_IMAGE=… .          on another Python (3.11 to 3.13; Debian or its kin)
#
# Your own model: `FROM streamproc` and COPY, or a volume; docs/operations.md has both.

ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
# Names of pyproject.toml's optional dependencies, with commas between.
ARG EXTRAS=demo
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY streamproc ./streamproc
RUN python -m venv /opt/streamproc \
    && /opt/streamproc/bin/pip wheel --no-deps --wheel-dir /wheels . \
    && /opt/streamproc/bin/pip install --constraint constraints.txt "$(echo /wheels/streamproc-*.whl)${EXTRAS:+[$EXTRAS]}" \
    && /opt/streamproc/bin/pip uninstall --yes pip

FROM ${BASE_IMAGE} AS runtime
RUN groupadd --gid 10001 streamproc \
    && useradd --uid 10001 --gid 10001 --create-home --shell /usr/sbin/nologin streamproc
COPY --from=build /opt/streamproc /opt/streamproc
WORKDIR /app
COPY examples ./examples
COPY topics ./topics
ENV PATH=/opt/streamproc/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
# The sidecar's default port; a container that sets STREAMPROC_HTTP__PORT is asked there.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f\"http://127.0.0.1:{os.environ.get('STREAMPROC_HTTP__PORT', 8080)}/livez\", timeout=4)"]
ENTRYPOINT ["streamproc"]
CMD ["run"]
