# qvl serve on a CPU, as a user without rights. Never built yet: there was no Docker where it was written.
#
#   docker build -t qvl --build-arg TORCH_INDEX=... .
#   docker run --rm --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges --memory 16g --pids-limit 256 \
#     -v "$PWD/runs/quickstart/checkpoint:/model:ro" -v "$PWD/keys:/run/secrets/keys:ro" -p 127.0.0.1:8000:8000 qvl
#
# A container's loopback is its own, so the server inside listens at 0.0.0.0 and for that wants keys, one a line (openssl rand -hex 32 > keys).
# -p 127.0.0.1:8000:8000 keeps the port to this machine; without the address Docker opens it to the whole network, past most firewalls.
# The model is called "model" (add --name to the end of the line for another), and clients send a key as "Authorization: Bearer KEY". There is
# no compiler in the image, so torch's kernels answer, slower than README's figures; the engine's own want g++ in it and --tmpfs /tmp:exec.
# For more than this machine put a proxy with TLS in front. The memory limit is what --memory takes its share of.
FROM python:3.11-slim-bookworm

ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /app
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY qvl qvl
# torch first. Name torch's index of CPU builds (--build-arg TORCH_INDEX=...): the usual Linux wheel brings gigabytes of libraries for another
# device.
ARG TORCH_INDEX=
RUN PIP_INDEX_URL="$TORCH_INDEX" pip install "$(grep '^torch==' constraints.txt)" \
    && pip install -c constraints.txt '.[serve]' \
    && rm -rf /app/* \
    && useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin qvl

USER 10001
EXPOSE 8000
# The only route without a key.
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# SIGTERM finishes what runs; docker stop --time 40 leaves it the 30 seconds it takes at most.
STOPSIGNAL SIGTERM
ENTRYPOINT ["qvl", "serve", "--model", "/model", "--host", "0.0.0.0", "--port", "8000", "--api-key-file", "/run/secrets/keys"]
