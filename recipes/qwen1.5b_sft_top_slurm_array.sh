#!/usr/bin/env bash
# A Slurm array for a data set of many files: each task scores one file on one GPU and waits for nobody.
#
# Hardware: 1 x 40 GiB GPU per task
# Time:     35 minutes per file of 50 million tokens on an H200, estimated from 346 ms measured for 16 x 512 tokens
# Memory:   25 GiB, measured for 16 x 512 tokens
#
#     sbatch --array=0-15 recipes/qwen1.5b_sft_top_slurm_array.sh parts/        parts/00.jsonl to parts/15.jsonl
#
# Every file keeps its own tenth: scores are compared within a file, not between files.
#SBATCH --job-name=selector
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
set -euo pipefail
FILES=("${1:?directory of JSONL files}"/*.jsonl)
shift
MODEL=${MODEL:-Qwen/Qwen2.5-1.5B}
DATA=${FILES[$SLURM_ARRAY_TASK_ID]}
OUT=${OUT:-runs/qwen1.5b-array}/$(basename "$DATA" .jsonl)

selector score --model "$MODEL" --data "$DATA" --out "$OUT/features" "$@"
selector select "$OUT/features" --budget 10% --out "$OUT/selection"
selector export "$OUT/selection/selection.parquet" --data "$DATA" --out "$OUT/subset"
