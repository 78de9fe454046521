#!/usr/bin/env bash
# LoRA on a small card: weights of the checkpoint in 4 bits, activations of one decoder layer at a time.
#
# Hardware: 1 x 24 GiB GPU
# Time:     9 hours for 10,000 samples of 1,000 tokens, estimated: a tenth of an H200's speed, and unpacking in each pass
# Memory:   12 GiB, estimated: 6 GiB of weights, one layer's activations of 4,096 tokens, logits
#
#     pip install bitsandbytes
#     DATA=train.jsonl bash recipes/llama8b_lora_top_24gb_4bit.sh
#
# MODEL may be any checkpoint that bitsandbytes has quantized, or a folder with a PEFT adapter on one.
set -euo pipefail
MODEL=${MODEL:-unsloth/Meta-Llama-3.1-8B-bnb-4bit}
DATA=${DATA:?the data set to select from, such as train.jsonl}
OUT=${OUT:-runs/llama8b-4bit}

selector score --model "$MODEL" --data "$DATA" --out "$OUT/features" --projections q k v o --checkpoint --tokens-per-batch 4096 "$@"
selector select "$OUT/features" --budget 10% --out "$OUT/selection"
selector report "$OUT/features" "$OUT/selection" --data "$DATA" --out "$OUT/report.html"
