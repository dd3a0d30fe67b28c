#!/usr/bin/env bash
# All that a card is for, in under eight minutes; safe to start blindly.
#
#   bash tests/gpu.sh                  results in runs/gpu: results.jsonl, table.txt, a log a stage
#   OUT=folder PYTHON=python3 SECONDS_IN_ALL=400 bash tests/gpu.sh
#
# The smallest proof comes first. A stage that fails or takes too long is noted, and the next one
# starts; what is left of the time bounds each. Nothing is installed. Where the default model cannot
# be had, one of its shape with random weights and a scripted judge take its place.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

python=${PYTHON:-python}
out=${OUT:-runs/gpu}
in_all=${SECONDS_IN_ALL:-460}

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "tests/gpu.sh: $python sees no GPU, so nothing was run"
    exit 0
fi
mkdir -p "$out" || exit 2
results=$out/results.jsonl
: >"$results"
SECONDS=0

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
    printf '{"what": "stage %s", "code": %d, "seconds": %d}\n' \
        "$name" "$code" "$((SECONDS - begun))" >>"$results"
    return "$code"
}

speed() {
    stage "decode-$1-$2" "$3" "$python" tests/decode_speed.py --shape "$1" --rows "$2" --json "$results"
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null

# 1. does a step record at all, and what is a token worth?
speed smollm2-135m 8 60

# 2. what a card computes is what a CPU computes; a replay is bitwise the eager step
stage test-gpu 120 "$python" -m pytest -q -n0 tests/test_gpu.py

# 3. milliseconds a token
speed smollm2-135m 32 30
speed smollm2-135m 128 30

# 4. whole steps
model=smollm2-135m
if ! stage default-model 40 "$python" -c 'import model; model.default_model_folder()'; then
    model=$out/random-model
    stage random-model 40 "$python" tests/decode_speed.py --shape smollm2-135m --save "$model"
fi
for scenarios in 1 4; do
    stage "bench-$scenarios-x-8" 60 "$python" tests/bench.py --model "$model" \
        --scenarios "$scenarios" --group 8 --json "$results"
done

# 5. a run: the default one, or a scripted judge
if [ "$model" = smollm2-135m ]; then
    rm -rf "$out/run"
    stage run 90 "$python" train.py --steps 2 --out "$out/run"
else
    rm -rf "$out/run"
    stage run 60 "$python" - "$model" "$out/run" <<'PYTHON'
import sys

sys.path[:0] = [".", "tests"]
import runs

with runs.judge() as judge:
    size = dict(turn_tokens=48, final_tokens=64, group_size=8, steps=2)
    code, said, err = runs.Process(runs.flags(sys.argv[1], judge.url, sys.argv[2], **size)).wait()
print(said, err)
sys.exit(code)
PYTHON
fi

# 6. where a step's time goes, and larger models
stage profile 45 "$python" tests/bench.py --model "$model" --repeats 1 --profile
speed qwen3-0.6b 32 45
speed qwen3-4b 32 60

# 7. the quick tests that need no download, with what is left
stage quick-tests 120 "$python" -m pytest -q -n 4 -m "not slow" tests/test_decode.py \
    tests/test_waiting.py tests/test_grpo.py tests/test_sampler.py tests/test_model.py

"$python" tests/decode_speed.py --table "$results" | tee "$out/table.txt"
echo "== $SECONDS s; $results, $out/table.txt, a log for each stage"
