#!/bin/bash
# Measures the op's figures of README.md and docs/limits.md anew, in one go, on an idle machine:
# about a quarter of an hour with AVX-512, an hour without. JSON of each part, and the tables, go to
# the folder that is named.
#
#   loadtest/figures.sh figures
set -euo pipefail

out=$(mkdir -p "${1:?a folder, please}" && cd "$1" && pwd)
cd "$(dirname "$0")/.."

# SALE's own setting: 4 bits, every row, tiles of 32; its error is what others are held to.
paper='{"selector": "sale", "bits": 4, "tau": 0.008, "tile": 32, "row_stride": 1, "tail": 0, "sink": 32}'
# A wider window, which pays from 16K on.
wide='{"selector": "sale", "tau": 0.0019, "local": 768, "sink": 16}'
tau() { printf '{"selector": "%s", "tau": %s}' "$1" "$2"; }

measure() { # name, then kernels.py's options
    printf '\n==> %s\n' "$1"
    .venv/bin/python loadtest/kernels.py --json "$out/$1.json" "${@:2}"
}

for shape in smollm2 llama gemma; do
    measure "keep-all-$shape" --shape $shape --length 16384 --rows 2048 --repeats 5 --policy dense
    measure "short-$shape" --shape $shape --length 256 --length 512 --length 1024 --length 2048 \
        --repeats 7 --policy sale
done
for length in 32768 65536 131072; do
    measure "llama-$length" --shape llama --length $length --chunks 4 --policy sale --policy mass
done
measure smollm2-8192 --input captured --length 8192 --repeats 2 \
    --policy sale --policy "$(tau sale 0.0015)" --policy "$paper"
measure smollm2-16384 --input captured --length 16384 --repeats 2 --policy sale \
    --policy "$wide" --policy "$(tau sale 0.00175)" --policy "$(tau mass 0.004)" --policy "$paper"
for threads in 1 2 1 2; do
    for shape in smollm2 llama; do
        name=threads-$threads-$shape
        [[ -e $out/$name.json ]] && name+=-again
        measure "$name" --shape $shape --length 8192 --threads $threads --policy sale
    done
done

.venv/bin/python loadtest/limits.py "$out"/llama-*.json "$out"/smollm2-*.json | tee "$out/limits.md"
