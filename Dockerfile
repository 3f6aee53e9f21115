# docker build -t registry.example.com/moescale .
# docker run --gpus all --shm-size 16g -v /shared:/shared registry.example.com/moescale \
#     launch/torchrun.sh configs/quickstart.yaml run.dir=/shared/runs/quickstart
# Change: another Python from 3.11 on. torch's own package brings the CUDA libraries, so that the host needs a driver alone.
FROM python:3.12-slim
# gcc is for Triton and torch.compile, which compile a small part of each kernel's start on the host.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /moescale
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY moescale moescale
# Change: the extras that runs need, of wandb, trace, deepspeed, megatron and hf.
RUN pip install --no-cache-dir --constraint constraints.txt --editable '.[wandb]'
COPY configs configs
COPY launch launch
# Change: the user that owns what runs write to shared disks. It is not root, and keeps its caches where it may write.
RUN useradd --uid 1000 --create-home moescale
USER 1000
ENV PYTHONUNBUFFERED=1
CMD ["moescale", "--help"]
