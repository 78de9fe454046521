#!/usr/bin/env bash
# Quick start: every step on the model and the rows that ship with the package, without a network.
#
# Hardware: 2 CPU cores
# Time:     2.5 minutes, measured
# Memory:   1.6 GiB, measured
#
#     bash recipes/tiny_gsm8k-dolly_top_cpu.sh
#
# Words after the script's name are further options of `selector score`.
set -euo pipefail
ASSETS=${ASSETS:-$(python -c 'import selector.assets; print(selector.assets.HERE)')}
MODEL=${MODEL:-$ASSETS/tiny}
DATA=${DATA:-$ASSETS/pool.jsonl}
OUT=${OUT:-runs/quick-start}

selector score --model "$MODEL" --data "$DATA" --id-column id --out "$OUT/features" "$@"
selector index "$OUT/features" --out "$OUT/index"
selector select "$OUT/features" --budget 20% --out "$OUT/selection"
selector report "$OUT/features" "$OUT/selection" --data "$DATA" --index "$OUT/index" --out "$OUT/report.html"
