#!/usr/bin/env bash
# Several nodes under Slurm: one torchrun per node, which find each other; the same command after a requeue finishes the rest.
#
# Hardware: 4 nodes of 8 x H200, a shared file system
# Time:     3 minutes for 50 million tokens and 5 to start, estimated from 882 ms measured for 16 x 512 tokens on one GPU
# Memory:   56 GiB per GPU, measured for 16 x 512 tokens
#
#     DATA=/shared/train.jsonl OUT=/shared/features sbatch recipes/qwen7b_sft_top_slurm_torchrun.sh
#SBATCH --job-name=selector
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=02:00:00
#SBATCH --requeue
set -euo pipefail
MODEL=${MODEL:-Qwen/Qwen2.5-7B}
DATA=${DATA:?the data set to select from, on a file system that all nodes share}
OUT=${OUT:-runs/qwen7b-slurm}
FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun torchrun --nnodes "$SLURM_NNODES" --nproc_per_node 8 --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID" --rdzv_endpoint "$FIRST:29500" \
    -m selector score --model "$MODEL" --data "$DATA" --out "$OUT/features" "$@"
selector select "$OUT/features" --budget 10% --out "$OUT/selection"
selector report "$OUT/features" "$OUT/selection" --data "$DATA" --out "$OUT/report.html"
