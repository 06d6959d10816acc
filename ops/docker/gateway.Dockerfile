# Gateway and edge: no torch, no transformers.
FROM python:3.11-slim-bookworm
# pip's own settings, for builds behind a mirror
ARG PIP_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_CERT
WORKDIR /app
COPY pyproject.toml constraints.txt README.md ./
COPY common common
COPY gateway gateway
COPY worker worker
COPY ops ops
RUN pip install --no-cache-dir -c constraints.txt .
WORKDIR /data
ENV HOSTNAME=0.0.0.0 PORT=80 PYTHONUNBUFFERED=1
EXPOSE 80
HEALTHCHECK --interval=5s --timeout=3s --start-period=20s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:80/health/live', timeout=2)"]
ENTRYPOINT ["inferfleet"]
CMD ["gateway"]
