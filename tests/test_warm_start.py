"""The warm start: written negotiations, imitated with the streams and learner of self-play."""

import dataclasses
import hashlib
import json
import math
import re

import helpers
import pytest
import runs
import torch
from safetensors.torch import load_file
from test_train import complaint
from transformers import AutoModelForCausalLM, AutoTokenizer

import checkpoint
import cli
import dataset
import grpo
import model as lm
import packing
import selfplay
import train
from chat import ChatFormat
from settings import RECIPES, Settings

SAID = [
    ["We share the water by day.", "No, the hospital first."],
    ["A reserve for the hospital, then the farm.", "Agreed.", "Agreed: by Friday."],
    ["The farm waits.", "I propose a plan.", "Fair to both of us.", "I will not agree to that!"],
]


def demonstrations():
    """Three negotiations of different lengths on different dilemmas."""
    return [
        dataset.Demonstration(
            helpers.scenario(
                f"s{i}", "One reservoir is left." + " It is dry." * i + " Who gets the water?"
            ),
            tuple(turns),
            i < 2,
            f"We share it, step by step, {i}.",
        )
        for i, turns in enumerate(SAID)
    ]


def settings(**more):
    """Those of the recipe, as a tiny model can use them."""
    recipe = {
        **RECIPES["warm-start"],
        "dtype": "fp32",
        "lora_rank": 0,
        **more,
    }
    return dataclasses.replace(Settings(), **recipe)


def likelihood(model, streams):
    """(sum of -log-prob, number) of the masked tokens of (ids, mask) pairs, by plain forwards."""
    total = sum(
        -(helpers.plain_logprobs(model, ids) * torch.tensor(mask[1:])).sum()
        for ids, mask in streams
    )
    return total, sum(sum(mask) for _, mask in streams)


@pytest.mark.parametrize("template", ["chatml", "gemma", "mistral", "qwen3"])
def test_what_is_imitated_is_what_was_written(template):
    made = {
        "chatml": helpers.CHATML,
        "gemma": helpers.GEMMA,
        "mistral": helpers.MISTRAL,
        "qwen3": helpers.QWEN3,
    }[template]
    chat = helpers.voice(template=made).chat
    for demonstration in demonstrations():
        d = selfplay.dialogue_of(demonstration, chat, settings())
        assert (
            [t.text for t in d.turns] == list(demonstration.turns)
            and d.final == demonstration.final
            and d.advantage == 1
        )
        for speaker, stream in enumerate(d.streams):
            trained = [chat.text([i for i, m in zip(s.ids, s.mask) if m]) for s in stream]
            own = list(demonstration.turns[speaker::2])
            assert trained == ([" ".join(own)] if len(stream) == 1 else own) or "".join(
                own
            ).replace(" ", "") == "".join(trained).replace(" ", "")
            for (
                s
            ) in stream:  # each of the agent's turns is trained with its end, and nothing else is
                assert (
                    sum(s.mask) == sum(len(chat.turn(t)) for t in own) / len(stream)
                    or len(stream) > 1
                )
                assert all(math.isnan(p) == bool(m) for p, m in zip(s.logprobs, s.mask))
        ids = [i for i, m in zip(d.final_sample.ids, d.final_sample.mask) if m]
        assert ids == chat.turn(demonstration.final)


def test_it_is_the_stream_of_a_dialogue_that_was_played():
    """What two agents said, written down and imitated, gives the very streams they had."""
    speaker, cfg = (
        helpers.voice(),
        settings(agreement="none", max_turns=3, turn_tokens=6, final_tokens=8),
    )
    speaker.chat.ends = {speaker.chat.end}
    (played,) = selfplay.play((speaker, speaker), helpers.dialogues(members=1), cfg, seed=1)
    for turn in played.turns:
        turn.truncated = turn.ids[-1] != speaker.chat.end
    texts = [speaker.chat.text(t.ids) for t in played.turns]
    again = selfplay.dialogue_of(
        dataset.Demonstration(
            played.scenario,
            tuple(texts),
            False,
            speaker.chat.text(
                [i for i, m in zip(played.final_sample.ids, played.final_sample.mask) if m]
            ),
        ),
        speaker.chat,
        cfg,
    )
    assert [[s.ids[: s.mask.index(1)] for s in stream] for stream in again.streams] == [
        [s.ids[: s.mask.index(1)] for s in stream] for stream in played.streams
    ]


@pytest.mark.parametrize("kind", helpers.KINDS)
@pytest.mark.parametrize("tokens", ["dialogue", "final", "both"])
def test_the_gradient_is_that_of_plain_likelihood(kind, tokens):
    model, cfg = helpers.tiny(kind), settings(train_tokens=tokens)
    chat = ChatFormat(helpers.tokenizer(), model)
    dialogues = [selfplay.dialogue_of(d, chat, cfg) for d in demonstrations()]
    learner = grpo.Learner(model, grpo.Optimizer(model, lr=0.0), cfg)
    for dialogue in dialogues:
        for tree, rows in packing.pack([dialogue], tokens, cfg.micro_tokens):
            learner.backward(tree, rows)
    mine = {n: p.grad.clone() for n, p in model.named_parameters()}
    streams = (
        [(s.ids, s.mask) for d in dialogues for stream in d.streams for s in stream]
        if tokens != "final"
        else []
    )
    streams += (
        [(d.final_sample.ids, d.final_sample.mask) for d in dialogues]
        if tokens != "dialogue"
        else []
    )
    model.zero_grad()
    total, number = likelihood(model, streams)
    total.backward()
    for name, p in model.named_parameters():
        assert (mine[name] - p.grad).abs().max() <= 1e-4 * p.grad.abs().max(), name
    assert learner.nll(dialogues) == (pytest.approx(total.item(), rel=1e-5), number)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    means = learner.step()
    assert (
        means["trained_tokens"] == number
        and means["ratio_mean"] == 1
        and means["clip_frac"] == 0
        and means["logprob_gap"] == 0
    )
    assert means["entropy"] == pytest.approx(
        total.item() / number, rel=1e-5
    )  # -log-prob of what was written: the loss that is shown


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return runs.saved_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Twelve scenarios, and a negotiation on each."""
    folder, lines = tmp_path_factory.mktemp("files"), []
    for i in range(12):
        lines.append(
            {
                "id": f"s{i}",
                "tier": "everyday",
                "dilemma": f"Well {i} is dry. Who gets the water?",
                "personas": list(helpers.PERSONAS),
            }
        )
    (folder / "scenarios.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    written = [
        {
            "scenario_id": f"s{i}",
            "personas": list(helpers.PERSONAS),
            "turns": SAID[i % 3],
            "agreed": i % 3 < 2,
            "final": f"We share well {i}.",
        }
        for i in range(12)
    ]
    (folder / "demonstrations.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in written)
    )
    return folder


def flags(tiny, files, out, **more):
    made = {
        "recipe": "warm-start",
        "model": tiny,
        "scenarios": files / "scenarios.jsonl",
        "demonstrations": files / "demonstrations.jsonl",
        "out": out,
        "steps": 6,
        "scenarios_per_step": 4,
        "dtype": "fp32",
        "lora_rank": 4,
        "lr": 0.01,
        "warmup_steps": 1,
        **more,
    }
    return runs.as_flags(made)


@pytest.fixture(scope="module")
def finished(tiny, files, tmp_path_factory):
    """Two epochs of three steps: (folder, stdout)."""
    out = tmp_path_factory.mktemp("run") / "run"
    code, said, err = runs.Process(flags(tiny, files, out)).wait()
    assert code == 0, err
    return out, said


def test_a_run_learns_and_leaves_what_every_run_leaves(finished, tiny):
    out, said = finished
    rows = runs.rows(out)
    steps, held = [r for r in rows if "loss" in r], [r for r in rows if "heldout" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6] and [r["step"] for r in held] == [
        0,
        3,
        6,
    ]
    assert (
        held[2]["heldout"]["loss"] < held[1]["heldout"]["loss"] < held[0]["heldout"]["loss"]
        and steps[-1]["loss"] < steps[0]["loss"]
    )
    assert (
        "11 negotiations to learn from, 1 held out, 3 steps an epoch" in said and str(out) in said
    )
    assert (
        said.count("held-out loss") == 3
        and json.loads((out / "config.json").read_text())["recipe"] == "warm-start"
    )
    assert [p.name for p in sorted((out / "checkpoints").iterdir())] == [
        "step_000003",
        "step_000006",
    ]  # the best one, and --keep 1 beside it
    assert checkpoint.locate(str(out))[0].endswith(
        "step_000006"
    )  # --model with the run's folder takes the best
    # the adapter, merged into the model that it was made for, gives the weights (bf16: 8 bits)
    folder = out / "checkpoints" / "step_000006"
    model = AutoModelForCausalLM.from_pretrained(tiny)
    lm.merge_adapter(model, folder / "adapter.safetensors")
    saved, before = (
        load_file(folder / "model.safetensors"),
        AutoModelForCausalLM.from_pretrained(tiny).state_dict(),
    )
    for name, p in model.state_dict().items():
        change = (saved[name] - before[name]).abs().max()
        assert (p - saved[name]).abs().max() <= 0.02 * change + 1e-7, name
        assert change > 0 or "proj" not in name


STOP_AT_STEP_3 = """
import os, signal
once = train.demonstration_step
def third(run, step, dialogues):
    if step == 3:
        os.kill(os.getpid(), signal.SIGINT)
    return once(run, step, dialogues)
train.demonstration_step = third
"""


def test_resuming_changes_nothing(finished, tiny, files, tmp_path):
    """Six steps equal three, a checkpoint and three more, bit by bit.

    The number of steps is part of the mathematics, because the rate falls with it.
    """
    out = tmp_path / "run"
    assert runs.Process(flags(tiny, files, out), patch=STOP_AT_STEP_3).wait()[0] == 130
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step_000003"]
    code, _, err = runs.Process(["--resume", str(out), "--steps", "9"]).wait()
    assert code == 2 and "--steps would change the mathematics" in err
    again = runs.Process(["--resume", str(out)], fresh=True)  # with hash seeds of its own
    code, _, err = again.wait()
    assert code == 0, err
    assert runs.same(runs.weights(out, 6), runs.weights(finished[0], 6))
    assert [runs.steady(r) for r in runs.rows(out) if "loss" in r] == [
        runs.steady(r) for r in runs.rows(finished[0]) if "loss" in r
    ]


def test_two_ranks_learn_what_one_learns(finished, tiny, files, tmp_path):
    code, _, err = runs.Process(flags(tiny, files, tmp_path / "run"), ranks=2).wait()
    assert code == 0, err
    one, two = runs.weights(finished[0], 6), runs.weights(tmp_path / "run", 6)
    assert all(torch.allclose(one[n], two[n], atol=1e-5) for n in one if ":" not in n)


def test_it_ends_when_the_heldout_loss_rises(tiny, files, tmp_path):
    code, said, err = runs.Process(flags(tiny, files, tmp_path / "run", lr=0.5, steps=60)).wait()
    assert (
        code == 0 and "the held-out loss rises, so the checkpoint before is the one to use" in said
    ), err
    held = {r["step"]: r["heldout"]["loss"] for r in runs.rows(tmp_path / "run") if "heldout" in r}
    *before, last = held.values()
    assert last > min(before) and max(held) < 60
    best = int(checkpoint.locate(str(tmp_path / "run"))[0][-6:])
    assert held[best] == min(before)


def test_it_ends_where_an_epoch_cannot_be_saved(tiny, files, tmp_path, monkeypatch, capsys):
    """Or the checkpoint before the loss rose, the one to use, would not be there."""
    monkeypatch.setattr("run.save_checkpoint", lambda *arguments: None)  # a full disk
    monkeypatch.setattr(
        "signal.signal", lambda *arguments: None
    )  # the test's process keeps its own
    assert train.main(flags(tiny, files, tmp_path / "run", steps=60)) == 3
    said = capsys.readouterr().out
    assert "a checkpoint could not be saved; make room, then --resume" in said
    losses = [row["step"] for row in runs.rows(tmp_path / "run") if "heldout" in row]
    assert len(losses) == 2  # before the first epoch, and after it


GOOD = {
    "scenario_id": "s0",
    "personas": list(helpers.PERSONAS),
    "turns": ["We share.", "Agreed."],
    "agreed": True,
    "final": "We share the well.",
}
BAD = {
    "no JSON": ('{"scenario_id": ', r"mine.jsonl:2: cannot be read"),
    "an unknown scenario": (
        GOOD | {"scenario_id": "nowhere"},
        r'mine.jsonl:2: scenario_id "nowhere" is not in .*scenarios.jsonl',
    ),
    "one turn": (
        GOOD | {"turns": ["We share."]},
        r'mine.jsonl:2: "turns" holds 1; a negotiation has at least two',
    ),
    "an empty turn": (
        GOOD | {"turns": ["We share.", " "]},
        r'mine.jsonl:2: "turns" holds " "; write each turn as a text',
    ),
    "a number": (
        GOOD | {"turns": ["We share.", 5]},
        r'mine.jsonl:2: "turns" holds 5; write each turn as a text',
    ),
    "one persona": (
        GOOD | {"personas": GOOD["personas"][:1]},
        r'mine.jsonl:2: "personas" holds 1 instead of two',
    ),
    "no final": (GOOD | {"final": ""}, r'mine.jsonl:2: "final" is empty'),
    "yes for true": (
        GOOD | {"agreed": "yes"},
        r'mine.jsonl:2: "agreed" is text instead of true or false',
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_line_is_named(case, tiny, files, tmp_path, capfd):
    line, says = BAD[case]
    (tmp_path / "mine.jsonl").write_text(
        json.dumps(GOOD) + "\n" + (line if isinstance(line, str) else json.dumps(line)) + "\n"
    )
    assert re.search(
        says,
        complaint(
            flags(tiny, files, tmp_path / "run", demonstrations=tmp_path / "mine.jsonl"), capfd
        ),
    )
    assert not (tmp_path / "run").exists()


def test_a_file_of_one_scenario_or_none_is_refused(tiny, files, tmp_path, capfd):
    (tmp_path / "mine.jsonl").write_text(json.dumps(GOOD) + "\n")
    assert "one scenario is too few" in complaint(
        flags(tiny, files, tmp_path / "run", demonstrations=tmp_path / "mine.jsonl"), capfd
    )
    assert "no.jsonl: cannot be read" in complaint(
        flags(tiny, files, tmp_path / "run", demonstrations=tmp_path / "no.jsonl"), capfd
    )
    assert not (tmp_path / "run").exists()


# ---- the shipped adapter -------------------------------------------------------------------------


@pytest.fixture
def shipped(finished, tiny, tmp_path, monkeypatch):
    """The default model as it would be, had it been made of the tiny one."""
    adapter = tmp_path / "warm_start.safetensors"
    adapter.write_bytes(
        (finished[0] / "checkpoints" / "step_000006" / "adapter.safetensors").read_bytes()
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(lm, "default_model_folder", lambda: tiny)
    monkeypatch.setattr(lm, "WARM_START", adapter)
    monkeypatch.setattr(lm, "WARM_STRENGTH", 0.5)
    monkeypatch.setattr(lm, "WARM_START_SHA256", hashlib.sha256(adapter.read_bytes()).hexdigest())
    return adapter


def test_the_default_model_is_the_base_with_the_adapter_in_it(shipped, finished, tiny):
    model, tokenizer = lm.load(lm.WARM_MODEL, "fp32")
    trained, base = (
        load_file(finished[0] / "checkpoints" / "step_000006" / "model.safetensors"),
        lm.load(tiny, "fp32")[0].state_dict(),
    )
    for name, p in model.state_dict().items():
        half_way = (trained[name] + base[name]) / 2
        assert torch.allclose(p, half_way, rtol=2**-8, atol=2e-3), name  # kept in bf16
    folder = lm.warm_model_folder()
    assert folder.name == f"{lm.WARM_MODEL}-{lm.WARM_START_SHA256[:8]}-0.5" and [
        p.name for p in folder.parent.iterdir()
    ] == [folder.name]
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert (
        lm.warm_model_folder() == folder
        and (folder / "model.safetensors").stat().st_mtime_ns == stamp
    )  # made once
    assert (
        AutoTokenizer.from_pretrained(folder).get_vocab()
        == AutoTokenizer.from_pretrained(tiny).get_vocab()
    )


def test_an_adapter_that_is_not_the_shipped_one_is_one_line(shipped):
    good = shipped.read_bytes()
    shipped.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))  # one bit
    line = r"^--model negotiator-135m: .*warm_start.safetensors is not the one .*; put it back, or "
    for spoil in (lambda: None, shipped.unlink):
        spoil()
        with pytest.raises(cli.UserError, match=line):
            lm.load(lm.WARM_MODEL)
    assert not lm.cache_folder().exists() or list(lm.cache_folder().iterdir()) == []


def test_the_shipped_adapter_is_the_one_that_was_tested():
    assert hashlib.sha256(lm.WARM_START.read_bytes()).hexdigest() == lm.WARM_START_SHA256
    assert lm.WARM_START.stat().st_size < 10_000_000
