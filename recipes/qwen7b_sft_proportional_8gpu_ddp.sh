#!/usr/bin/env bash
# One node of eight GPUs, each with the whole model; the budget is in tokens, and every source keeps its share of them.
#
# Hardware: 8 x H200 (or 80 GiB GPUs)
# Time:     12 minutes for 50 million tokens, estimated from 882 ms measured for 16 x 512 tokens on one GPU
# Memory:   56 GiB per GPU, measured for 16 x 512 tokens
#
#     DATA=mixture.jsonl bash recipes/qwen7b_sft_proportional_8gpu_ddp.sh        rows need a column `source`
set -euo pipefail
HERE=$(dirname "$0")
MODEL=${MODEL:-Qwen/Qwen2.5-7B}
DATA=${DATA:?the mixture to select from, with a column source}
OUT=${OUT:-runs/qwen7b-ddp}

accelerate launch --config_file "$HERE/accelerate/ddp_8gpu.yaml" -m selector score --model "$MODEL" --data "$DATA" --out "$OUT/features" "$@"
selector select "$OUT/features" --budget "10% tokens" --policy proportional --out "$OUT/selection"
selector report "$OUT/features" "$OUT/selection" --data "$DATA" --out "$OUT/report.html"
