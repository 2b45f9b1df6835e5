# The image of DVT Serve, for CPUs or for an NVIDIA GPU. docs/deploy.md says how it is run.
#
#   docker build -t dvt-serve:cpu .
#   docker build -t dvt-serve:gpu --build-arg EXTRA=gpu .
#   docker build --target sbom --output type=local,dest=dist .      its parts, as CycloneDX
#
# PYTHON_IMAGE           any image with Python 3.11 or newer and its venv, at the same path in every stage
# EXTRA                  cpu or gpu
# TENSORRT               0: the GPU image without TensorRT, where NVIDIA's index cannot be reached
# TENSORRT_LIBS_SHA256   what the wheel of TensorRT's libraries must have; none is known to PyPI

ARG PYTHON_IMAGE=docker.io/library/python:3.13-slim-trixie
ARG EXTRA=cpu


# -- everything that is installed, in /opt/dvt

FROM ${PYTHON_IMAGE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
COPY deploy/requirements/ requirements/
# Tools in an environment of their own: what is installed has neither pip nor setuptools.
RUN python3 -m venv tools \
    && tools/bin/pip install --require-hashes --only-binary :all: -r requirements/build.txt \
    && python3 -m venv --without-pip /opt/dvt
ARG EXTRA
RUN case "$EXTRA" in cpu|gpu) ;; *) echo "EXTRA is cpu or gpu, not $EXTRA" >&2; exit 1 ;; esac \
    && tools/bin/pip --python /opt/dvt/bin/python install \
        --require-hashes --no-deps --only-binary :all: -r "requirements/$EXTRA.txt"
ARG TENSORRT=1
ARG TENSORRT_LIBS_SHA256=
RUN set -eu; \
    if [ "$EXTRA" = gpu ] && [ "$TENSORRT" = 1 ]; then \
        version=$(sed -n 's/^tensorrt-cu13==\([0-9.]*\).*/\1/p' requirements/tensorrt.txt); \
        echo "tensorrt-cu13-libs==$version ${TENSORRT_LIBS_SHA256:+--hash=sha256:$TENSORRT_LIBS_SHA256}" > libs.txt; \
        tools/bin/pip download --no-deps --only-binary :all: --index-url https://pypi.nvidia.com -d wheels -r libs.txt; \
        tools/bin/pip wheel --require-hashes --no-deps --no-build-isolation -w wheels -r requirements/tensorrt.txt; \
        tools/bin/pip --python /opt/dvt/bin/python install --no-index --no-deps wheels/tensorrt*.whl; \
        rm -r wheels; \
    fi
COPY pyproject.toml README.md ./
COPY server/ server/
COPY model/ model/
COPY export/ export/
RUN tools/bin/pip wheel --no-deps --no-build-isolation -w wheels . \
    && tools/bin/pip --python /opt/dvt/bin/python install --no-index --no-deps wheels/dvt_serve-*.whl


# -- what it consists of: --target sbom

FROM build AS inventory
RUN python3 -m venv cyclonedx \
    && cyclonedx/bin/pip install --require-hashes --no-deps --only-binary :all: -r requirements/sbom.txt \
    && cyclonedx/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
        -o dvt-serve.cdx.json /opt/dvt/bin/python

FROM scratch AS sbom
COPY --from=inventory /build/dvt-serve.cdx.json /


# -- what runs

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="DVT Serve" \
      org.opencontainers.image.description="An inference server for Dynamic Vision Transformers"
ENV PATH=/opt/dvt/bin:$PATH \
    # Nobody could keep bytecode in a root that is read-only.
    PYTHONDONTWRITEBYTECODE=1 \
    # numpy multiplies next to nothing here, and would have a thread for every core of the machine.
    OPENBLAS_NUM_THREADS=1 \
    DVT_HOST=0.0.0.0 \
    # In memory only: whoever mounts a volume names it.
    DVT_STATE_DIR= \
    # On a GPU: TensorRT's engines that are missing are built at the start. On CPUs nobody looks there.
    DVT_BUILD_ENGINES=true \
    DVT_ENGINE_DIR=/var/cache/dvt \
    # For NVIDIA's container runtime: the driver that computes, and nothing of graphics. Which GPUs, says who runs it.
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build /opt/dvt /opt/dvt
COPY deploy/healthcheck.py /opt/dvt/healthcheck.py
# Volumes begin with these rights: for the image's own user, and for any user of group 0.
# The dry run shows that all is in order, and leaves behind the bytecode that the base image lacks of the standard library.
RUN install -d -o 65532 -g 0 -m 0770 /var/lib/dvt /var/cache/dvt \
    && PYTHONDONTWRITEBYTECODE='' DVT_OPEN_CONTROL=true dvt serve --engine onnx --dry-run
EXPOSE 8000
USER 65532:65532
ENTRYPOINT ["dvt"]
CMD ["serve"]
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python3", "/opt/dvt/healthcheck.py"]
