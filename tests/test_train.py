"""train.py as a person meets it: what a run leaves behind, how it complains, how it stops."""

import collections
import contextlib
import dataclasses
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
import types

import helpers
import pytest
import runs
import torch
from servers import REPLIES, JudgeServer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import checkpoint
import cli
import dataset
import grpo
import model as lm
import progress
import train
from chat import Turn
from policy import World
from rubric import RUBRIC
from run import Ended, Run, Stop, claim, cut_after, open_run, refuse_taken
from settings import Settings, read_settings

METRICS = """
step reward_mean reward_std reward_min reward_max agreed_rate turns_mean judge_failures
uniform_groups truncated_rate loss grad_norm clip_frac kl_ref entropy logprob_gap sampled_tokens
trained_tokens seconds_play seconds_judge seconds_learn seconds_step peak_memory_gb
"""
DIALOGUE = """
step scenario_id group member personas dilemma streams turns agreed stop final final_ids reward
advantage judge
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return runs.saved_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def judge():
    with runs.judge() as server:
        yield server


@pytest.fixture(scope="module")
def finished(tiny, judge, tmp_path_factory):
    """A run of three steps that has ended well: (folder, stdout)."""
    out = tmp_path_factory.mktemp("run") / "run"
    run = runs.Process(runs.flags(tiny, judge.url, out, save_every=1, keep=2, epoch_steps=1))
    code, said, err = run.wait()
    assert code == 0, err
    assert run.gone()
    return out, said


def test_metrics_keep_the_contract(finished):
    rows = runs.rows(finished[0])
    assert [r["step"] for r in rows] == [1, 2, 3]
    for row in rows:
        assert row.keys() >= set(METRICS.split())
        assert row["judge_failures"] == row["missing_rewards"] == row["kl_ref"] == 0
        assert not row["skipped"] and row["grad_norm"] > 0 and row["logprob_gap"] < 1e-4
        assert 0 < row["reward_min"] <= row["reward_mean"] <= row["reward_max"] <= 5
        phases = row["seconds_play"] + row["seconds_judge"] + row["seconds_learn"]
        assert row["seconds_step"] == pytest.approx(phases, abs=1e-3)


def test_dialogues_keep_the_contract(finished, tiny):
    rows, chat = runs.rows(finished[0], "dialogues.jsonl"), AutoTokenizer.from_pretrained(tiny)
    order = itertools.product((1, 2, 3), (0, 1), range(3))
    assert [(r["step"], r["group"], r["member"]) for r in rows] == list(order)
    for row in rows:
        assert row.keys() >= set(DIALOGUE.split())
        assert row["reward"] is not None and row["stop"] == "max_turns"
        assert len(row["turns"]) == len(row["streams"]) == 2
        for stream, turn in zip(row["streams"], row["turns"]):
            assert stream["speaker"] == turn["speaker"]
            (sample,) = stream["samples"]
            ids, mask, logprobs = sample["ids"], sample["mask"], sample["logprobs"]
            assert len(ids) == len(mask) == len(logprobs)
            sampled = [i for i, m in zip(ids, mask) if m]
            assert chat.decode(sampled, skip_special_tokens=True).strip() == turn["text"]
            assert all(logprob < 0 for logprob, m in zip(logprobs, mask) if m)
        assert chat.decode(row["final_ids"], skip_special_tokens=True).strip() == row["final"]
        # the judge sees it tidied
        assert row["reward"] == pytest.approx(min(5.0, len(set(row["final"])) / 8), abs=1.0)
    for _, group in itertools.groupby(rows, key=lambda r: (r["step"], r["group"])):
        group = list(group)
        rewards = torch.tensor([[r["reward"] for r in group]], dtype=torch.float64)
        wanted = grpo.group_advantages(rewards)[0].tolist()
        assert [r["advantage"] for r in group] == pytest.approx(wanted)
        assert len({json.dumps([r["dilemma"], r["personas"]]) for r in group}) == 1


def test_checkpoints_load_like_any_model(finished, tiny):
    folders = sorted((finished[0] / "checkpoints").iterdir())
    assert [f.name for f in folders] == ["step_000002", "step_000003"]
    ids = torch.tensor([[5, 6, 7]])
    before = AutoModelForCausalLM.from_pretrained(tiny)(ids).logits
    for folder in folders:
        AutoTokenizer.from_pretrained(folder)
        logits = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        assert torch.isfinite(logits).all() and not torch.equal(logits, before)
        assert lm.load(str(folder))[0].config.model_type == "llama"
    config = json.loads((finished[0] / "config.json").read_text())
    assert config["group_size"] == 3 and config["lr"] == 1e-3 and config["recipe"] == "debug"
    assert set(config) == set(Settings.__dataclass_fields__) | {"contents"}
    # as they were found
    assert config["judge_mode"] == "json" and config["judge_model"] == "scripted"


def test_a_checkpoint_says_in_both_spellings_what_transformers_4_and_5_call_otherwise(
    finished, tmp_path
):
    """PITFALLS 47: 4 took its own rope_theta where it found none, without a word."""
    folder = finished[0] / "checkpoints" / "step_000003"
    config = json.loads((folder / "config.json").read_text())
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert "rope_scaling" not in config
    chat = json.loads((folder / "tokenizer_config.json").read_text())
    assert chat["tokenizer_class"] == "PreTrainedTokenizerFast"  # 4 has no TokenizersBackend
    # scaled ones: what both read is what was saved
    scaled = {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0}
    LlamaConfig(rope_parameters=scaled, dtype="bfloat16").save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    checkpoint.spell_both_ways(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["rope_theta"], config["torch_dtype"]) == (5e4, "bfloat16")
    assert config["rope_scaling"]["factor"] == 2.0
    assert LlamaConfig.from_pretrained(tmp_path).rope_parameters == scaled


def test_the_terminal_shows_each_step_and_a_transcript(finished):
    out, said = finished
    assert said.splitlines()[-2].startswith(("no gain that can be told", "a gain,", "a loss,"))
    assert said.splitlines()[-1].startswith("done: ")
    for step in (1, 2, 3):  # two lines of numbers, the transcript
        shown = said.split(f"step {step}/3  ")[1].split("\nstep ")[0].split("    dilemma:")
        assert len(shown[0].splitlines()) == 2
    assert all(f"step {step}/3" in said for step in (1, 2, 3))
    assert said.count("dilemma:") == 3 and "checkpoint" in said and str(out) in said
    assert "2 scenarios over and over (--epoch-steps 0: all), 2 x 3 dialogues a step" in said
    earned = {1: 0.0, 2: 0.0, 3: 0.0}
    for record in runs.rows(out, "dialogues.jsonl"):
        earned[record["step"]] += record["reward"] / 6
    assert said.count("standard error") == 1
    assert (
        "on the 2 scenarios it trained on, the mean reward went from "
        f"{earned[1]:.2f} (first epoch) to {earned[3]:.2f} (epoch 3)" in said
    )


# ---- bad input -----------------------------------------------------------------------------------


def complaint(arguments, capfd, warnings=None):
    """The one line that train.py answers bad input with, run in this process; appends others."""
    with pytest.raises(SystemExit) as ended:
        cli.run_cli(lambda: train.main(arguments))
    err = capfd.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in err
    lines = [line for line in err.splitlines() if "error:" in line]
    assert len(lines) == 1, err
    if warnings is not None:
        warnings += [line for line in err.splitlines() if line.startswith("warning:")]
    return lines[0]


BAD = {
    "unknown model": (dict(model="no/such-model-anywhere"), r"--model no/such-model-anywhere"),
    "a folder without a model": (dict(model="/"), r"--model /"),
    "group of one": (dict(group_size=1), r"--group-size 1: must be at least 2"),
    "temperature zero": (dict(temperature=0), r"--temperature 0.0: must be above 0"),
    "negative steps": (dict(steps=-1), r"--steps -1: must be at least 0"),
    "negative rate": (dict(lr=-0.5), r"--lr -0.5: must be at least 0"),
    "not a number": (dict(lr="nan"), r"--lr nan"),
    "no keeping": (dict(keep=0), r"--keep 0: must be at least 1"),
    "unknown flag": (dict(colour="red"), r"--colour"),
    "abbreviated flag": (dict(group=4), r"--group"),
    "unknown recipe": (dict(recipe="best"), r"--recipe.*best"),
    "word for a number": (dict(group_size="many"), r"--group-size.*many"),
    "no dialogue to train": (dict(max_turns=0), r"--max-turns 0.*--train-tokens final"),
    "greedy finals trained": (
        dict(train_tokens="final", final_temperature=0),
        r"--final-temperature 0",
    ),
    "a KL under a nucleus": (dict(beta=0.1, top_p=0.9), r"--beta.*--top-p 1"),
    "no room for a turn": (
        dict(turn_tokens=1200, final_tokens=500),
        r"--turn-tokens, --final-tokens.*4096",
    ),
    "unreachable judge": (
        dict(judge_url="http://127.0.0.1:9/v1", judge_attempts=1, judge_wait=0),
        r"127.0.0.1:9",
    ),
    "judge that is no address": (dict(judge_url="localhost:8000"), r"--judge-url"),
    "no scenarios file": (dict(scenarios="/no/such/file.jsonl"), r"/no/such/file.jsonl"),
    "no run to resume": (
        dict(resume="/no/such/run", out=None),
        r"/no/such/run: its config.json cannot be read",
    ),
    "budget that ends before it begins": (
        dict(judge_budget=1, judge_mode="auto"),
        r"--judge-budget 1",
    ),
    "a rubric that is none": (dict(rubric="/dev/null"), r"--rubric /dev/null"),
    "demonstrations to play": (
        dict(recipe="single", demonstrations="x.jsonl"),
        r"--recipe single: plays; --demonstrations go with --recipe warm-start",
    ),
    "a group that no machine holds": (
        dict(group_size=10**13),
        r"--group-size 10000000000000: must be at most 1000",
    ),
    "a step that no machine holds": (dict(scenarios_per_step=10**10), r"must be at most 10000"),
    "a rank that no layer can use": (
        dict(lora_rank=10**12),
        r"--lora-rank 1000000000000: must be at most 1024",
    ),
    "a folder that no tokenizer can name": (
        dict(out="run-\udcff"),
        r"--out .*: must be UTF-8 text",
    ),
    "a folder with too long a name": (dict(out="x" * 300), r"--out x+: File name too long"),
    "a folder on no disk": (dict(out="/proc/x/y"), r"--out /proc/x/y: not one checkpoint fits"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line(case, tiny, judge, tmp_path, capfd, monkeypatch):
    # without a network, the hub's client tries for 24 s
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    changes, expected = BAD[case]
    line = complaint(runs.flags(tiny, judge.url, tmp_path / "run", **changes), capfd)
    assert re.search(expected, line), line
    assert not (tmp_path / "run").exists()  # so that the mended command line works


def test_only_the_folder_of_a_run_of_this_code_is_resumed(tmp_path, capfd):
    """A checkpoint has a config.json too; a setting that only the run or the code has is told."""
    file = tmp_path / "config.json"
    again = ["--resume", str(tmp_path)]
    for other in ('{"model_type": "llama", "dtype": "float32"}', "[]"):
        file.write_text(other)
        line = complaint(again, capfd)
        assert "is not that of a run; name the folder of a run" in line
    file.write_text('{"recipe": "debug", "reward_mix": 0.5}')
    assert "reward_mix in its config.json is no setting here" in complaint(again, capfd)
    file.write_text('{"recipe": "debug"}')  # older than --ratio
    changed = complaint([*again, "--ratio", "sequence"], capfd)
    assert "--ratio would change the mathematics" in changed
    assert read_settings([*again, "--ratio", "token"]).ratio == "token"


VALUES = [  # of config.json, and how the complaint goes on
    ({"steps": "ten"}, "--steps ten: must be of type int"),
    ({"steps": None}, "--steps None: must be of type int"),
    ({"steps": True}, "--steps True: must be of type int"),
    ({"steps": -1}, "--steps -1: must be at least 0"),
    ({"lr": math.inf}, "--lr inf: must be a finite number"),
    ({"scenarios": 5}, "--scenarios 5: must be of type str"),
    ({"agreement": "foo"}, "--agreement foo: must be one of ('judge', 'marker', 'none')"),
]


@pytest.mark.parametrize("saved, wrong", VALUES)
def test_a_value_that_no_flag_could_have_is_refused_in_a_runs_config(saved, wrong, tmp_path, capfd):
    (tmp_path / "config.json").write_text(json.dumps({"recipe": "debug", "lr": 1, **saved}))
    told = complaint(["--resume", str(tmp_path)], capfd)
    assert told == f"error: {tmp_path}: its config.json has {wrong}"
    with pytest.raises(cli.UserError, match="its config.json has --"):  # to evaluate, to report
        checkpoint.config_of(tmp_path)
    (tmp_path / "config.json").write_text('{"recipe": "debug", "lr": 1}')  # a whole number will do
    assert (
        checkpoint.config_of(tmp_path)["lr"] == read_settings(["--resume", str(tmp_path)]).lr == 1
    )


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b"{", b"\xff", b'{"recipe": "x", "contents": []}']
)
def test_a_config_that_is_none_is_one_line(text, tmp_path, capfd):
    (tmp_path / "config.json").write_bytes(text)
    assert "its config.json " in complaint(["--resume", str(tmp_path)], capfd)


@pytest.mark.parametrize("line", [b'{"step": 2, "rew', b"5", b"", b"\xff", b'{"loss": 1}'])
def test_a_line_that_is_none_of_a_run_is_named(line, tmp_path):
    file, whole = tmp_path / "metrics.jsonl", b'{"step": 1}\n'
    file.write_bytes(whole + line + b"\n" + whole)
    with pytest.raises(cli.UserError, match=f"{file}:2 cannot be read .*; take it out"):
        cut_after(file, 1)
    assert file.read_bytes() == whole + line + b"\n" + whole
    rows = list(checkpoint.whole_lines(file))
    assert [row for row in rows if "step" in row] == [{"step": 1}] * 2 + rows[1:1]
    assert all(type(row) is dict for row in rows)
    file.write_bytes(whole + line)  # the half line that a kill leaves
    cut_after(file, 1)
    assert file.read_bytes() == whole


@pytest.mark.parametrize(
    "line",
    [
        {"step": 1, "heldout": 5},
        {"heldout": {"loss": 1.0}},
        {"step": "x", "heldout": {"reward": 1.0}},
        {"step": 1, "heldout": {"loss": "x"}},
    ],
)
def test_damage_in_a_held_out_line_is_named(line, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(cli.UserError, match="metrics.jsonl: a line cannot be read .*; take it out"):
        checkpoint.best_step(tmp_path)


def broken(folder, name, content):
    """Let a file of the folder hold this; None: take it away; a float: cut it to this share."""
    file = folder / name
    whole = file.read_bytes()
    file.unlink()
    if content is not None:
        half = type(content) is float
        file.write_bytes(whole[: int(content * len(whole))] if half else content)


@pytest.mark.parametrize("content", [b"garbage", b"", 0.5, None])
@pytest.mark.parametrize("name", ["trainer.pt", "model.safetensors", "config.json"])
def test_a_broken_checkpoint_is_named_and_not_the_model(name, content, finished, tmp_path, capfd):
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    newest = out / "checkpoints" / "step_000003"
    broken(newest, name, content)
    line = complaint(["--resume", str(out), "--steps", "4"], capfd)
    assert (
        line.startswith(f"error: --resume: {newest}") and "move" in line and "--model" not in line
    )


FOREIGN = {  # what trainer.pt holds instead, and how the complaint goes on
    "a list": (lambda state: [state], "TypeError: "),
    "nothing in it": (lambda state: {}, "KeyError: 'step'"),
    "a word for the step": (lambda state: {**state, "step": "three"}, "ValueError: "),
    "another step's": (lambda state: {**state, "step": 2}, "trainer.pt is of another step"),
    "no moments": (lambda state: {**state, "moments": None}, "TypeError: "),
    "another model's": (lambda state: {**state, "moments": {"w": {}}}, "KeyError: "),
    "another width": (lambda state: with_moments(state, lambda t: t[..., :1]), "other moments"),
    "half a state": (lambda state: with_moments(state, lambda t: None), "AttributeError: "),
}


def with_moments(state, change):
    """A trainer's state whose first moments are changed."""
    moments = {k: {**v, "exp_avg": change(v["exp_avg"])} for k, v in state["moments"].items()}
    return {**state, "moments": moments}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_trainers_state_that_is_foreign_is_named(case, finished, tmp_path, capfd):
    change, says = FOREIGN[case]
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    newest = out / "checkpoints" / "step_000003"
    torch.save(change(torch.load(newest / "trainer.pt")), newest / "trainer.pt")
    line = complaint(["--resume", str(out), "--steps", "4"], capfd)
    assert line.startswith(f"error: --resume: {newest} cannot be read (") and says in line
    assert line.endswith("; move it away, and --resume takes the one before")
    assert runs.rows(out) == runs.rows(finished[0])  # nothing is lost


def test_flags_that_do_nothing_here_are_told(tiny, tmp_path, capfd):
    flags = runs.flags(tiny, "nowhere", tmp_path / "run", fsdp=True, compile=True)
    told = []
    complaint(flags, capfd, told)
    assert told == [
        "warning: --fsdp: one process has nothing to share; ignored",
        "warning: --compile: a CPU decodes without; ignored",
    ]


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
    def refuse(lock):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("filelock.FileLock.__enter__", refuse)
    with contextlib.ExitStack() as stack:
        claim(tmp_path / "out", stack)
    said = capsys.readouterr().err
    assert said == f"warning: --out {tmp_path}/out: not locked (Function not implemented)\n"


def test_the_folder_of_somebody_else_is_one_line(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.exists", refuse)  # root may look everywhere
    with pytest.raises(
        cli.UserError, match="--out .*: Permission denied; choose a folder of yours"
    ):
        refuse_taken(tmp_path)


def test_a_scenario_that_no_context_holds_is_refused(tiny, judge, tmp_path, capfd):
    long = {**CASE, "id": "long", "dilemma": "Who gets the water? " * 1000}
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps(CASE) + "\n" + json.dumps(long) + "\n")
    for more in ({}, dict(recipe="single", max_turns=0)):
        flags = runs.flags(tiny, judge.url, tmp_path / "run", scenarios=file, **more)
        told = complaint(flags, capfd)
        assert "holds 4096 tokens in all, too few for scenario long; use fewer, or sho" in told
    assert not (tmp_path / "run").exists()


TORCHRUN = [
    ({"WORLD_SIZE": "abc"}, "WORLD_SIZE=abc: must be a whole number from 1 to 1000000; unset it"),
    ({"WORLD_SIZE": ""}, "WORLD_SIZE=: must be"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0: must be a whole number from 1 to"),
    ({"WORLD_SIZE": "-1"}, "WORLD_SIZE=-1: must be"),
    ({"RANK": "x"}, "RANK=x: must be a whole number from 0 to"),
    ({"LOCAL_RANK": "x"}, "LOCAL_RANK=x: must be"),
    ({"LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE=x: must be"),
    ({"RANK": "3"}, "RANK=3 is set, but WORLD_SIZE is 1; unset RANK"),
    ({"RANK": "9" * 5000}, f"RANK={'9' * 5000}: must be"),
    ({"MASTER_PORT": "abc"}, "MASTER_PORT=abc: must be"),
    ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536: must be a whole number from 0 to 65535"),
]


@pytest.mark.parametrize("env, told", TORCHRUN)
def test_a_variable_of_torchruns_that_is_no_number_is_one_line(
    env, told, tiny, judge, tmp_path, monkeypatch, capfd
):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    line = complaint(runs.flags(tiny, judge.url, tmp_path / "run"), capfd)
    assert line.startswith(f"error: {told}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("where", ["| sleep 0", "> /dev/full"])
@pytest.mark.parametrize("said", ["print('x')", "print('x', flush=True)", "sys.exit(print('x'))"])
def test_output_that_nobody_takes_is_one_line(said, where, unbuffered):
    """By cli.py alone, which is quick; --help ends as the third does."""
    program = f"import cli, sys, time; cli.run_cli(lambda: (time.sleep(0.2), {said})[1])"
    line = f"{sys.executable} -c {shlex.quote(program)} {where}"
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(line, shell=True, cwd=runs.ROOT, env=env, capture_output=True, text=True)
    reason = "No space left on device" if "full" in where else "Broken pipe"
    assert done.stderr == f"error: what is printed cannot be written ({reason})\n"


def test_demonstrations_alone_mean_the_warm_start():
    found = read_settings(["--demonstrations", "mine.jsonl"])
    assert (found.recipe, found.demonstrations) == ("warm-start", "mine.jsonl")
    assert (found.train_tokens, found.lora_rank) == ("both", 16)


def test_the_paper_recipe_is_the_papers():
    """The table of arXiv 2603.10476, as readers' notes have it; what they leave open is ours."""
    paper = read_settings(["--recipe", "paper", "--model", "M"])
    wanted = {"max_turns": 7, "context_turns": 2, "agreement": "judge", "on_impasse": "zero"}
    wanted |= {"temperature": 0.7, "top_p": 0.95, "final_temperature": 0.1, "final_top_p": 0.95}
    wanted |= {"group_size": 8, "scenarios_per_step": 2, "updates_per_rollout": 1, "steps": 1900}
    wanted |= {"lr": 5e-6, "beta": 0.0, "advantage_scale": "std", "aggregate": "token"}
    wanted |= {"train_tokens": "dialogue", "judge_sees": "final"}
    assert {name: getattr(paper, name) for name in wanted} == wanted


def test_half_of_torchruns_variables_is_one_line(tiny, judge, tmp_path, monkeypatch, capfd):
    """PITFALLS 48: WORLD_SIZE that a scheduler, or an old shell, has left behind."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    line = complaint(runs.flags(tiny, judge.url, tmp_path / "run"), capfd)
    assert line == (
        "error: WORLD_SIZE=2 is set, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not; "
        "unset WORLD_SIZE, or start with torchrun --nproc_per_node=2 train.py"
    )
    assert not (tmp_path / "run").exists()


def test_every_rank_has_a_group_of_its_own(monkeypatch):
    """torchrun --nproc_per_node=8 train.py works as it stands; what was asked for stays."""

    def of(*flags):
        return read_settings(list(flags)).scenarios_per_step

    for ranks, debug, warm_start in (("1", 3, 16), ("2", 4, 16), ("3", 3, 18), ("8", 8, 16)):
        monkeypatch.setenv("WORLD_SIZE", ranks)
        assert of() == debug and of("--recipe", "warm-start") == warm_start
        assert of("--scenarios-per-step", "5") == 5


def test_the_single_recipe_differs_from_the_debug_recipe_in_one_thing():
    """An answer instead of a negotiation."""
    debug = dataclasses.asdict(read_settings(["--recipe", "debug"]))
    single = dataclasses.asdict(read_settings(["--recipe", "single"]))
    differ = {key: single[key] for key in single if single[key] != debug[key]}
    answer = {"max_turns": 0, "train_tokens": "final", "agreement": "none"}
    trained = {"final_temperature": 0.8}  # trained tokens need room to differ
    assert differ == {"recipe": "single", **answer, **trained}


CASE = {
    "id": "a",
    "tier": "everyday",
    "dilemma": "Who gets the water?",
    "personas": list(helpers.PERSONAS),
}


def test_a_broken_scenarios_file_is_named_with_its_line(tiny, judge, tmp_path, capfd):
    good = json.dumps(CASE)
    file = tmp_path / "mine.jsonl"
    file.write_text(good + "\n" + good.replace('"a"', '"b"')[:-3] + "\n")
    flags = runs.flags(tiny, judge.url, tmp_path / "run", scenarios=file)
    assert f"{file}:2" in complaint(flags, capfd)


def test_a_resumed_run_keeps_its_rubric_and_its_scenarios_whatever_their_paths(
    tiny, judge, tmp_path, capfd
):
    """PITFALLS 37: contents are compared, not names; a server may move."""
    file, rubric, out = tmp_path / "mine.jsonl", tmp_path / "rubric.json", tmp_path / "run"
    file.write_text(json.dumps(CASE) + "\n")
    rubric.write_text(json.dumps(RUBRIC))
    more = dict(scenarios=file, rubric=rubric, steps=1, scenarios_per_step=1)
    assert runs.Process(runs.flags(tiny, judge.url, out, **more)).wait()[0] == 0
    moved = tmp_path / "moved.jsonl"
    file.rename(moved)
    here = ["--resume", str(out), "--scenarios", str(moved)]
    with runs.judge() as elsewhere:
        run = runs.Process([*here, "--steps", "2", "--judge-url", elsewhere.url])
        code, _, err = run.wait()
    assert code == 0, err
    resume = [*here, "--steps", "3", "--judge-url", judge.url]
    moved.write_text(json.dumps({**CASE, "dilemma": "Who gets the wine?"}) + "\n")
    assert "other scenarios than the run began with" in complaint(resume, capfd)
    moved.write_text(json.dumps(CASE) + "\n")
    rubric.write_text(json.dumps({**RUBRIC, "parties": "Only the first one counts."}))
    assert "other rubric than the run began with" in complaint(resume, capfd)
    for flag, value in (("--judge-model", "other"), ("--judge-mode", "expect")):
        line = complaint([*resume, flag, value], capfd)
        assert f"{flag} would change the mathematics" in line
    assert runs.Process([*resume, "--force"]).wait()[0] == 0
    assert [r["step"] for r in runs.rows(out)] == [1, 2, 3]


def test_a_reward_model_cannot_tell_whether_they_agree(tiny, tmp_path, capfd):
    with JudgeServer(lambda text: len(set(text)) / 8, offers=("pooling",)) as server:
        flags = runs.flags(tiny, server.url, tmp_path / "run", judge_mode=None)
        assert (
            "is a reward model and knows scores only; add --agreement marker, or none"
            in complaint([*flags, "--agreement", "judge"], capfd)
        )
        assert not (tmp_path / "run").exists()
        code, _, err = runs.Process(flags, ranks=2).wait()  # asked alike by both ranks
        assert code == 0, err
    assert json.loads((tmp_path / "run" / "config.json").read_text())["judge_mode"] == "rm"
    assert all(r["reward"] is not None for r in runs.rows(tmp_path / "run", "dialogues.jsonl"))


def test_a_folder_that_holds_something_is_left_alone(finished, tiny, judge, tmp_path, capfd):
    before = {p: p.read_bytes() for p in finished[0].rglob("*") if p.is_file()}
    line = complaint(runs.flags(tiny, judge.url, finished[0]), capfd)
    assert "already there" in line and "--resume" in line
    assert before == {p: p.read_bytes() for p in finished[0].rglob("*") if p.is_file()}
    (tmp_path / "file").write_text("mine")
    assert "already there" in complaint(runs.flags(tiny, judge.url, tmp_path / "file"), capfd)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_has_one_writer(tmp_path):
    with contextlib.ExitStack() as one:
        claim(tmp_path / "a" / "run", one)
        with (
            pytest.raises(cli.UserError, match="another run is writing there"),
            contextlib.ExitStack() as two,
        ):
            claim(tmp_path / "a" / "run", two)
    with contextlib.ExitStack() as later:
        claim(tmp_path / "a" / "run", later)
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(cli.UserError, match="--out .*file/run: Not a directory; choose"),
        contextlib.ExitStack() as stack,
    ):
        claim(tmp_path / "file" / "run", stack)


def test_held_out_scenarios_are_of_all_kinds_and_never_trained_on():
    scenarios, held = train.divide(Settings(epoch_steps=0, eval_every=1, eval_scenarios=8))
    topics = {
        row["id"]: row["topic"] for row in dataset.load_jsonl(dataset.DATA / "dilemmas.jsonl")
    }
    assert len(held) == 8 == len({topics[s.id] for s in held}) and len({s.tier for s in held}) == 3
    assert len(scenarios) == 312 and not {s.id for s in scenarios} & {s.id for s in held}
    assert train.divide(Settings())[1] == []


def test_an_epoch_of_six_steps_plays_the_same_scenarios_over_and_over():
    alone, few = types.SimpleNamespace(rank=0, size=1), {}
    for seed in (0, 1):
        cfg = Settings(seed=seed, eval_every=1)
        scenarios, held = train.divide(cfg)
        steps = [
            [group[0].scenario.id for group in train.deal(scenarios, cfg, step, alone)]
            for step in range(1, 13)
        ]
        few[seed] = {s.id for s in scenarios}
        assert len(few[seed]) == 18 and not few[seed] & {s.id for s in held}
        assert all(
            set(sum(steps[i : i + 6], [])) == few[seed] for i in (0, 6)
        )  # each once in each epoch
        assert steps[:6] != steps[6:]  # in another order
    assert few[0] != few[1]


def test_a_scenario_that_comes_twice_in_a_step_is_played_by_other_members():
    cfg, one = Settings(scenarios_per_step=3), [helpers.scenario("only")]
    whole = train.deal(one, cfg, 1, types.SimpleNamespace(rank=0, size=1))
    assert [[d.member for d in group] for group in whole] == [
        [*range(6)],
        [*range(6, 12)],
        [*range(12, 18)],
    ]
    shares = [
        train.deal(one, cfg, 1, types.SimpleNamespace(rank=rank, size=3))[0] for rank in range(3)
    ]
    assert [[d.member for d in group] for group in shares] == [
        [d.member for d in group] for group in whole
    ]
    for step in range(1, 9):  # three scenarios, two a step: every other step holds two epochs
        groups = train.deal(
            [helpers.scenario(name) for name in "abc"],
            Settings(scenarios_per_step=2),
            step,
            types.SimpleNamespace(rank=0, size=1),
        )
        assert len({(d.scenario.id, d.member) for group in groups for d in group}) == 12


def test_an_epoch_is_set_beside_the_first_scenario_by_scenario():
    def row(*pairs):
        return {"rewards": dict(pairs)}

    rows = [
        row(("a", 1.0), ("b", 2.0)),
        row(("c", 3.0), ("d", None)),
        {"heldout": {}},
        row(("d", 5.0), ("a", 2.0)),
        row(("b", 2.5), ("c", 3.0)),
    ]
    assert progress.closing_words(rows, 4, 2, 4).endswith(
        "on the 3 scenarios it trained on, the mean reward went from 2.00 (first "
        "epoch) to 2.50 (epoch 2), a difference of +0.50 with a standard error of 0.29; 2 of 3 "
        "earned more"
    )  # differences 1, 0.5, 0; d has no first reward
    few = progress.closing_words(rows[:3], 4, 2, 4)
    assert few.startswith("whether training earned anything cannot be told")


def two_epochs(*gains):
    """Lines of metrics.jsonl: a scenario for each gain, all of them in each of two steps."""
    before = {str(i): 1.0 for i in range(len(gains))}
    return [{"rewards": before}, {"rewards": {str(i): 1 + gain for i, gain in enumerate(gains)}}]


@pytest.mark.parametrize(
    "gains, words",
    [
        ((0.1, 0.2, 0.3), "a gain, more than chance explains: on the 3 scenarios it trained on"),
        ((-0.1, -0.2, -0.3), "a loss, more than chance explains"),
        ((0.3, -0.2, 0.1), "no gain that can be told from chance"),
        ((0.0, 0.0, 0.0), "no gain that can be told from chance"),
        ((0.0, 0.2), "no gain that can be told from chance"),  # one standard error
        ((0.1,), "whether training earned anything cannot be told"),
    ],
)
def test_a_run_closes_with_what_it_earned_in_words(gains, words):
    n, rows = len(gains), two_epochs(*gains)
    said = progress.closing_words(rows, 2, n, n)
    assert said.startswith(words)
    if len(gains) > 1:
        error = statistics.stdev(gains) / len(gains) ** 0.5
        difference = f"{statistics.fmean(gains):+.2f} with a standard error of {error:.2f}"
        assert difference in said and "1.00 (first epoch)" in said and "(epoch 2)" in said
    early = progress.closing_words(rows[:1], 1, n, n)
    assert early.startswith("whether training earned anything cannot be told")
    # half an epoch more changes nothing
    late = [*rows, {"rewards": {"0": 5.0}}]
    assert progress.closing_words(late, 2 * n + 1, 1, n).startswith(words)


def test_a_transcript_is_whole_and_says_what_was_cut_off():
    long = "word " * 700 + "w" * 300 + " end."
    turns = [Turn(0, long, False), Turn(1, "We shall sha", True), Turn(0, "Yes, all of it.", True)]
    dialogue = helpers.dialogues(1, 1)[0]
    dialogue.turns, dialogue.final, dialogue.final_truncated = turns, "Both get hal", True
    shown = progress.transcript(dialogue, indent="    ")
    words = shown.split()
    assert "w" * 300 in words and words.count("word") == 700
    assert "We shall sha [cut off]" in shown and "Yes, all of it. [cut off]" in shown
    assert shown.endswith("Both get hal [cut off]")
    assert all(len(line) <= 120 for line in shown.splitlines() if "www" not in line)


# ---- --log ---------------------------------------------------------------------------------------

STAND_IN = """
import json, pathlib, sys, types
class Shown:
    def __init__(self, *where, **how): self.note("open", *where, how)
    def note(self, *what):
        with open(FILE, "a") as file: print(json.dumps(what), file=file)
    def __enter__(self): return self
    def __exit__(self, kind, error, trace): self.note("close", kind and kind.__name__)
    def add_scalar(self, name, value, step): self.note(step, name, value)
    def add_text(self, name, text, step): self.note(step, name, text)
    def log(self, found, step): [self.note(step, *pair) for pair in found.items()]
    def flush(self): self.note("flush")
module = types.ModuleType("stand-in")
module.SummaryWriter = module.init = Shown
module.Html = lambda text: text
sys.modules["torch.utils.tensorboard"] = sys.modules["wandb"] = module
"""
BROKEN = "import run\ndef broken(*_): raise ValueError('x')\nrun.Run.save = broken\n"


def stand_in(file):
    return STAND_IN.replace("FILE", repr(str(file)))


@pytest.mark.parametrize("kind, ranks", [("tensorboard", 0), ("wandb", 2)])
def test_metrics_and_a_transcript_a_step_are_shown_elsewhere(kind, ranks, tiny, judge, tmp_path):
    out, file = tmp_path / "run", tmp_path / "shown.jsonl"
    more = dict(log=kind, steps=2, eval_every=2, eval_scenarios=2)
    run = runs.Process(runs.flags(tiny, judge.url, out, **more), ranks, stand_in(file))
    code, said, err = run.wait()
    assert code == 0, err
    shown = [json.loads(line) for line in file.read_text().splitlines()]
    opened = [what for what in shown if what[0] == "open"]
    assert len(opened) == 1 and str(out) in json.dumps(opened)  # by one rank
    assert shown[-1] == ["close", None]
    metrics = {(step, name): value for step, name, value in (s for s in shown if len(s) == 3)}
    for row in runs.rows(out):
        for name, value in progress.numbers(row).items():
            assert metrics[row["step"], name] == value
    assert (2, "reward_mean") in metrics and (0, "heldout/reward") in metrics
    texts = [(step, text) for (step, name), text in metrics.items() if name == "transcript"]
    assert [step for step, _ in texts] == [1, 2]
    for _, text in texts:
        assert "dilemma: " in text and text.startswith("<pre>" if kind == "wandb" else "    ")
    if kind == "tensorboard":
        assert shown.count(["flush"]) == 4  # each step and each evaluation


@pytest.mark.parametrize("ending", ["signal", "error"])
def test_what_is_shown_elsewhere_is_closed_on_every_way_out(ending, tiny, judge, tmp_path):
    out, file = tmp_path / "run", tmp_path / "shown.jsonl"
    flags = runs.flags(
        tiny, judge.url, out, log="tensorboard", steps=10000 if ending == "signal" else 1
    )
    run = runs.Process(flags, patch=stand_in(file) + (BROKEN if ending == "error" else ""))
    if ending == "signal":
        assert runs.wait_for(lambda: len(runs.rows(out)) >= 1)
        run.process.send_signal(signal.SIGTERM)
    code = run.wait()[0]
    assert code == (130 if ending == "signal" else 1)
    last = json.loads(file.read_text().splitlines()[-1])
    assert last == ["close", None if ending == "signal" else "ValueError"]


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_missing_package_of_log_is_one_line(kind, tiny, judge, tmp_path, monkeypatch, capfd):
    for name in ("tensorboard", "torch.utils.tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)  # import fails
    line = complaint(runs.flags(tiny, judge.url, tmp_path / "run", log=kind), capfd)
    assert f"--log {kind}: its package is missing; pip install {kind}" in line
    assert not (tmp_path / "run").exists()


def test_a_refusal_of_wandb_is_one_line(tmp_path, monkeypatch):
    def refuse(**how):
        raise UsageError("no API key configured\nUse `wandb login`")

    class UsageError(Exception):
        pass

    module = types.SimpleNamespace(Error=UsageError, init=refuse)
    monkeypatch.setitem(sys.modules, "wandb", module)
    says = "--log wandb: no API key configured; wandb login, or WANDB_MODE=offline; then --resume"
    with pytest.raises(cli.UserError, match=says), contextlib.ExitStack() as stack:
        progress.Log("wandb", tmp_path, 0, stack)


def test_help_is_in_groups_with_what_a_run_is_first(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    said = capsys.readouterr().out
    assert said.startswith("usage: train.py [--flag X ...]\n")
    titles = ["Everything that a run depends on", "How a dialogue is played", "Who judges"]
    places = [said.index(title) for title in titles]
    assert places == sorted(places) and "[]" not in said
    for flag, title, after in (("--lr X", 0, 1), ("--max-turns X", 1, 2)):
        assert places[title] < said.index(flag) < places[after]
    assert said.index("--judge-url X") > places[2]


def test_an_epoch_has_room_for_every_rank_and_never_cuts_what_somebody_brings(monkeypatch):
    def count(*flags):
        return len(train.divide(read_settings(list(flags)))[0])

    mine = str(dataset.DATA / "dilemmas.jsonl")
    assert count("--recipe", "paper") == 320
    assert count("--epoch-steps", "0") == count("--scenarios", mine) == 320
    assert count() == count("--recipe", "single") == 18 and count("--epoch-steps", "3") == 9
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert count() == 48


def test_lines_are_json_whatever_a_step_came_to(tmp_path):
    checkpoint.append(
        tmp_path / "x", [{"a": math.nan, "b": math.inf, "c": [1.0], "d": None, "e": "nan", "f": 2}]
    )
    assert (
        tmp_path / "x"
    ).read_text() == '{"a": null, "b": null, "c": [1.0], "d": null, "e": "nan", "f": 2}\n'


def test_a_signal_between_two_steps_plays_nothing_more():
    run = Run.__new__(Run)
    run.world = World(0, 1, torch.device("cpu"))
    run.stop = Stop.__new__(Stop)
    run.stop.since, run.stop.playing = 1.0, False  # a signal has come
    with pytest.raises(Ended) as ended:
        run.unless_stopped(pytest.fail, "played")
    assert (ended.value.code, ended.value.reason) == (130, "interrupted")


def test_an_evaluation_that_a_signal_cut_off_is_made_up_for(tiny, judge, tmp_path):
    out = tmp_path / "run"
    assert (
        runs.Process(
            runs.flags(tiny, judge.url, out, steps=2, eval_every=2, eval_scenarios=2)
        ).wait()[0]
        == 0
    )
    lines = (out / "metrics.jsonl").read_text().splitlines()
    whole = [json.loads(line) for line in lines]
    assert [(r["step"], "heldout" in r) for r in whole] == [
        (0, True),
        (1, False),
        (2, False),
        (2, True),
    ]
    assert (
        whole[3]["heldout"]["judge_calls"] == 4 and whole[1]["judge_calls"] == 6
    )  # those of an evaluation stand in its own line
    (out / "metrics.jsonl").write_text("\n".join(lines[:3]) + "\n")
    code, _, err = runs.Process(["--resume", str(out)]).wait()
    again = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert code == 0 and again == whole, err


def test_resume_removes_what_a_kill_left_and_nothing_else(tmp_path):
    out = tmp_path / "run"
    for name in (
        "step_000001",
        "step_000002",
        ".partial-step_000004",
        "step_000002_backup",
        "best",
    ):
        (out / "checkpoints" / name).mkdir(parents=True)
    (out / "checkpoints" / "notes.txt").write_text("mine")
    (out / "checkpoints" / "latest").symlink_to("step_000002")
    (out / "config.json").write_text('{"recipe": "debug"}')
    cfg = read_settings(["--resume", str(out)])
    assert open_run(cfg) == (out, out / "checkpoints" / "step_000002")
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == [
        "best",
        "latest",
        "notes.txt",
        "step_000001",
        "step_000002",
        "step_000002_backup",
    ]


def test_resume_refuses_what_would_change_the_mathematics(finished, capfd):
    assert "--lr, --group-size would change" in complaint(
        ["--resume", str(finished[0]), "--lr", "1", "--group-size", "4"], capfd
    )
    assert "--judge-mode, --judge-sees would change" in complaint(
        ["--resume", str(finished[0]), "--judge-mode", "expect", "--judge-sees", "dialogue"], capfd
    )
    assert "--out elsewhere" in complaint(
        ["--resume", str(finished[0]), "--out", "elsewhere"], capfd
    )
    assert read_settings(["--resume", str(finished[0]), "--lr", "1", "--force"]).lr == 1.0
    same = read_settings(
        [
            "--resume",
            str(finished[0]),
            "--steps",
            "9",
            "--lr",
            "1e-3",
            "--judge-url",
            "http://127.0.0.1:1/v1",
        ]
    )
    assert (same.steps, same.group_size, same.dtype) == (9, 3, "fp32")


def test_bad_input_to_the_program_itself(tiny, judge, tmp_path):
    flags = runs.flags(tiny, judge.url, tmp_path / "run", group_size=1)
    code, said, err = runs.Process(flags, fresh=True).wait()
    assert code == 2 and err == "error: --group-size 1: must be at least 2\n" and said == ""


# ---- how a run ends ------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_a_checkpoint_and_it_can_go_on(number, tiny, judge, tmp_path):
    out = tmp_path / "run"
    run = runs.Process(runs.flags(tiny, judge.url, out, steps=10000, save_every=0))
    assert runs.wait_for(lambda: len(runs.rows(out)) >= 2)
    run.process.send_signal(number)
    code, said, err = run.wait(30)
    assert (
        code == 130
        and "stopping, with a checkpoint" in err
        and "Traceback" not in err
        and run.gone()
    )
    done = len(runs.rows(out))
    assert [p.name for p in (out / "checkpoints").iterdir()] == [f"step_{done:06d}"]
    AutoModelForCausalLM.from_pretrained(out / "checkpoints" / f"step_{done:06d}")
    assert len(runs.rows(out, "dialogues.jsonl")) == 6 * done
    code, said, err = runs.Process(["--resume", str(out), "--steps", str(done + 1)]).wait()
    assert code == 0 and [r["step"] for r in runs.rows(out)] == list(range(1, done + 2)), err


def test_a_second_ctrl_c_stops_at_once(tiny, tmp_path):
    with runs.judge(faults=lambda number, path: "hang" if number > 8 else None, hang=120) as server:
        run = runs.Process(runs.flags(tiny, server.url, tmp_path / "run", steps=100))
        assert runs.wait_for(lambda: len(server.requests) > 10)
        time.sleep(1)  # it waits for the judge now
        run.process.send_signal(signal.SIGINT)
        assert not runs.wait_for(lambda: run.process.poll() is not None, 2)
        began = time.monotonic()
        run.process.send_signal(signal.SIGINT)
        code, said, err = run.wait(30)
        assert (
            code == 130 and time.monotonic() - began < 15 and "Traceback" not in err and run.gone()
        )


@pytest.mark.slow
def test_ctrl_c_takes_the_embedded_judge_along(tiny, tmp_path):
    out = tmp_path / "run"
    run = runs.Process(runs.flags(tiny, None, out, judge_mode=None, steps=10000))
    assert runs.wait_for(lambda: len(runs.rows(out)) >= 1, 180)
    assert len(run.processes()) == 2
    run.process.send_signal(signal.SIGINT)
    assert run.wait(60)[0] == 130 and run.gone()
    run = runs.Process(["--resume", str(out)])
    assert runs.wait_for(lambda: len(run.processes()) == 2 and len(runs.rows(out)) >= 2, 180)
    run.process.kill()  # -9: nobody can say good-bye
    assert run.gone()


@pytest.mark.parametrize("where", ["play", "learn", "evaluate"])
def test_a_spent_budget_saves_and_stops(where, tiny, judge, tmp_path):
    out = tmp_path / "run"
    more = {
        "play": dict(agreement="judge", max_turns=4, judge_budget=25),
        "learn": dict(judge_budget=25),
        "evaluate": dict(judge_budget=4, eval_every=1, eval_scenarios=2),
    }[where]
    code, said, err = runs.Process(runs.flags(tiny, judge.url, out, steps=100, **more)).wait()
    assert code == 3 and "--judge-budget" in said and "Traceback" not in err, err
    rows = runs.rows(out)
    assert sum(r["judge_calls"] for r in rows) <= 25
    assert [p.name for p in (out / "checkpoints").iterdir()] == [f"step_{len(rows):06d}"]
    code, said, err = runs.Process(["--resume", str(out), "--judge-budget", "20"]).wait()
    assert code in (2, 3) and "--judge-budget" in said + err  # what was used stays used


def test_a_judge_that_answers_nothing_stops_the_run_after_five_steps(tiny, tmp_path):
    with runs.judge(faults=lambda number, path: "refusal" if number > 2 else None) as server:
        code, said, err = runs.Process(
            runs.flags(
                tiny, server.url, tmp_path / "run", steps=100, judge_attempts=1, final_tokens=20
            )
        ).wait()
    rows = runs.rows(tmp_path / "run")
    assert code == 3 and 5 <= len(rows) <= 6 and "look after the judge" in said
    assert (
        rows[-1]["reward_mean"] is None
        and rows[-1]["missing_rewards"] == 6
        and rows[-1]["loss"] == 0
    )
    assert all(
        r["reward"] is None and r["advantage"] is None
        for r in runs.rows(tmp_path / "run", "dialogues.jsonl")[-6:]
    )
    assert (tmp_path / "run/checkpoints" / f"step_{len(rows):06d}").exists()


TRANSPORT = [
    "hang",
    "hang in the middle",
    "trickle",
    "trickle headers",
    "reset",
    "cut short",
    "429 seconds",
    "429 date",
    "408",
    "409",
    "500",
    "503 long",
]
AT_ONCE = {
    "redirect": "redirect",
    "not json": "not json",
    "wrong type": "wrong shape",
    "huge": "too large",
    "truncated": "truncated",
    "400": "http 400",
}


def test_a_run_through_every_fault_of_a_judge(tiny, tmp_path):
    """Every second reply is a fault, each kind in turn: rewards that never came are counted."""
    out, kinds = tmp_path / "run", TRANSPORT + list(AT_ONCE) + list(REPLIES)
    with runs.judge(
        faults=lambda n, path: kinds[(n - 3) // 2 % len(kinds)] if n >= 3 and n % 2 else None
    ) as server:
        more = dict(
            steps=12,
            judge_timeout=1,
            judge_attempts=3,
            judge_deadline=30,
            save_every=6,
            judge_tokens=64,
        )
        run = runs.Process(runs.flags(tiny, server.url, out, **more))
        code, said, err = run.wait(150)
        posts = len(server.requests)
    rows, dialogues = runs.rows(out), runs.rows(out, "dialogues.jsonl")

    def total(key):
        return sum(r[key] for r in rows)

    reasons = collections.Counter()
    for r in rows:
        reasons.update(r["judge_missing"])
    print(
        f"{posts} requests, {total('judge_calls')} calls, {total('judge_retries')} retries, "
        f"{total('judge_retry_seconds'):.1f} s of pauses, "
        f"{total('seconds_judge'):.1f} s of waiting, missing {dict(reasons)}"
    )
    assert code == 0 and "Traceback" not in err and run.gone(), err
    assert (
        total("judge_calls") == len(dialogues) + total("judge_retries")
        and total("judge_retries") >= 12
    )  # one question for each dialogue
    assert posts - total("judge_calls") in (1, 2)  # what the preflight asked
    missing = [d for d in dialogues if d["reward"] is None]
    assert (
        len(missing) == total("missing_rewards") == total("judge_failures") == reasons.total() > 0
    )
    assert reasons == collections.Counter(d["judge"]["failures"][0] for d in missing) and set(
        AT_ONCE.values()
    ) <= set(reasons)
    assert all(d["advantage"] is None for d in missing) and all(
        0 <= d["reward"] <= 5 for d in dialogues if d["reward"] is not None
    )
    assert any(r["grad_norm"] > 0 for r in rows) and not any(r["skipped"] for r in rows)
    last = runs.weights(out, 12)
    assert all(torch.isfinite(t).all() for t in last.values()) and not runs.same(
        last, AutoModelForCausalLM.from_pretrained(tiny).state_dict()
    )


def test_five_steps_that_are_not_finite_stop_the_run(tiny, judge, tmp_path):
    patch = """
import grpo
step = grpo.Optimizer.step
grpo.Optimizer.step = lambda self, scale, finite=True: step(self, scale, self.updates < 1)
"""
    code, said, err = runs.Process(
        runs.flags(tiny, judge.url, tmp_path / "run", steps=100, save_every=1), patch=patch
    ).wait()
    rows = runs.rows(tmp_path / "run")
    assert (
        code == 3 and [r["skipped"] for r in rows] == [False] + [True] * 5 and "not finite" in said
    )
    assert runs.same(runs.weights(tmp_path / "run", 6), runs.weights(tmp_path / "run", 5))
