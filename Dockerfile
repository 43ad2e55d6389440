# For NVIDIA GPUs; torch's wheels bring CUDA, the host brings the driver and the NVIDIA container toolkit.
#   docker build -t loce .
#   docker run --rm --gpus all --shm-size=16g -v "$PWD/data:/loce/data" -v "$PWD/runs:/loce/runs" loce \
#       torchrun --nproc_per_node=8 scripts/train.py stage1.yaml
FROM python:3.12-slim-bookworm
# libgl1 and libglib2.0-0: opencv-python imports them.
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgl1 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /loce
COPY . .
RUN pip install --no-cache-dir -e .
CMD ["python", "scripts/train.py", "--help"]
