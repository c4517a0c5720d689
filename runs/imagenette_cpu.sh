#!/usr/bin/env bash
# The ladder on two processor cores: does masked pre-training help, and which targets and masks?
#
#   runs/imagenette_cpu.sh IMAGENETTE [OUT]     IMAGENETTE: a folder with train and val pictures of ten classes
#
# 64-pixel pictures, beit_tiny_patch8_64 (width 192, depth 6) where MODEL names no other. Four pre-trainings
# that differ in one thing, each fine-tuned and probed like the same network from scratch. Kill it whenever
# you like: the same line goes on. MODEL, EPOCHS, TUNE_EPOCHS and ARMS="dvae-blocks" make it shorter;
# SEEDS="0 1 2" repeats it.
# The table: benchmarks/ladder.py. At reduced size it is run, killed and run again by tests/commands/test_runs.py.
set -euo pipefail
data=${1:?which folder holds the pictures? usage: runs/imagenette_cpu.sh IMAGENETTE [OUT]}
out=${2:-runs/imagenette_cpu}
epochs=${EPOCHS:-25} tune_epochs=${TUNE_EPOCHS:-8} tokenizer_steps=${TOKENIZER_STEPS:-1500}
seeds=${SEEDS:-0} batch=${BATCH:-64} arms=${ARMS:-dvae-blocks dvae-random vqkd-blocks pixels-blocks}
model=${MODEL:-beit_tiny_patch8_64} lr=${LR:-1.5e-3} hidden=${HIDDEN:-64} workers=${WORKERS:-2}
img_size=${IMG_SIZE:-64}
beit=${BEIT:-.venv/bin/beit}
size=(--model "$model" --img-size "$img_size")

step() {  # a run that has ended has its model
    local folder=$1; shift
    if [ -e "$folder/config.json" ]; then echo "there already: $folder"; else echo "+ $*"; "$@"; fi
}

for arm in $arms; do
    case $arm in
    dvae-blocks | dvae-random | vqkd-blocks | vqkd-random | pixels-blocks | pixels-random) ;;
    *) echo "ARMS is '$arms'; it takes dvae, vqkd or pixels, with -blocks or -random behind each" >&2; exit 2 ;;
    esac
done

# The photographs once at 96 pixels, so that reading them is no part of the comparison.
"$beit" shard "$data" "$out/pictures" --short-side 96 --quality 95
data=$out/pictures

for seed in $seeds; do
    here=$out/seed-$seed
    mkdir -p "$here"
    [[ $arms != *dvae* ]] ||
        step "$here/dvae" "$beit" train-tokenizer "$data" -o "$here/dvae" --img-size "$img_size" --vocab-size 1024 \
            --hidden-dim "$hidden" --workers "$workers" --steps "$tokenizer_steps" --batch-size 64 --seed "$seed"
    [[ $arms != *vqkd* ]] ||
        step "$here/vqkd" "$beit" train-tokenizer "$data" -o "$here/vqkd" --kind vqkd "${size[@]}" \
            --vocab-size 1024 --decoder-depth 1 --workers "$workers" --steps "$tokenizer_steps" --batch-size 64 \
            --lr 1e-3 --seed "$seed"
    for arm in $arms; do
        tokenizer=$here/${arm%-*}
        [ "${arm%-*}" = pixels ] && tokenizer=pixels
        step "$here/$arm" "$beit" pretrain "$data" --tokenizer "$tokenizer" -o "$here/$arm" "${size[@]}" \
            --masks "${arm#*-}" --epochs "$epochs" --warmup-epochs 2 --batch-size "$batch" --lr "$lr" \
            --drop-path 0 --crop-scale 0.2 1.0 --probe-data "$data" --workers "$workers" \
            --look-epochs $(((epochs + 1) / 2)) --seed "$seed"
    done
    for name in scratch $arms; do
        start=$here/$name
        [ "$name" = scratch ] && start=$model
        step "$here/$name.tuned" "$beit" finetune "$data" --model "$start" --img-size "$img_size" \
            -o "$here/$name.tuned" --workers "$workers" --method full --use-epoch last --epochs "$tune_epochs" \
            --warmup-epochs $((tune_epochs > 1)) --batch-size 64 --lr 1e-3 --layer-decay 1 --drop-path 0 \
            --crop-scale 0.2 1.0 --no-report --seed "$seed"
        [ "$name" = scratch ] && continue
        [ -e "$here/$name.probe.json" ] ||
            "$beit" probe "$data" --model "$start" --layers all --kinds linear,knn -o "$here/$name.probe.json"
    done
done
"$(dirname "$beit")/python" benchmarks/ladder.py "$out"
