"""gpu.sh and the programs that it starts, rehearsed without a GPU.

A script in Python's place notes each command and runs none but the table.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import bench
import decode_speed
import helpers
import peer
import pytest
import runs
import table
import torch
import workload

import model as lm
from cli import UserError, command_line

needs_timeout = pytest.mark.skipif(not shutil.which("timeout"), reason="no timeout command")
STUB = """#!/usr/bin/env bash
printf '%s\\n' "${*//$'\\n'/ }" >>CALLS
case "$*" in
    *tests/table.py*) exec PYTHON "$@" ;;
    FAILING) exit 1 ;;
    HANGING) sleep 60 ;;
esac
echo a-model-folder
"""
SIZE = dict(group=2, turns=2, turn_tokens=4, final_tokens=4, repeats=1, dtype="fp32")
TINY = runs.as_flags(SIZE)


def run_script(folder, failing="nothing", hanging="nothing", seconds=460):
    """(what it prints, its commands, {stage: exit code}) of gpu.sh with a stub for Python."""
    calls, stub, temporary = folder / "calls", folder / "python", folder / "temporary"
    temporary.mkdir()
    names = {"CALLS": shlex.quote(str(calls)), "PYTHON": shlex.quote(sys.executable)}
    names |= {"FAILING": failing, "HANGING": hanging}
    stub.write_text(re.sub(r"\b(CALLS|PYTHON|FAILING|HANGING)\b", lambda m: names[m[0]], STUB))
    stub.chmod(0o755)
    env = {**os.environ, "PYTHON": str(stub), "OUT": str(folder / "out")}
    env |= {"TMPDIR": str(temporary), "SECONDS_IN_ALL": str(seconds)}
    script = ["bash", str(runs.ROOT / "tests" / "gpu.sh")]
    done = subprocess.run(script, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not list(temporary.iterdir())  # the models with random weights are gone
    rows = runs.rows(folder / "out", "results.jsonl")
    assert table.tables(rows) in (folder / "out" / "table.txt").read_text()
    codes = {row["name"]: row["code"] for row in rows}
    return done.stdout, calls.read_text().splitlines(), codes


@needs_timeout
def test_every_stage_starts_whatever_fails_before(tmp_path):
    _, calls, codes = run_script(tmp_path, failing="*test_gpu.py*|*default_model_folder*")
    failed = {name for name, code in codes.items() if code}
    assert failed == {"test-gpu", "default-model"}
    wanted = """decode-smollm2-135m-8 decode-smollm2-135m-128 decode-qwen3-4b-32 save-smollm2-135m
    bench-1-x-8 bench-4-x-8 peer-1-x-8 peer-4-x-8 bench-qwen3-0.6b bench-qwen3-4b run quick-tests"""
    assert set(wanted.split()) <= codes.keys() - failed
    assert any(call.startswith("- ") for call in calls)  # the run with a scripted judge


@needs_timeout
def test_without_trl_there_is_no_peer_and_one_line_that_says_so(tmp_path):
    said, calls, codes = run_script(tmp_path, failing="*find_spec*")
    assert said.count("no peer") == 1
    assert not any("peer.py" in call for call in calls)
    assert not any(codes.values())
    assert any(call.startswith("train.py") for call in calls)  # the default run


@needs_timeout
def test_every_command_of_the_script_is_one_that_its_program_takes(tmp_path):
    _, calls, _ = run_script(tmp_path)
    flags = {"bench.py": bench.Bench, "decode_speed.py": decode_speed.Speed, "peer.py": peer.Peer}
    seen = set()
    for call in calls:
        program, *given = shlex.split(call) if call.startswith("tests/") else [""]
        name = program.removeprefix("tests/")
        if name in flags:
            command_line(flags[name], given)  # raises UserError
            seen.add(name)
    assert seen == flags.keys()


@needs_timeout
@pytest.mark.slow
def test_a_stage_that_hangs_is_ended_and_the_table_printed(tmp_path):
    said, _, codes = run_script(tmp_path, hanging="*decode_speed*", seconds=11)
    assert codes == {"decode-smollm2-135m-8": 124}
    assert "== bench-4-x-8: no time left" in said


def test_a_table_has_the_columns_of_all_its_rows():
    rows = [
        {"what": "decode", "rows": 8, "graph_ms": 2.0 / 3},
        {"what": "stage", "name": "run", "code": 0},
        {"what": "decode", "rows": 128, "graph_ms": None, "peak_memory_gb": 1.0},
    ]
    assert table.tables(rows).splitlines() == [
        "== decode",
        "rows  graph_ms  peak_memory_gb",
        "8     0.667     -",
        "128   failed    1",
        "",
        "== stage",
        "name  code",
        "run   0",
    ]


def test_the_clock_waits_for_the_card(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    workload.now(torch.device("cpu"))
    assert not waited
    workload.now(torch.device("cuda", 0))
    assert waited == [torch.device("cuda", 0)]


def test_a_step_is_timed_by_that_clock_and_learns(tmp_path, monkeypatch):
    times = iter([0.0, 1.0, 3.0])
    monkeypatch.setattr(workload, "now", lambda device: next(times))
    work = bench.Workload(command_line(bench.Bench, ["--model", runs.saved_model(tmp_path), *TINY]))
    before = [p.clone() for p in work.model.parameters()]
    step = work.step(0, bench.SlowJudge(0.0))
    assert (step.play, step.learn, step.whole) == (1.0, 2.0, 3.0)
    assert any(not torch.equal(p, old) for p, old in zip(work.model.parameters(), before))


def test_a_dialogue_that_the_context_cuts_short_is_not_timed(tmp_path):
    flags = ["--model", runs.saved_model(tmp_path), *TINY, "--turn-tokens", "5000"]
    with pytest.raises(UserError, match="^--turns, --turn-tokens, --final-tokens: more than the"):
        bench.main(flags)


@pytest.mark.parametrize("program", [bench, decode_speed, peer])
def test_a_results_file_that_cannot_be_written_is_told_first(program, tmp_path):
    missing = tmp_path / "no" / "results.jsonl"
    model = [] if program is decode_speed else ["--model", str(tmp_path / "none")]
    for path, why in ((tmp_path, "Is a directory"), (missing, "No such file or directory")):
        with pytest.raises(UserError, match=f"^--json {path}: cannot be written .{why}.; name"):
            program.main(["--json", str(path), *model])


def test_a_model_is_saved_in_a_new_folder_only(tmp_path):
    (tmp_path / "config.json").write_text("a run's")
    for taken in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(UserError, match=f"^--save {taken}: cannot be made .*; name a new"):
            decode_speed.main(["--save", str(taken)])
    assert (tmp_path / "config.json").read_text() == "a run's"


def test_a_peer_without_a_model_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "config.json").write_text("{}")
    for name in ("none", tmp_path, tmp_path / "config.json"):
        with pytest.raises(
            UserError, match=rf"^--model {name}: no folder with a causal LM \([^\n]*$"
        ):
            peer.main(["--model", str(name)])


@pytest.fixture
def shaped(tmp_path, monkeypatch):
    """A folder that decode_speed.py saved, of a model that knows more ids than its tokenizer."""
    config = helpers.KINDS["qwen3"](vocab_size=900)
    monkeypatch.setitem(decode_speed.SHAPES, "small", config)
    monkeypatch.setattr(lm, "cache_folder", lambda: tmp_path / "empty")
    decode_speed.save("small", str(tmp_path / "small"))
    return str(tmp_path / "small")


def test_the_benchmark_takes_a_shape_and_is_planned_with_its_adapters(shaped, tmp_path):
    file = tmp_path / "results.jsonl"
    bench.main(["--model", shaped, "--json", str(file), "--lora-rank", "4", *TINY])
    (row,) = map(json.loads, file.read_text().splitlines())
    assert (row["what"], row["program"], row["model"]) == ("step", "ours", "small")
    assert row["dialogues"] == "1 x 2" and row["peak_memory_gb"] > 0

    def planned(**more):
        return bench.planned_gb(bench.Bench(model=shaped, dtype="bf16", **more))

    parameters = sum(p.numel() for p in lm.load(shaped)[0].parameters())
    saved = planned() - planned(lora_rank=1)
    assert saved * 1e9 > 12 * parameters  # masters, moments and gradients in fp32
    assert planned(scenarios=4) > planned()


def test_a_decoding_step_is_measured_in_each_way(shaped):
    row = decode_speed.measure(decode_speed.Speed(shape="small", rows=2, context=8, tokens=2))
    ways = ["rows_ms", "block_ms", "graph_ms"][: 3 if torch.cuda.is_available() else 2]
    assert all(row[way] > 0 for way in ways)
    assert row["share_of_limit"] == row["limit_ms"] / min(row[way] for way in ways)


def test_the_peer_prints_the_same_lines(shaped, tmp_path, capsys):
    pytest.importorskip("trl")
    file = tmp_path / "results.jsonl"
    peer.main(["--model", shaped, "--json", str(file), *TINY])
    (row,) = map(json.loads, file.read_text().splitlines())
    assert (row["what"], row["program"]) == ("step", "peer")
    said = capsys.readouterr().out
    for phase in ("play", "learn", "step"):
        assert re.search(rf"^{phase} +\d+\.\d s\b", said, re.MULTILINE)


def test_the_peer_without_trl_is_one_line(shaped, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(UserError, match="there is no (trl|datasets); .*pip install trl"):
        peer.main(["--model", shaped, *TINY])
    with pytest.raises(UserError, match="--model FOLDER"):
        peer.main([])
