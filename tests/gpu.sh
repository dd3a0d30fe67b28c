#!/usr/bin/env bash
# All that a card is for, in under eight minutes; safe to start blindly.
#
#   bash tests/gpu.sh                  results in runs/gpu: results.jsonl, table.txt, a log a stage
#   OUT=folder PYTHON=python3 SECONDS_IN_ALL=400 bash tests/gpu.sh
#
# The smallest proof comes first. A stage that fails or takes too long is noted, and the next one
# starts; what is left of the time bounds each. Nothing is installed: without trl there is no peer.
# Where the default model cannot be had, one of its shape with random weights and a scripted judge
# take its place. Models with random weights lie in a temporary folder while used (4B: 8 GB).
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

python=${PYTHON:-python}
out=${OUT:-runs/gpu}
in_all=${SECONDS_IN_ALL:-460}
SECONDS=0  # bash counts them from here

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "tests/gpu.sh: $python sees no GPU, so nothing was run"
    exit 0
fi
mkdir -p "$out" || exit 2
results=$out/results.jsonl
: >"$results"
scratch=$(mktemp -d) || exit 2
trap 'rm -rf "$scratch"' EXIT

# stage NAME LIMIT COMMAND...: run it for at most LIMIT seconds, and no longer than is left
stage() {
    local name=$1 limit=$2 begun=$SECONDS code left
    shift 2
    left=$((in_all - SECONDS))
    if ((left < 10)); then
        echo "== $name: no time left"
        return 1
    fi
    ((limit > left)) && limit=$left
    echo "== $name"
    timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
    code=$?
    tail -n 6 "$out/$name.log"
    printf '{"what": "stage", "name": "%s", "code": %d, "seconds": %d}\n' \
        "$name" "$code" "$((SECONDS - begun))" >>"$results"
    return "$code"
}

# speed SHAPE ROWS LIMIT: milliseconds a token
speed() {
    stage "decode-$1-$2" "$3" "$python" tests/decode_speed.py --json "$results" \
        --shape "$1" --rows "$2"
}

# save SHAPE LIMIT: a folder in $scratch of a model with random weights
save() {
    stage "save-$1" "$2" "$python" tests/decode_speed.py --shape "$1" --save "$scratch/$1"
}

# bench NAME LIMIT FLAG...: whole steps, beside what --plan says of their memory
bench() {
    local name=$1 limit=$2
    shift 2
    stage "bench-$name" "$limit" "$python" tests/bench.py --json "$results" "$@"
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null

# 1. does a step record at all, and what is a token worth?
speed smollm2-135m 8 60

# 2. what a card computes is what a CPU computes; a replay is bitwise the eager step
stage test-gpu 120 "$python" -m pytest -q -n0 tests/test_gpu.py

# 3. milliseconds a token, and the share of the bandwidth limit
speed smollm2-135m 32 30
speed smollm2-135m 128 30
speed qwen3-0.6b 32 45
speed qwen3-4b 32 60

# 4. whole steps, and where the time of one goes
if stage default-model 40 "$python" -c 'import model; print(model.default_model_folder())'; then
    model=$(tail -n 1 "$out/default-model.log")
else
    save smollm2-135m 40
    model=$scratch/smollm2-135m
fi
bench 1-x-8 60 --model "$model" --scenarios 1 --profile
bench 4-x-8 60 --model "$model" --scenarios 4

# 5. the peer, its passes about as large as ours on a card
if "$python" -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("trl"))'; then
    for scenarios in 1 4; do
        stage "peer-$scenarios-x-8" 75 "$python" tests/peer.py --model "$model" \
            --scenarios "$scenarios" --micro-batch 16 --repeats 3 --json "$results"
    done
else
    echo "== no peer: $python has no trl (pip install trl==1.16)"
fi

# 6. whole steps of larger models; all of 4B trained would need more than 80 GB (train.py --plan)
save qwen3-0.6b 30 && bench qwen3-0.6b 60 --model "$scratch/qwen3-0.6b" --repeats 2
rm -rf "$scratch/qwen3-0.6b"
save qwen3-4b 60 && bench qwen3-4b 110 --model "$scratch/qwen3-4b" --repeats 2 --lora-rank 16
rm -rf "$scratch/qwen3-4b"

# 7. a run: the default one, or a scripted judge
rm -rf "$out/run"
if [ "$model" != "$scratch/smollm2-135m" ]; then
    stage run 90 "$python" train.py --steps 2 --out "$out/run"
else
    stage run 60 "$python" - "$model" "$out/run" <<'PYTHON'
import sys

sys.path[:0] = [".", "tests"]
import runs
import train

size = dict(turn_tokens=48, final_tokens=64, group_size=8, steps=2, dtype="auto")
with runs.judge() as judge:
    sys.exit(train.main(runs.flags(sys.argv[1], judge.url, sys.argv[2], **size)))
PYTHON
fi
rm -rf "$out/run/checkpoints"

# 8. the quick tests that need no download, with what is left
stage quick-tests 120 "$python" -m pytest -q -n 4 -m "not slow" tests/test_decode.py \
    tests/test_waiting.py tests/test_grpo.py tests/test_sampler.py tests/test_model.py

"$python" tests/table.py "$results" | tee "$out/table.txt"
echo "== $SECONDS s; $results, $out/table.txt, a log for each stage"
