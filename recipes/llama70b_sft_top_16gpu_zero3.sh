#!/usr/bin/env bash
# A 70B model over two nodes: weights sharded by DeepSpeed ZeRO-3. Run it on both nodes; node 0 selects when all is scored.
#
# Hardware: 2 nodes of 8 x 80 GiB GPUs, a shared file system
# Time:     4 hours for 50 million tokens, estimated: ten times a 7B pass per token, and the weights gathered in every pass
# Memory:   40 GiB per GPU, estimated: 9 GiB of weights, one layer gathered, activations of 8,192 tokens
#
#     NODE=0 ADDRESS=node0 DATA=train.jsonl bash recipes/llama70b_sft_top_16gpu_zero3.sh      on the first node
#     NODE=1 ADDRESS=node0 DATA=train.jsonl bash recipes/llama70b_sft_top_16gpu_zero3.sh      on the second
set -euo pipefail
HERE=$(dirname "$0")
MODEL=${MODEL:-meta-llama/Llama-3.1-70B}
DATA=${DATA:?the data set to select from, such as train.jsonl}
OUT=${OUT:-runs/llama70b}

accelerate launch --config_file "$HERE/accelerate/zero3_16gpu.yaml" --machine_rank "${NODE:?0 or 1}" --main_process_ip "${ADDRESS:?name of node 0}" \
    --main_process_port 29500 -m selector score --model "$MODEL" --data "$DATA" --out "$OUT/features" \
    --dtype bfloat16 --projections q k v o --checkpoint --tokens-per-batch 8192 "$@"
[ "$NODE" = 0 ] || exit 0
selector select "$OUT/features" --budget 10% --out "$OUT/selection"
selector report "$OUT/features" "$OUT/selection" --data "$DATA" --out "$OUT/report.html"
