# Worker: the agent and its engine.

# the kernels for every kind of CPU; what is served from has no C++ compiler
FROM python:3.11-slim-bookworm AS kernels
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY common/__init__.py common/errors.py common/
COPY worker/__init__.py worker/
COPY worker/kernels worker/kernels
RUN mkdir finished && python -m worker.kernels.build finished

FROM python:3.11-slim-bookworm
# Triton has what launches its kernels on a GPU made by a C compiler
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
# pip's own settings, for builds behind a mirror
ARG PIP_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_CERT
WORKDIR /app
COPY pyproject.toml constraints.txt README.md ./
RUN pip install --no-cache-dir -c constraints.txt torch==2.13.0
COPY common common
COPY gateway gateway
COPY worker worker
COPY --from=kernels /app/finished worker/kernels/finished
COPY ops ops
RUN pip install --no-cache-dir -c constraints.txt '.[worker]'
WORKDIR /data
ENV HF_HOME=/data INFERFLEET_METRICS_PORT=9000 PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=/data/triton
EXPOSE 9000
HEALTHCHECK --interval=5s --timeout=3s --start-period=600s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:9000/metrics', timeout=2)"]
ENTRYPOINT ["inferfleet"]
CMD ["worker"]
