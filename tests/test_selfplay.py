"""Dialogues against plain Hugging Face forwards.

Ids, masks, log-probs, templates, verdicts that arrive at any time, ends of all kinds.
"""

import concurrent.futures
import dataclasses
import io
import json
import math
import os
import random
import subprocess
import sys
import zlib
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from test_sampler import chi_square, nucleus_of
from transformers import GenerationConfig

import cli
import dataset
import model as lm
import packing
import progress
import selfplay
from attention import RaggedCache
from chat import Turn, Voice
from rubric import Verdict

TEMPLATES = {
    "chatml": helpers.CHATML,
    "gemma": helpers.GEMMA,
    "mistral": helpers.MISTRAL,
    "qwen3": helpers.QWEN3,
}


def settings(**more):
    """Short dialogues; temperatures away from 1, so that a forgotten one shows."""
    short = dict(
        max_turns=4,
        turn_tokens=10,
        final_tokens=8,
        agreement="none",
        temperature=0.6,
        top_p=1.0,
        final_temperature=0.7,
        final_top_p=1.0,
    )
    return selfplay.PlaySettings(**{**short, **more})


def talker(kind="llama", template=helpers.CHATML, stop=0.15, seed=0, ends=(2,), **more):
    """A Voice that ends its turns now and then.

    A bias makes each end the likeliest token in a share `stop` of the places.
    """
    model, tokenizer = helpers.tiny(kind, seed), helpers.tokenizer(template, **more)
    some = torch.randint(4, len(tokenizer), (8, 40), generator=torch.Generator().manual_seed(0))
    logits = model(some).logits.detach().flatten(0, 1)
    model.generation_config = GenerationConfig(eos_token_id=list(ends))
    bias = torch.zeros(len(tokenizer))
    for end in ends:
        bias[end] = (logits.max(1).values - logits[:, end]).quantile(stop)
    model.get_output_embeddings().bias = torch.nn.Parameter(bias)
    return Voice(model, tokenizer)


class Script:
    """A judge by rule, whose verdicts come when the test wants.

    moment "asked": at once; "last": when nobody can go on without one, in random order; "random":
    some number of tokens later. No clock and no thread, so every run is the same.
    """

    def __init__(self, rule, moment="asked", seed=0):
        self.rule, self.moment, self.pending = rule, moment, []
        self.rng = np.random.default_rng(seed)

    def agreed(self, dilemma, personas, turns):
        future = concurrent.futures.Future()
        due = {"asked": 0, "last": math.inf, "random": int(self.rng.integers(0, 120))}[self.moment]
        self.pending.append([due, future, Verdict(self.rule(dilemma, turns))])
        self.tick(0)
        return future

    def tick(self, by=1):
        for item in self.pending:
            item[0] -= by
        for _, future, verdict in [i for i in self.pending if i[0] <= 0]:
            future.set_result(verdict)
        self.pending = [i for i in self.pending if i[0] > 0]

    def wait(self, futures, return_when):
        """In place of concurrent.futures.wait."""
        assert futures and not any(f.done() for f in futures)
        chosen = futures[self.rng.integers(len(futures))]
        next(i for i in self.pending if i[1] is chosen)[0] = 0
        self.tick(0)

    def score(self, dilemma, personas, turns, final):
        future = concurrent.futures.Future()
        future.set_result(Verdict(float(len(turns))))
        return future


def sometimes(dilemma, turns):
    """Agreed at a length that depends on the words, from 2 to 7 turns; before that sometimes None.

    The salt is one with which every kind of model and template sees every kind of end.
    """
    draw = zlib.crc32(("31" + dilemma + turns[0].text).encode())
    return len(turns) >= 2 + draw % 6 or (None if draw % 3 else False)


def play(speaker, dialogues, cfg, judge=None, **more):
    """selfplay.play with one Voice for both agents."""
    voices = (speaker, speaker)
    if judge is None:
        return selfplay.play(voices, dialogues, cfg, **more)

    def tick(say):
        judge.tick()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selfplay.concurrent.futures, "wait", judge.wait)
        return selfplay.play(voices, dialogues, cfg, judge, on_token=tick, **more)


def content(dialogue):
    """Everything that play has written, as plain data."""
    return {key: value for key, value in dialogue.record().items() if key != "group"}


def plain(dialogue):
    """The words, and how it ended."""
    turns = [(turn.ids, turn.text, turn.truncated) for turn in dialogue.turns]
    final_ids = dialogue.record()["final_ids"]
    return turns, dialogue.agreed, dialogue.stop, dialogue.final, final_ids


def samples(dialogue):
    """All Samples, the final one last."""
    found = [*dialogue.streams[0], *dialogue.streams[1]]
    if dialogue.final_sample:
        found.append(dialogue.final_sample)
    return found


def check_logprobs(model, dialogue, cfg):
    """Recorded log-probs are those of a plain forward of each sample; outside the mask is 0."""
    for sample in samples(dialogue):
        columns = (sample.mask, sample.logprobs, sample.cuts, sample.log_masses)
        assert all(len(column) == len(sample.ids) for column in columns)
        final = sample is dialogue.final_sample
        temperature = cfg.final_temperature if final else cfg.temperature
        expected = helpers.plain_logprobs(model, sample.ids, temperature).detach()
        got, mask = torch.tensor(sample.logprobs), torch.tensor(sample.mask) > 0
        assert mask.any() and not mask[0] and not got[~mask].any()
        torch.testing.assert_close(got[mask], expected[mask[1:]], rtol=0, atol=1e-4)


def check_masks(dialogue):
    """Masked ids are the sampled ones, each turn in exactly one place."""
    for me, stream in enumerate(dialogue.streams):
        masked, spoken = [], []
        for sample in stream:
            masked += sample.trained_ids()
        for turn in dialogue.turns:
            spoken += turn.ids if turn.speaker == me else []
        assert masked == spoken


# ---- log-probs, masks, tokens -------------------------------------------------------------------


@pytest.mark.parametrize("context_turns", [0, 2])
@pytest.mark.parametrize("kind", helpers.KINDS)
def test_recorded_logprobs_are_those_of_a_plain_forward(kind, context_turns):
    cfg = settings(max_turns=5, context_turns=context_turns, agreement="judge")
    speaker = talker(kind)
    played = play(speaker, helpers.dialogues(3, 3), cfg, Script(sometimes, "random"))
    for d in played:
        check_logprobs(speaker.model, d, cfg)
        check_masks(d)
        assert d.pending_verdict.result().value == len(d.turns) and (d.stop == "agreed") == d.agreed
    assert len({len(d.turns) for d in played}) > 2  # early finishers
    lengths = set()
    for d in played:
        lengths |= {len(turn.ids) for turn in d.turns}
    assert len(lengths) > 4  # uneven turns
    assert {d.stop for d in played} == {"agreed", "max_turns"}


def masked_ids(stream, shift=0):
    """The ids of a stream under its masks, each moved to the left by `shift`."""
    found = []
    for sample in stream:
        mask = sample.mask[shift:] + sample.mask[:shift]
        found += [token for token, own in zip(sample.ids, mask) if own]
    return found


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("context_turns", [0, 2])
def test_masked_ids_decode_to_this_agents_utterances(template, context_turns):
    speaker = talker(template=TEMPLATES[template])
    decode, plain_ids = speaker.chat.tokenizer.decode, speaker.chat.plain
    cfg = settings(max_turns=5, context_turns=context_turns)
    not_canonical = 0
    for d in play(speaker, helpers.dialogues(1, 4), cfg):
        check_masks(d)
        check_logprobs(speaker.model, d, cfg)
        for turn in d.turns:
            words = turn.ids if turn.truncated else turn.ids[:-1]
            not_canonical += plain_ids(decode(words)) != words
        for me, stream in enumerate(d.streams):
            spoken = [turn for turn in d.turns if turn.speaker == me]
            said = decode(sum((turn.ids for turn in spoken), []))
            assert said.count("<|im_end|>") == sum(not turn.truncated for turn in spoken)
            assert decode(masked_ids(stream)) == said
            assert decode(masked_ids(stream, 1)) != said != decode(masked_ids(stream, -1))
            inverted = [dataclasses.replace(s, mask=[1 - m for m in s.mask]) for s in stream]
            assert decode(masked_ids(inverted)) != said
        if context_turns == 0 and template != "qwen3":
            assert [len(stream) for stream in d.streams] == [1, 1]
        else:
            assert [len(stream) for stream in d.streams] == [3, 2]
            assert [sum(s.mask) for s in d.streams[0]] == [len(t.ids) for t in d.turns[::2]]
        final = d.final_sample.trained_ids()
        assert final == d.record()["final_ids"] and d.final == speaker.chat.text(final)
    assert not_canonical  # what was sampled is not the encoding of its own text


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("me", [0, 1])
def test_views_read_as_the_template_renders_them(template, me):
    chat, space = talker(template=TEMPLATES[template]).chat, " " if template == "mistral" else ""
    view = selfplay.view_of(chat, me, helpers.scenario(), False)
    slots = {
        "me": helpers.PERSONAS[me]["name"],
        "other": helpers.PERSONAS[1 - me]["name"],
        "creed": helpers.PERSONAS[me]["creed"],
        "dilemma": helpers.scenario().dilemma,
        "marker": "",
    }
    system, case = (
        chat.tokenizer.decode(chat.plain(selfplay.fill(text, slots)))
        for text in (selfplay.SYSTEM, selfplay.TASK)
    )
    words = [
        "We share the water.",
        "No, step by step.",
        "I propose a plan.",
        "It is fair.",
        "Agreed.",
    ]
    turns = [Turn(i % 2, w, False, chat.plain(space + w) + [chat.end]) for i, w in enumerate(words)]
    messages = [{"role": "system", "content": system}]
    for said in [""] * (me == 0) + words[: 4 - me]:
        asked = {
            "role": "user",
            "content": case * (len(messages) == 1) + said + "\n\n" * bool(said) + selfplay.ASK,
        }
        messages.append(asked if len(messages) % 2 else {"role": "assistant", "content": said})
    if not chat.has_system:
        messages[:2] = [{"role": "user", "content": system + "\n\n" + messages[1]["content"]}]
    rendered = chat.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    seen = turns[: 4 - me]
    assert chat.tokenizer.decode(view.sample_to_speak(seen).ids) == rendered
    own = view.sample_with(seen, turns[4 - me])
    assert chat.tokenizer.decode(own.ids) == rendered + space + words[
        4 - me
    ] + chat.tokenizer.decode([chat.end])
    closed = view.sample_to_speak(seen, closing="Sum up.")
    assert chat.tokenizer.decode(closed.ids) == rendered.replace(
        f"{words[3 - me]}\n\n{selfplay.ASK}", f"{words[3 - me]}\n\nSum up."
    )


def test_who_answers_alone_is_not_told_to_talk():
    (d,) = play(talker(), helpers.dialogues(1, 1), settings(max_turns=0))
    text = helpers.tokenizer().decode(d.final_sample.ids)
    assert (
        text.count(d.scenario.dilemma) == 1 and "is not here to talk with" in text and not d.turns
    )
    assert "Talk it over" not in text and "You talk with" not in text and selfplay.ASK not in text


def test_a_window_does_not_pretend_to_be_the_opening():
    (d,) = play(talker(), helpers.dialogues(1, 1), settings(context_turns=2, max_turns=5))
    texts = [[helpers.tokenizer().decode(s.ids) for s in stream] for stream in d.streams]
    assert [[t.count(selfplay.ASK) for t in stream] for stream in texts] == [[1, 2, 2], [1, 2]]
    assert [[selfplay.EARLIER in t for t in stream] for stream in texts] == [
        [False, False, True],
        [False, True],
    ]
    final = helpers.tokenizer().decode(d.final_sample.ids)  # is written after the whole dialogue
    assert final.count(selfplay.ASK) == 3 and selfplay.EARLIER not in final


def by_generate(scenario, cfg):
    """The same dialogue by text, `generate` and nothing of ours: ids of the turns, of the final."""
    model, tok = helpers.tiny(), helpers.tokenizer()
    model.set_attn_implementation("eager")
    streams, turns = [], []
    a, b = scenario.personas

    def encode(text):
        return tok(text, add_special_tokens=False)["input_ids"]

    for me, other in ((a, b), (b, a)):
        slots = {
            "me": me["name"],
            "other": other["name"],
            "creed": me["creed"],
            "dilemma": scenario.dilemma,
            "marker": "",
        }
        system, case = (selfplay.fill(text, slots) for text in (selfplay.SYSTEM, selfplay.TASK))
        streams.append(
            encode(f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n") + encode(case)
        )

    def speak(me, heard, limit):
        streams[me] += encode(f"{heard}<|im_end|>\n<|im_start|>assistant\n")
        said = model.generate(
            torch.tensor([streams[me]]),
            do_sample=False,
            max_new_tokens=limit,
            eos_token_id=2,
            pad_token_id=3,
            attention_mask=torch.ones(1, len(streams[me])),
        )[0, len(streams[me]) :].tolist()
        streams[me] += said + [2] * (said[-1] != 2) + encode("\n<|im_start|>user\n")
        return said

    heard = ""
    for t in range(cfg.max_turns):
        turns.append(speak(t % 2, heard + "\n\n" * bool(heard) + selfplay.ASK, cfg.turn_tokens))
        heard = tok.decode(turns[-1], skip_special_tokens=True).strip() or selfplay.SILENCE
    request = selfplay.fill(selfplay.FINAL, {"other": b["name"], "creed": b["creed"]})
    return turns, speak(
        0, request if cfg.max_turns % 2 else heard + "\n\n" + request, cfg.final_tokens
    )


@pytest.mark.parametrize("max_turns", [3, 4])
def test_a_greedy_dialogue_is_that_of_generate(max_turns):
    cfg = settings(
        max_turns=max_turns,
        turn_tokens=16,
        final_tokens=16,
        temperature=1e-6,
        final_temperature=0.0,
    )
    for d in selfplay.play((helpers.voice(),) * 2, helpers.dialogues(3, 1), cfg):
        turns, final = by_generate(d.scenario, cfg)
        assert [t.ids for t in d.turns] == turns and d.record()["final_ids"] == final


# ---- the cache ----------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("context_turns", [0, 2])
def test_each_token_is_computed_once_per_stream(monkeypatch, context_turns, checkpointing):
    read, speaker = RaggedCache.read, talker()
    cfg = settings(context_turns=context_turns)
    expected = play(talker(), helpers.dialogues(2, 4), cfg)
    fed = []

    def watched(cache, model, rows, tokens):
        fed.extend(tokens)
        return read(cache, model, rows, tokens)

    monkeypatch.setattr(RaggedCache, "read", watched)
    if checkpointing:
        speaker.model.activation_checkpointing_enable()
    played = play(speaker, helpers.dialogues(2, 4), cfg)
    assert [content(d) for d in played] == [content(d) for d in expected]
    prompts, most = 0, 0  # tokens of shared prompts, and of all samples behind theirs
    for d in played:
        views = [selfplay.view_of(speaker.chat, me, d.scenario, False) for me in (0, 1)]
        if d.member == 0:
            assert [fed.count(view.prompt) for view in views] == [1, 1]  # once for the whole group
            prompts += sum(len(view.prompt) for view in views)
        for sample in samples(d):
            me = sample in d.streams[1]
            most += len(sample.ids) - 1 - len(views[me].prompt)
        if context_turns == 0:  # the joint solution goes on where agent 0's stream ends
            most -= len(d.streams[0][0].ids) - 1 - len(views[0].prompt)
            # nobody needs to read the end that closes a truncated turn
            most -= d.final_truncated + d.turns[3].truncated
    read_once = sum(map(len, fed)) - prompts
    if context_turns == 0:
        assert read_once == most
    else:  # all behind the prompt, once per turn; where windows overlap, less
        assert 0 < read_once <= most


def test_a_dialogue_is_the_same_in_any_company():
    cfg, speaker = settings(agreement="judge"), talker()
    alone = []
    for d in helpers.dialogues(3, 3):
        alone += map(plain, play(speaker, [d], cfg, Script(sometimes, "last")))
    together = play(speaker, helpers.dialogues(3, 3), cfg, Script(sometimes, "random"))
    assert [plain(d) for d in together] == alone
    backwards = play(speaker, helpers.dialogues(3, 3)[::-1], cfg, Script(sometimes))
    assert [plain(d) for d in backwards][::-1] == alone
    assert len({str(words) for words in alone}) == 9  # members and scenarios differ
    for step, seed in ((1, 1), (2, 0)):
        other = play(speaker, helpers.dialogues(3, 3, step), cfg, Script(sometimes), seed=seed)
        assert not any(plain(d) == words for d, words in zip(other, alone))
    twins = helpers.dialogues(1, 1) + helpers.dialogues(1, 1)  # equal ones keep apart
    assert [plain(d) for d in play(speaker, twins, cfg, Script(sometimes))] == [alone[0]] * 2


def test_two_models_each_keep_their_own_stream():
    voices, cfg = (talker(), talker("qwen2", helpers.QWEN3, seed=3)), settings()
    for d in selfplay.play(voices, helpers.dialogues(2, 2), cfg):
        check_masks(d)
        assert [len(stream) for stream in d.streams] == [1, 2]
        check_logprobs(voices[0].model, dataclasses.replace(d, streams=[d.streams[0], []]), cfg)
        second = dataclasses.replace(d, streams=[[], d.streams[1]], final_sample=None)
        check_logprobs(voices[1].model, second, cfg)


# ---- verdicts at any time -----------------------------------------------------------------------


@pytest.fixture
def forgetful(monkeypatch):
    """What lies beyond a row's length in a cache is lost, so that nobody can count on it."""
    feed = RaggedCache.feed

    def poisoned(cache, model, rows, tokens):
        for pair in cache.store.values():
            for row, length in enumerate(cache.lengths):
                for stored in pair:
                    stored[cache.slot_of[row], :, length:] = 1e4
        return feed(cache, model, rows, tokens)

    monkeypatch.setattr(RaggedCache, "feed", poisoned)


@pytest.mark.parametrize(
    "template, context_turns", [("chatml", 0), ("chatml", 2), ("qwen3", 0), ("qwen3", 1)]
)
def test_when_a_verdict_arrives_changes_nothing(monkeypatch, forgetful, template, context_turns):
    speaker = talker(template=TEMPLATES[template])
    cfg = settings(agreement="judge", max_turns=6, context_turns=context_turns)
    expected = play(speaker, helpers.dialogues(3, 2), cfg, Script(sometimes))
    assert {d.stop for d in expected} == {"agreed", "max_turns"}
    for d in expected:
        check_logprobs(speaker.model, d, cfg)
        yes = [n for n in range(2, 7) if sometimes(d.scenario.dilemma, d.turns[:n])]
        assert (len(d.turns), d.agreed) == (min(yes, default=6), bool(yes))
    order = random.Random(1)

    def anybody(says):
        return order.sample(says, (len(says) + 1) // 2)

    for moment, seed in [("last", 0), ("random", 0), ("random", 1)]:
        if seed:  # and neither does who is served first
            monkeypatch.setattr(selfplay, "choose_batch", anybody)
        got = play(speaker, helpers.dialogues(3, 2), cfg, Script(sometimes, moment, seed))
        for d, e in zip(got, expected):
            assert plain(d) == plain(e)
            assert len(samples(d)) == len(samples(e))
            for a, b in zip(samples(d), samples(e)):
                assert (a.ids, a.mask) == (b.ids, b.mask)
                # nothing of a void turn is left in a cache
                assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_a_turn_is_given_up_once_the_judge_finds_agreement_before_it():
    judge, said, speaker = Script(lambda _, turns: len(turns) == 2, "last"), [], talker()
    speaker.chat.ends = set()  # every turn is as long as it may be

    def on_token(say):
        said.append(say)
        if judge.pending and sum(other is say for other in said) == 3:
            judge.pending[0][0] = 0
            judge.tick(0)

    cfg, dialogues = settings(agreement="judge"), helpers.dialogues(1, 1)
    (d,) = selfplay.play((speaker, speaker), dialogues, cfg, judge, on_token=on_token)
    assert (len(d.turns), d.stop, len(said)) == (2, "agreed", 10 + 10 + 3 + 8)


@pytest.mark.parametrize(
    "value, turns, stop", [(None, 3, "max_turns"), (False, 3, "max_turns"), (True, 2, "agreed")]
)
@pytest.mark.parametrize("moment", ["asked", "last"])
def test_a_missing_verdict_is_no_agreement(value, turns, stop, moment):
    cfg, judge = settings(agreement="judge", max_turns=3), Script(lambda *_: value, moment)
    (d,) = play(talker(), helpers.dialogues(1, 1), cfg, judge)
    assert (len(d.turns), d.stop, d.agreed) == (turns, stop, stop == "agreed")
    assert d.final is not None


@pytest.mark.parametrize("moment", ["asked", "last"])
@pytest.mark.parametrize("on_impasse", ["zero", "complete"])
def test_the_last_turn_is_judged_too(moment, on_impasse):
    cfg = settings(agreement="judge", max_turns=3, on_impasse=on_impasse)
    judge = Script(lambda _, turns: len(turns) == 3, moment)
    (yes,) = play(talker(), helpers.dialogues(1, 1), cfg, judge)
    assert (len(yes.turns), yes.stop, yes.agreed, yes.reward) == (3, "agreed", True, None)
    assert yes.final is not None and yes.pending_verdict
    (no,) = play(talker(), helpers.dialogues(1, 1), cfg, Script(lambda *_: False, moment))
    assert (len(no.turns), no.stop, no.agreed) == (3, "max_turns", False)
    if on_impasse == "zero":
        assert (no.reward, no.final, no.final_sample, no.pending_verdict) == (0.0, None, None, None)
        check_masks(no)  # and is trained all the same
    else:
        assert no.reward is None and no.final is not None


@pytest.mark.parametrize("moment", ["asked", "last"])
def test_an_impasse_that_nobody_could_judge_is_missing_and_not_zero(moment):
    cfg = settings(agreement="judge", max_turns=3, on_impasse="zero")
    (d,) = play(talker(), helpers.dialogues(1, 1), cfg, Script(lambda *_: None, moment))
    assert (d.reward, d.final, d.pending_verdict, d.stop) == (None, None, None, "max_turns")
    assert d.judgement["failures"] == ["agreement: "]
    # the last answer is the one that counts
    judge = Script(lambda _, turns: None if len(turns) == 2 else False, moment)
    (d,) = play(talker(), helpers.dialogues(1, 1), cfg, judge)
    assert (d.reward, d.judgement["failures"]) == (0.0, [])


@pytest.mark.parametrize(
    "words, turns, stop",
    [
        (["AGREED.", "I AGREED", "no"], 2, "agreed"),
        (["yes", "I AGREE", "So AGREED", "x"], 3, "agreed"),
        (["AGREED", "no", "AGREED", "no"], 4, "max_turns"),
        (["DISAGREED", "AGREED", "agreed", "AGREED"], 4, "max_turns"),
    ],
)
def test_the_marker_must_stand_in_both_last_turns(words, turns, stop):
    voice, d = helpers.voice(), helpers.dialogues(1, 1)[0]
    match = selfplay.Match(d, (voice, voice), settings(agreement="marker"), None, 0)
    script = selfplay.negotiate(match)
    say = next(script)
    assert "the word AGREED" in voice.chat.tokenizer.decode(say.ids)
    for word in words:
        if say.final:
            break
        ids = voice.chat.plain(word) + [voice.chat.end]
        say = script.send(Turn(say.speaker, word, False, ids, [0.0] * len(ids)))
    assert say.final and (len(d.turns), d.stop) == (turns, stop)


def test_without_turns_agent_0_answers_alone():
    speaker = talker()
    for on_impasse in ("zero", "complete"):
        (d,) = play(
            speaker,
            helpers.dialogues(1, 1),
            settings(max_turns=0, on_impasse=on_impasse, agreement="judge"),
            Script(sometimes),
        )
        assert (d.streams, d.turns, d.reward) == ([[], []], [], None)
        assert "is not here to talk" in speaker.chat.tokenizer.decode(d.final_sample.ids)
        check_logprobs(speaker.model, d, settings())


# ---- sampling -----------------------------------------------------------------------------------


def first_tokens(speaker, cfg, count):
    """The first token of each of `count` dialogues on one scenario."""
    return [d.turns[0].ids[0] for d in play(speaker, helpers.dialogues(1, count), cfg)]


def test_the_models_own_generation_defaults_do_not_count():
    cfg = settings(max_turns=1, turn_tokens=2, on_impasse="zero", temperature=1.3)
    greedy, speaker = talker(), talker()
    greedy.model.generation_config = GenerationConfig(
        do_sample=True, top_k=1, temperature=0.01, top_p=0.1, repetition_penalty=9.0, eos_token_id=2
    )
    ids = first_tokens(greedy, cfg, 400)
    assert ids == first_tokens(speaker, cfg, 400)
    scenario = helpers.dialogues(1, 1)[0].scenario
    before = selfplay.view_of(speaker.chat, 0, scenario, False).sample_to_speak([]).ids
    p = (speaker.model(torch.tensor([before])).logits[0, -1] / 1.3).softmax(0).detach()
    statistic, bound = chi_square(torch.bincount(torch.tensor(ids), minlength=len(p)), p)
    assert statistic < bound


@pytest.mark.parametrize("context_turns", [0, 2])
def test_top_p_is_the_same_nucleus_for_sampler_and_learner(context_turns):
    speaker, cfg = talker(), settings(top_p=0.7, final_top_p=0.5, context_turns=context_turns)
    played = play(speaker, helpers.dialogues(1, 4), cfg)
    for d in played:
        check_logprobs(speaker.model, d, cfg)
    for train_tokens, temperature, top_p in (("dialogue", 0.6, 0.7), ("final", 0.7, 0.5)):
        for tree, rows in packing.pack(played, train_tokens, 10**6):
            wanted, cuts = [r.wanted for r in rows], [r.cuts for r in rows]
            learned = lm.token_logprobs(speaker.model, tree, wanted, temperature, cuts)
            for row, own, continuation in zip(rows, learned, tree.continuations):
                ids = tree.prefix + continuation
                logits = speaker.model(torch.tensor([ids])).logits[0].detach() / temperature
                for at, sampled, value in zip(row.wanted, row.sampler_logp, own.tolist()):
                    p = logits[len(tree.prefix) + at - 1].softmax(0)
                    token, inside = ids[len(tree.prefix) + at], nucleus_of(p, top_p)
                    expected = math.log(p[token] / p[inside].sum())
                    assert token in inside
                    assert expected == pytest.approx(sampled, abs=1e-4)
                    assert expected == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize("top_p, final_top_p", [(1.0, 0.5), (0.7, 1.0), (0.7, 0.5)])
def test_in_one_row_dialogue_and_final_keep_each_its_own_nucleus(top_p, final_top_p):
    speaker, cfg = talker(), settings(top_p=top_p, final_top_p=final_top_p, final_temperature=0.6)
    played = play(speaker, helpers.dialogues(1, 3), cfg)
    for tree, rows in packing.pack(played, "both", 10**6):
        wanted = [row.wanted for row in rows]
        cuts = [row.cuts or [-math.inf] * len(row.wanted) for row in rows]
        learned = lm.token_logprobs(speaker.model, tree, wanted, 0.6, cuts)
        for row, own in zip(rows, learned):
            assert own.tolist() == pytest.approx(row.sampler_logp, abs=1e-4)


@pytest.mark.parametrize("kind", helpers.KINDS)
def test_the_learners_ratio_is_one(kind):
    speaker, cfg = talker(kind), settings(max_turns=3)
    played = play(speaker, helpers.dialogues(1, 4), cfg)
    model = speaker.model.train()
    for tree, rows in packing.pack(played, "dialogue", 10**6):
        wanted = [row.wanted for row in rows]
        for row, own in zip(rows, lm.token_logprobs(model, tree, wanted, cfg.temperature)):
            ratio = (own - torch.tensor(row.sampler_logp)).exp()
            assert (ratio - 1).abs().max() < 1e-4


# ---- chat formats -------------------------------------------------------------------------------


def test_several_ends_and_pad_equal_to_eos():
    # 7: an ordinary token that the model's maker calls an end
    speaker = talker(ends=(2, 0, 7), stop=0.05, pad_is_eos=True)
    chat = speaker.chat
    assert chat.ends == {0, 2, 7} and chat.end == chat.tokenizer.pad_token_id == 2
    cfg, seen = settings(turn_tokens=6), set()
    for d in play(speaker, helpers.dialogues(2, 4), cfg):
        check_masks(d)
        check_logprobs(speaker.model, d, cfg)
        for turn in d.turns:
            ends = [token for token in turn.ids if token in chat.ends]
            if turn.truncated:
                assert ends == [] and len(turn.ids) == 6
            else:
                assert ends == turn.ids[-1:]
            seen.add(ends[0] if ends else None)
        # each end that was sampled is trained, an end that closes a cut turn is not
        for me, stream in enumerate(d.streams):
            own = [turn for turn in d.turns if turn.speaker == me]
            trained = [token for token in masked_ids(stream) if token in chat.ends]
            assert trained == [turn.ids[-1] for turn in own if not turn.truncated]
        assert d.final_truncated == (d.record()["final_ids"][-1] not in chat.ends)
    assert seen == {0, 2, 7, None}


def test_a_partner_can_take_a_side():
    speaker, heard = talker(), []
    d = selfplay.Dialogue(helpers.scenario(), 1, 0, 0)

    def partner(dialogue):
        heard.append(len(dialogue.turns))
        return "No. <|im_end|>"

    play(speaker, [d], settings(), partner=partner)
    assert [turn.text for turn in d.turns[1::2]] == ["No. <|im_end|>"] * 2
    assert heard == [1, 3] and d.streams[1] == [] and d.final is not None
    check_masks(dataclasses.replace(d, turns=d.turns[::2]))
    check_logprobs(speaker.model, d, settings())


@pytest.mark.parametrize("moment", ["asked", "last"])
def test_a_partner_is_not_asked_once_the_judge_has_found_agreement(moment):
    d, heard = selfplay.Dialogue(helpers.scenario(), 1, 0, 0), []

    def partner(dialogue):
        heard.append(len(dialogue.turns))
        return "No."

    judge = Script(lambda _, turns: len(turns) == 3, moment)
    play(talker(), [d], settings(agreement="judge"), judge, partner=partner)
    assert heard == [1] and (d.stop, len(d.turns)) == ("agreed", 3)


# ---- ends ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("context_turns", [0, 2])
@pytest.mark.parametrize("room", [520, 700])
def test_a_full_context_ends_the_dialogue_and_cuts_no_persona(monkeypatch, room, context_turns):
    feed, speaker, longest = RaggedCache.feed, talker(stop=0.0), []

    def watched(cache, model, rows, tokens):
        logits = feed(cache, model, rows, tokens)
        longest.append(max(cache.lengths))
        return logits

    monkeypatch.setattr(RaggedCache, "feed", watched)
    monkeypatch.setattr(speaker.model.config, "max_position_embeddings", room)
    cfg = settings(max_turns=30, context_turns=context_turns, turn_tokens=24)
    for d in play(speaker, helpers.dialogues(2, 2), cfg):
        assert d.stop == "context" and 0 < len(d.turns) < 30
        assert not d.agreed and d.final is not None
        assert all(len(sample.ids) <= room for sample in samples(d))
        for me, stream in enumerate([[*d.streams[0], d.final_sample], d.streams[1]]):
            prompt = selfplay.view_of(speaker.chat, me, d.scenario, False).prompt
            assert all(sample.ids[: len(prompt)] == prompt for sample in stream)
        check_logprobs(speaker.model, d, cfg)
    assert max(longest) < room


def test_a_context_too_small_for_anything_gives_no_reward(monkeypatch):
    speaker = talker()
    monkeypatch.setattr(speaker.model.config, "max_position_embeddings", 200)
    for on_impasse in ("complete", "zero"):
        (d,) = play(speaker, helpers.dialogues(1, 1), settings(on_impasse=on_impasse))
        assert (d.stop, d.turns, d.final, d.reward, d.pending_verdict) == (
            "context",
            [],
            None,
            None,
            None,
        ) and d.judgement["failures"] == ["context full"]


def test_what_a_person_sees():
    turns = [Turn(0, "Hi\x1b[2J\nyou\u202e", True)]
    d = selfplay.Dialogue(helpers.scenario(), 1, 0, 0, turns=turns, stop="context")
    assert progress.transcript(d).splitlines() == [
        "dilemma: One reservoir is left. Who gets the water?",
        "Rosa: Hi [2J you [cut off]",
        "joint solution (context, no score): (none)",
    ]


def test_the_flags_describe_a_scenario(tmp_path):
    personas = [{"name": "Ann", "creed": "You farm."}, {"name": "Bo", "creed": "You heal."}]
    line = {"id": "x", "tier": "own", "dilemma": "Whose?", "personas": personas}
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps(line) + "\n")
    for human, names in (("", ["Ann", "Bo"]), ("a", ["Bo", "Ann"]), ("b", ["Ann", "Bo"])):
        flags = selfplay.WatchSettings(scenarios=str(file), human=human)
        scenario = selfplay.watched_scenario(flags)
        assert scenario.dilemma == "Whose?" and [p["name"] for p in scenario.personas] == names
    shipped = selfplay.watched_scenario(selfplay.WatchSettings(dilemma="D?", seed=1))
    assert (
        shipped.dilemma == "D?" and shipped.personas == dataset.load_scenarios(seed=1)[1].personas
    )


def test_a_person_watches_turn_by_turn(capsys):
    screen = selfplay.Screen(helpers.scenario())
    assert capsys.readouterr().out.count("\n") == 3  # the dilemma, and two creeds
    play(talker(), helpers.dialogues(1, 1), settings(max_turns=2), on_token=screen.on_token)
    lines = capsys.readouterr().out.splitlines()
    names = [persona["name"] for persona in helpers.PERSONAS]
    assert [line.partition(": ")[0] for line in lines] == [*names, "joint solution"]


def test_a_keyboard_that_is_closed_or_types_no_text_ends_nothing(monkeypatch):
    screen = selfplay.Screen(helpers.scenario())
    monkeypatch.setattr(sys, "stdin", None)
    assert screen.ask_human(None) == "AGREED"
    bytes_read = io.TextIOWrapper(io.BytesIO(b"N\xff.\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", bytes_read)
    said = []
    with pytest.raises(SystemExit):
        cli.run_cli(lambda: said.append(screen.ask_human(None)))
    assert said == ["N\ufffd."]


def test_a_character_that_stdout_cannot_print_ends_nothing():
    code = "import cli; cli.run_cli(lambda: print('\u2581 and \u4e2d'))"
    how = {"cwd": Path(cli.__file__).parent, "env": {**os.environ, "PYTHONIOENCODING": "ascii"}}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **how)
    assert (done.returncode, done.stdout, done.stderr) == (0, "? and ?\n", "")
