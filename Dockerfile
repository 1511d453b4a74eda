# syntax=docker/dockerfile:1
# A node that runs as nobody in particular: no compiler, no root, nothing but /data to write to.
#
#   docker build --target node -t shoal:slim .                             stores and relays
#   docker build --target node -t shoal:train --build-arg EXTRAS=[train] . learns too
#   docker build --target router -t shoal:router .                         a NAT for docker-compose.yml
#
# On amd64 PyTorch's default wheels bring gigabytes of CUDA along. Those for the CPU lie in an index of PyTorch's own
# (its "Get Started" page names it): --build-arg PIP_EXTRA_INDEX_URL=THAT_INDEX, with a version such as 2.9.0+cpu in
# --build-arg TORCH.

ARG PYTHON_IMAGE=python:3.11-slim-bookworm
ARG DEBIAN_IMAGE=debian:bookworm-slim

FROM ${PYTHON_IMAGE} AS builder
# libp2p's fastecdsa exists as source only.
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential libgmp-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /build
COPY pyproject.toml README.md LICENSE ./
COPY src src
COPY cli cli
COPY crdt crdt
COPY dht dht
COPY node node
COPY protocol protocol
COPY training training
ARG EXTRAS=""
ARG TORCH=""
ARG PIP_EXTRA_INDEX_URL=""
RUN python -m venv /opt/shoal \
    && /opt/shoal/bin/pip install --no-cache-dir ".${EXTRAS}" ${TORCH:+"torch==${TORCH}"}

FROM ${DEBIAN_IMAGE} AS router
RUN apt-get update \
    && apt-get install -y --no-install-recommends iproute2 nftables \
    && rm -rf /var/lib/apt/lists/*

FROM ${PYTHON_IMAGE} AS node
# A volume that is mounted over one of the folders takes over whose it is.
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgmp10 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --home-dir /data --no-create-home --shell /usr/sbin/nologin shoal \
    && install -d -o shoal -g shoal -m 0700 /data \
    && install -d -o shoal -g shoal -m 0755 /shared
COPY --from=builder /opt/shoal /opt/shoal
ENV PATH=/opt/shoal/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    SHOAL_HOME=/data
USER 10001:10001
VOLUME /data
EXPOSE 4001/tcp
HEALTHCHECK --interval=10s --timeout=10s --start-period=20s --retries=3 CMD ["shoal", "status"]
ENTRYPOINT ["shoal"]
CMD ["up", "--listen", "/ip4/0.0.0.0/tcp/4001"]
