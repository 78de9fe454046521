#!/usr/bin/env bash
# One selection as files for LLaMA-Factory, Axolotl, ms-swift and verl, each with the settings that find them.
#
# Hardware: CPU
# Time:     seconds for 100,000 rows, estimated
# Memory:   1 GiB, estimated
#
#     DATA=train.jsonl bash recipes/export_frameworks.sh runs/qwen1.5b/selection
#
#     LLaMA-Factory   dataset_dir: OUT/llama-factory and dataset: selected in its YAML
#     Axolotl         copy the `datasets:` section of OUT/axolotl into its YAML
#     ms-swift        swift sft --dataset OUT/ms-swift/data.jsonl
#     verl            data.train_files=OUT/verl/data.parquet
set -euo pipefail
SELECTION=${1:?directory of a selection}
shift
DATA=${DATA:?the data set that was scored}
OUT=${OUT:-$SELECTION}

for FRAMEWORK in llama-factory axolotl ms-swift verl; do
    selector export "$SELECTION/selection.parquet" --data "$DATA" --to "$FRAMEWORK" --out "$OUT/$FRAMEWORK" "$@"
done
