# t2v for GPUs and CPUs. The driver comes from the container runtime, CUDA and NCCL with torch, so a
# plain Debian is enough; give it by digest: --build-arg BASE_IMAGE=debian@sha256:...
ARG BASE_IMAGE=debian:bookworm-slim
FROM ${BASE_IMAGE}

# The compiler is for torch.compile.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates gcc libc6-dev python3 python3-dev python3-venv tini \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/archives/*.deb \
    && useradd --uid 1000 --create-home --shell /usr/sbin/nologin t2v

ENV PATH=/opt/t2v/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

# What t2v needs at its pinned versions, without its tests' needs; a site's pip configuration may be
# mounted as the secret `pip`, and leaves no trace.
COPY pyproject.toml requirements.lock /app/
RUN --mount=type=secret,id=pip,target=/etc/pip.conf,mode=0444 \
    python3 -m venv /opt/t2v \
    && pip install setuptools==84.2.1 \
    && python3 -c "import tomllib; print(*tomllib.load(open('/app/pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > /tmp/needed.txt \
    && pip install --requirement /tmp/needed.txt --constraint /app/requirements.lock \
    && rm /tmp/needed.txt

# Installed in place, for the recipes lie beside the code.
COPY README.md LICENSE /app/
COPY configs /app/configs
COPY data_pipeline /app/data_pipeline
COPY cluster /app/cluster
COPY t2v /app/t2v
RUN pip install --no-deps --no-build-isolation --no-index --editable /app && pip check

USER 1000:1000
WORKDIR /home/t2v
ENTRYPOINT ["tini", "-g", "--"]
CMD ["t2v", "--help"]
