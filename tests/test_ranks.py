"""Runs on several ranks, and runs that survive a kill, a full disk or a dead rank."""

import contextlib
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
import zlib

import helpers
import pytest
import runs
import torch
from servers import JudgeServer
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

import chat
import checkpoint
import cli
import grpo
import model as lm
import packing
import selfplay
import train
from policy import World, build
from run import take_folder
from settings import read_settings

HARD = dict(updates_per_rollout=2, beta=0.05)  # losses that are not 0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return runs.saved_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def judge():
    with runs.judge(agree=lambda text: len(text) % 3 == 0) as server:
        yield server


def complete(tiny, judge, out, ranks=0, **more):
    """Run to the end; returns the folder."""
    code, said, err = runs.Process(runs.flags(tiny, judge.url, out, **more), ranks).wait()
    assert code == 0, err[-3000:]
    return out


def sampled(out):
    """The ids of every stream and final of a run."""
    found = []
    for record in runs.rows(out, "dialogues.jsonl"):
        for stream in record["streams"]:
            found += [sample["ids"] for sample in stream["samples"]]
        found.append(record["final_ids"])
    return found


def close(a, b):
    """Two runs have the same dialogues and, to rounding, the same numbers."""
    assert sampled(a) == sampled(b) and len(sampled(a)) > 0
    mine, theirs = runs.rows(a), runs.rows(b)
    assert len(mine) == len(theirs)
    for x, y in zip(mine, theirs):
        assert x["loss"] == pytest.approx(y["loss"], abs=1e-5)
        for key in runs.steady(y):
            assert x[key] == (
                pytest.approx(y[key], rel=1e-3, abs=1e-4) if isinstance(y[key], float) else y[key]
            ), key


# ---- several ranks are one -----------------------------------------------------------------------


@pytest.mark.slow
def test_one_rank_two_ranks_and_shards_are_the_same_run(tiny, judge, tmp_path):
    alone = complete(tiny, judge, tmp_path / "alone", steps=5, **HARD)
    assert max(abs(r["loss"]) for r in runs.rows(alone)) > 1e-3
    close(complete(tiny, judge, tmp_path / "one", 1, steps=5, **HARD), alone)
    assert runs.same(runs.weights(tmp_path / "one", 5), runs.weights(alone, 5))
    start = AutoModelForCausalLM.from_pretrained(tiny).state_dict()
    for name, more in (("two", {}), ("shards", {"fsdp": True})):
        out = complete(tiny, judge, tmp_path / name, 2, steps=5, **HARD, **more)
        close(out, alone)
        mine, theirs = runs.weights(out, 5), runs.weights(alone, 5)
        assert mine.keys() == theirs.keys()
        apart = torch.cat([(mine[n] - theirs[n]).flatten() for n in start])
        far = torch.cat([(theirs[n] - start[n]).flatten() for n in start])
        # Adam makes steps of one size, also of the smallest gradients
        assert apart.norm() < 0.02 * far.norm()
        assert (
            AutoModelForCausalLM.from_pretrained(out / "checkpoints/step_000005").dtype
            == torch.float32
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {"fsdp": True, "gradient_checkpointing": True},
        {"fsdp": True, "lora_rank": 4, "beta": 0.05},
        {"lora_rank": 4},
    ],
)
def test_ranks_whose_dialogues_and_passes_differ_in_number_finish(more, tiny, judge, tmp_path):
    uneven = dict(steps=3, agreement="judge", max_turns=6, micro_tokens=1, group_size=2, lr=1e-5)
    out = complete(tiny, judge, tmp_path / "two", 2, **uneven, **more)
    alone = {**uneven, **more, "fsdp": None}
    close(out, complete(tiny, judge, tmp_path / "alone", **alone))
    turns = ([], [])  # of each rank's group
    for record in runs.rows(out, "dialogues.jsonl"):
        turns[record["group"]].append(len(record["turns"]))
    assert turns[0] != turns[1]


@pytest.mark.slow
def test_tied_weights_in_bf16_on_two_ranks(judge, tmp_path):
    model = runs.saved_model(tmp_path / "qwen", "qwen2")
    for name, more in (("two", {}), ("shards", {"fsdp": True})):
        out = complete(model, judge, tmp_path / name, 2, steps=2, dtype="bf16", **more)
        loaded = lm.load(str(out / "checkpoints/step_000002"), "fp32")[0]
        head = loaded.lm_head.weight
        assert head.dtype == torch.float32
        assert torch.equal(head, loaded.model.embed_tokens.weight)
        # the fp32 weights were saved, not those of the computation
        assert any((p != p.bfloat16()).any() for p in loaded.parameters())


@pytest.mark.slow
def test_one_hung_judge_call_does_not_hold_up_the_ranks(tiny, tmp_path):
    def eighth(number, path):
        return "hang" if number == 8 else None

    more = dict(steps=3, judge_deadline=5, judge_attempts=1)
    with runs.judge(faults=eighth, hang=300) as server:
        began = time.monotonic()
        out = complete(tiny, server, tmp_path / "run", 2, **more)
    assert sum(row["missing_rewards"] for row in runs.rows(out)) == 1
    assert time.monotonic() - began < 90


def test_ranks_that_do_not_divide_the_scenarios_are_refused(tiny, judge, tmp_path):
    flags = runs.flags(tiny, judge.url, tmp_path / "run", scenarios_per_step=3)
    code, said, err = runs.Process(flags, 2).wait()
    assert code != 0
    assert "--scenarios-per-step 3: 2 ranks need a multiple of 2" in err
    assert not (tmp_path / "run").exists()


# ---- kill and resume -----------------------------------------------------------------------------

DIE = """
import os, signal
whole = {place}
def die(*a, **k):
    {when}
    return whole(*a, **k)
{place} = die
"""
KILL = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks,more",
    [
        (2, {}),
        (0, {"lora_rank": 4, "dtype": "bf16", "context_turns": 2}),
        (2, {"fsdp": True}),
    ],
)
def test_a_killed_and_resumed_run_is_bitwise_the_whole_one(ranks, more, tiny, judge, tmp_path):
    more = {**HARD, **more, "steps": 6, "save_every": 3, "warmup_steps": 5}
    whole = complete(tiny, judge, tmp_path / "whole", ranks, **more)
    out = tmp_path / "killed"
    patch = DIE.format(place="train.deal", when=f"if a[2] == 5: {KILL}")
    run = runs.Process(runs.flags(tiny, judge.url, out, **more), ranks, patch)
    assert run.wait()[0] != 0 and run.gone(60)
    assert len(runs.rows(out)) == 4
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "rew')  # a line cut short
    (out / "checkpoints/.partial-step_000005").mkdir()
    if ranks == 2 and not more.get("fsdp"):
        shutil.copytree(out, tmp_path / "elsewhere")
    code, said, err = runs.Process(["--resume", str(out)], ranks).wait()
    assert code == 0, err[-3000:]
    assert [runs.steady(r) for r in runs.rows(out)] == [runs.steady(r) for r in runs.rows(whole)]
    assert runs.rows(out, "dialogues.jsonl") == runs.rows(whole, "dialogues.jsonl")
    assert runs.same(runs.weights(out, 6), runs.weights(whole, 6))
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step_000003", "step_000006"]
    if ranks == 2 and not more.get("fsdp"):  # the same run goes on with one rank
        code, said, err = runs.Process(["--resume", str(tmp_path / "elsewhere")]).wait()
        assert code == 0, err[-3000:]
        close(tmp_path / "elsewhere", whole)


SLOW_SAVES = """
import time, torch
save, dump, rmtree = lm.save, torch.save, checkpoint.shutil.rmtree
lm.save = lambda *a: (time.sleep(0.1), save(*a), time.sleep(0.1))
torch.save = lambda *a: (dump(*a), time.sleep(0.1))
checkpoint.shutil.rmtree = lambda *a, **k: (time.sleep(0.1), rmtree(*a, **k))
"""


@pytest.mark.slow
def test_kill_at_twenty_random_moments(tiny, judge, tmp_path):
    rng, out, more = random.Random(7), tmp_path / "run", dict(save_every=2, group_size=2)

    def writing():
        return any((out / "checkpoints").glob(".partial*"))

    def steps_written():
        path = out / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    run = runs.Process(runs.flags(tiny, judge.url, out, steps=10000, **more), patch=SLOW_SAVES)
    newest = 0
    for kill in range(20):
        assert runs.wait_for(lambda: (out / "config.json").exists())
        seen = len(runs.rows(out)) if kill % 4 else 0
        if kill % 2:
            assert runs.wait_for(writing)
            time.sleep(rng.uniform(0, 0.5))
        elif kill % 4:
            assert runs.wait_for(lambda seen=seen: steps_written() > seen)
            time.sleep(rng.uniform(0, 1))
        else:  # perhaps before it has even begun
            time.sleep(rng.uniform(0, 2))
        run.kill()
        steps = steps_written()
        whole = [int(path.name[5:]) for path in checkpoint.checkpoints_of(out)]
        newest, before = max(whole, default=0), newest
        assert (
            newest >= before and newest > steps - 2 - 1
        )  # the save after the last line may have been under way
        if whole:
            AutoModelForCausalLM.from_pretrained(out / "checkpoints" / f"step_{newest:06d}")
        run = runs.Process(["--resume", str(out)], patch=SLOW_SAVES)
    assert runs.wait_for(lambda: (out / f"checkpoints/step_{newest + 2:06d}").exists())
    run.process.send_signal(signal.SIGINT)
    assert run.wait(60)[0] == 130
    done = len(runs.rows(out))
    assert [r["step"] for r in runs.rows(out)] == list(range(1, done + 1))
    assert done >= newest + 2  # how far it came in all is a matter of the machine's speed
    left = {".lock", "checkpoints", "config.json", "dialogues.jsonl", "metrics.jsonl"}
    assert {path.name for path in out.iterdir()} == left
    left = list((out / "checkpoints").iterdir())
    assert len(left) == 2 and all((p / "trainer.pt").exists() for p in left)
    whole = complete(tiny, judge, tmp_path / "whole", steps=done, **more)
    assert [runs.steady(r) for r in runs.rows(out)] == [runs.steady(r) for r in runs.rows(whole)]
    assert runs.same(runs.weights(out, done), runs.weights(whole, done))


# ---- a rank dies ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "how,place",
    [
        ("kill", "selfplay.play"),
        ("kill", "train.settle"),
        ("kill", "grpo.Learner.step"),
        ("raise", "train.settle"),
    ],
)
def test_when_a_rank_dies_the_other_ends_with_one_message(how, place, tiny, judge, tmp_path):
    out = tmp_path / "run"
    act = KILL if how == "kill" else "raise ValueError('out of luck')"
    when = f"count.append(1)\n    if os.environ['RANK'] == '1' and len(count) == 3: {act}"
    patch = "import grpo, selfplay, os; count = []" + DIE.format(place=place, when=when)
    run = runs.Process(runs.flags(tiny, judge.url, out, steps=10000, save_every=1), 2, patch)
    assert runs.wait_for(lambda: len(runs.rows(out)) >= 2)
    code, said, err = run.wait(60)
    assert code != 0 and run.gone(5)
    mine = [line for line in err.splitlines() if line.startswith("error:")]
    assert mine == [
        "error: another rank has ended (see its own message); "
        "go on from the last checkpoint with --resume"
    ], err[-3000:]
    assert ("out of luck" in err) == (how == "raise")
    code, said, err = runs.Process(["--resume", str(out), "--steps", "4"], 2).wait()
    assert code == 0 and [r["step"] for r in runs.rows(out)] == [1, 2, 3, 4]


@pytest.mark.slow
def test_ctrl_c_under_torchrun(tiny, judge, tmp_path):
    out = tmp_path / "run"
    run = runs.Process(
        runs.flags(tiny, judge.url, out, steps=10000, agreement="judge", max_turns=8), 2
    )
    assert runs.wait_for(lambda: len(runs.rows(out)) >= 2)
    os.killpg(run.process.pid, signal.SIGINT)  # as a terminal does: torchrun and both ranks
    code, said, err = run.wait(60)
    done = len(runs.rows(out))
    assert run.gone()
    assert (out / "checkpoints" / f"step_{done:06d}" / "trainer.pt").exists(), err[-3000:]


@pytest.mark.slow
def test_a_spent_budget_stops_every_rank(tiny, judge, tmp_path):
    kinds = {"play": dict(agreement="judge", max_turns=6), "learn": {"fsdp": True}}
    for name, more in kinds.items():
        out = tmp_path / name
        flags = runs.flags(tiny, judge.url, out, steps=10000, judge_budget=30, **more)
        code, said, err = runs.Process(flags, 2).wait()
        assert code != 0 and "--judge-budget" in said
        # torchrun ends a rank (-15) that is a moment later than the other
        codes = set(re.findall(r"exitcode +: (-?\d+)", err))
        assert "3" in codes and codes <= {"3", "-15"}, err[-3000:]
        rows = runs.rows(out)
        assert sum(row["judge_calls"] for row in rows) <= 30
        assert (out / "checkpoints" / f"step_{len(rows):06d}" / "trainer.pt").exists()


# ---- a full disk ---------------------------------------------------------------------------------


def built(tiny, **more):
    """(settings, policy, world) after five optimizer steps with made-up gradients."""
    flags = ["--model", tiny, "--dtype", "fp32"]
    for key, value in more.items():
        flags += [f"--{key.replace('_', '-')}", str(value)]
    settings = read_settings(flags)
    world = World(0, 1, torch.device("cpu"))
    policy = build(settings, world)
    torch.manual_seed(3)
    for _ in range(5):
        for master in policy.optimizer.masters.values():
            master.grad = torch.randn_like(master)
        policy.optimizer.step(1.0)
    return settings, policy, world


@pytest.mark.parametrize("share", [0.5, 1.5])  # full in the weights, or in the trainer's state
def test_a_save_that_fails_keeps_the_one_before(share, tiny, tmp_path, capfd):
    settings, policy, world = built(tiny, lora_rank=0)

    def save(step):
        return checkpoint.save_checkpoint(tmp_path, step, settings, policy, world)

    folder = save(1)
    size = (folder / "model.safetensors").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * size), hard))
        assert save(2) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert "no checkpoint at step 2" in capfd.readouterr().err
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_000001"]
    AutoModelForCausalLM.from_pretrained(folder)
    assert save(3).name == "step_000003"


@pytest.mark.parametrize("more", [{}, {"lora_rank": 4}])
def test_a_run_begins_only_where_a_checkpoint_fits(more, tiny, tmp_path, monkeypatch):
    out = tmp_path / "a" / "run"
    settings, policy, world = built(tiny, out=str(out), **more)
    folder = checkpoint.save_checkpoint(tmp_path / "one", 1, settings, policy, world)
    size = sum((folder / name).stat().st_size for name in ("model.safetensors", "trainer.pt"))
    usage = shutil.disk_usage(tmp_path)

    def free(share):
        left = usage._replace(free=share * size)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: left)

    free(0.95)
    refused = (
        "--out .*run: not one checkpoint fits there .* GB are needed, .* are free.*; make room"
    )
    with contextlib.ExitStack() as stack, pytest.raises(cli.UserError, match=refused):
        take_folder(out, settings, {}, policy.model, stack)
    assert not out.parent.exists()
    free(1.1)
    with contextlib.ExitStack() as stack:
        take_folder(out, settings, {}, policy.model, stack)
    assert sorted(path.name for path in out.iterdir()) == [".lock", "config.json"]


@contextlib.contextmanager
def small_disk(folder, size):
    """A tmpfs of `size` bytes mounted at `folder`; skips the test where that is not allowed."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_run_on_a_full_disk_goes_on_and_its_checkpoint_stays(tiny, judge, tmp_path):
    with small_disk(tmp_path / "disk", 2_500_000) as disk:
        out = disk / "run"
        flags = runs.flags(tiny, judge.url, out, steps=3, save_every=1, keep=5)
        code, said, err = runs.Process(flags).wait()
        steps = [path.name for path in (out / "checkpoints").iterdir()]
        assert code == 3 and "no checkpoint at step 3" in err, err
        assert "step_000001" in steps and "step_000003" not in steps
        assert "the last checkpoint could not be saved" in said
        assert all((out / "checkpoints" / step / "trainer.pt").exists() for step in steps)
        AutoModelForCausalLM.from_pretrained(out / "checkpoints" / steps[-1])
        shutil.rmtree(out)
        out = disk / "crammed"
        cram = f"if a[2] == 2: os.system('dd if=/dev/zero of={disk}/filler 2>/dev/null')"
        flags = runs.flags(tiny, judge.url, out, steps=50, save_every=1)
        code, said, err = runs.Process(
            flags, patch=DIE.format(place="train.deal", when=cram)
        ).wait()
        assert code == 2 and "Traceback" not in err, err
        assert err.strip().splitlines()[-1].startswith("error: --out: cannot write"), err
        (disk / "filler").unlink()
        # the disk holds one checkpoint, not two
        code, said, err = runs.Process(["--resume", str(out), "--steps", "2"]).wait()
        assert [row["step"] for row in runs.rows(out)] == [1, 2], err
        assert code == 3 and "the last checkpoint could not be saved" in said


# ---- LoRA ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_merged_checkpoint_computes_what_the_adapters_do(kind, tmp_path):
    folder = runs.saved_model(tmp_path / "base", kind)
    settings, policy, world = built(folder, lora_rank=4, lr=0.01)
    model = policy.model
    names = [name for name, _ in model.named_parameters()]
    assert set(policy.optimizer.masters) == {n for n in names if n.endswith((".A", ".B"))}
    ids = torch.arange(5, 45)[None]
    saved = checkpoint.save_checkpoint(tmp_path, 1, settings, policy, world)
    with torch.no_grad():
        adapted = model(ids).logits
        with lm.adapters_off(model):
            base = model(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(saved)(ids).logits
        untouched = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    torch.testing.assert_close(base, untouched, rtol=1e-5, atol=1e-5)
    assert (adapted - base).abs().max() > 0.1
    assert (merged - adapted).abs().max() < 1e-5 * adapted.abs().max()


WHOLE = dict(temperature=0.7, top_p=1.0, final_top_p=1.0)  # without a nucleus


def test_the_reference_of_an_adapted_model_is_its_base(tiny):
    """The gradient with a copy of the base as reference is that with the adapters turned off."""
    _, policy, _ = built(tiny, lora_rank=4, lr=0.01, beta=0.1, **WHOLE)
    group = with_advantages(policy.model)
    gradients = []
    for with_copy in (False, True):
        settings, policy, _ = built(tiny, lora_rank=4, lr=0.01, beta=0.1, **WHOLE)
        model, optimizer, reference = policy.model, policy.optimizer, policy.reference
        assert reference is model
        if with_copy:
            reference = lm.load(tiny, "fp32")[0].requires_grad_(False)
        learner = grpo.Learner(model, optimizer, settings, reference)
        for tree, rows in packing.pack(group, "dialogue", 10**6):
            learner.backward(tree, rows)
        gradients.append({n: p.grad.clone() for n, p in optimizer.masters.items()})
        assert learner.step()["kl_ref"] > 0.01
    own, copied = gradients
    assert all(torch.allclose(own[n], copied[n], rtol=1e-5, atol=1e-7) for n in own)


def with_advantages(model):
    """Four short dialogues of this model with advantages."""
    how = selfplay.PlaySettings(
        max_turns=2, turn_tokens=6, final_tokens=6, agreement="none", temperature=0.7, top_p=1.0
    )
    voice = chat.Voice(model, helpers.tokenizer())
    group = selfplay.play((voice, voice), helpers.dialogues(1, 4), how)
    for dialogue, advantage in zip(group, (1.0, -1.0, 0.5, -0.5)):
        dialogue.advantage = advantage
    return group


# ---- the memory plan -----------------------------------------------------------------------------

# hidden, layers, vocabulary beside the tokenizer's
SIZES = {"small": (512, 6, 1500), "wide": (1024, 4, 3000), "deep": (640, 16, 1000)}


def random_model(folder, hidden, layers, more):
    """A randomly initialised model on disk."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=2,
        vocab_size=len(helpers.tokenizer()) + more,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    helpers.tokenizer().save_pretrained(folder)
    return str(folder)


def peak(said):
    """The peak that --plan prints."""
    lines = [line.split() for line in said.splitlines()]
    return float(next(line[-1] for line in lines if line and line[0] == "peak"))


PLANNED = dict(
    steps=2, scenarios_per_step=1, group_size=2, turn_tokens=24, final_tokens=32, max_turns=2
)


@pytest.fixture(scope="module")
def nothing(tiny, judge, tmp_path_factory):
    """GB that a run of next to no model takes: Python, torch and the like."""
    least = {**PLANNED, "micro_tokens": 1, "turn_tokens": 2}
    out = complete(tiny, judge, tmp_path_factory.mktemp("nothing") / "run", **least)
    return runs.rows(out)[-1]["peak_memory_gb"]


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_the_plan_tells_the_memory_that_a_run_takes(size, nothing, tmp_path):
    model = random_model(tmp_path / "model", *SIZES[size])

    def score(text):
        """Never twice the same: each step learns."""
        return zlib.crc32(text.encode()) % 501 / 100

    with JudgeServer(score, offers=("json",)) as judge:
        rows = runs.rows(complete(model, judge, tmp_path / "run", **PLANNED))
    assert not any(row["no_evidence"] for row in rows)
    used = max(row["peak_memory_gb"] for row in rows) - nothing
    flags = runs.flags(model, judge.url, tmp_path / "never", **PLANNED)
    code, said, err = runs.Process([*flags, "--plan"]).wait()
    assert code == 0 and "fits in 24 GB: yes" in said and "largest: " in said, err
    assert not (tmp_path / "never").exists()
    assert used == pytest.approx(peak(said), rel=0.2), said


def test_a_plan_names_the_setting_to_change(tmp_path, capsys):
    config = Qwen2Config(
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=48,
        num_attention_heads=40,
        num_key_value_heads=8,
        vocab_size=152064,
    )
    config.save_pretrained(tmp_path)  # 14B, of which nothing is ever allocated
    helpers.tokenizer().save_pretrained(tmp_path)

    def plan(*more):
        code = train.main(["--plan", "--model", str(tmp_path), *more])
        return code, capsys.readouterr().out

    code, alone = plan("--lora-rank", "0")
    assert code == 0 and peak(alone) > 14 * 16 and "fits in 96 GB: no" in alone
    assert "largest: optimizer; to need less: --fsdp" in alone
    less = "--gradient-checkpointing"
    sharded = ["--lora-rank", "0", "--nproc", "8", "--fsdp", "--scenarios-per-step", "8"]
    _, shards = plan(*sharded, less)
    assert 50 < peak(shards) < 85
    _, lora = plan("--lora-rank", "16", less)
    assert 28 < peak(lora) < 45 and "fits in 80 GB: yes" in lora
    _, large = plan("--lora-rank", "16", "--micro-tokens", "30000", "--group-size", "64")
    assert less in large.splitlines()[-1]
