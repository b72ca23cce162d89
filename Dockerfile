# One image for head and worker nodes. State lies in /data unless TUNESMITH_DATABASE_URL and TUNESMITH_STORAGE_URL say otherwise.
FROM python:3.11-slim

# The engine compiles its kernels for the processor that it runs on.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY pyproject.toml requirements.lock README.md ./
COPY service service
COPY training training
RUN pip install --no-cache-dir --constraint requirements.lock '.[postgres,s3,wandb,mlflow,tensorboard]' \
    && useradd --create-home --uid 1000 tunesmith \
    && install --directory --owner tunesmith /data

USER tunesmith
ENV TUNESMITH_HOME=/data
VOLUME /data
EXPOSE 8000
# Inside a container loopback is not reachable: publish the port only where keys alone may guard it.
CMD ["tunesmith", "up", "--host", "0.0.0.0"]
