#!/usr/bin/env bash
# A 7B model over eight smaller GPUs: weights sharded by FSDP2, decoder layers recomputed in the backward pass.
#
# Hardware: 8 x 24 GiB GPUs
# Time:     3 hours for 50 million tokens, estimated: a fifth of an H200's speed, and the weights sent twice per pass
# Memory:   14 GiB per GPU, estimated: 2 GiB of weights, one layer gathered, activations of 8,192 tokens
#
#     DATA=train.jsonl bash recipes/qwen7b_sft_top_8gpu_fsdp2.sh
set -euo pipefail
HERE=$(dirname "$0")
MODEL=${MODEL:-Qwen/Qwen2.5-7B}
DATA=${DATA:?the data set to select from, such as train.jsonl}
OUT=${OUT:-runs/qwen7b-fsdp2}

accelerate launch --config_file "$HERE/accelerate/fsdp2_8gpu.yaml" -m selector score --model "$MODEL" --data "$DATA" --out "$OUT/features" \
    --dtype bfloat16 --checkpoint --tokens-per-batch 8192 "$@"
selector select "$OUT/features" --budget 10% --out "$OUT/selection"
selector report "$OUT/features" "$OUT/selection" --data "$DATA" --out "$OUT/report.html"
