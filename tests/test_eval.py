"""Evaluation end to end: tiny models in folders, a judge whose rule everybody can read, and a kill in the middle."""

import dataclasses
import json
import shutil
import types

import numpy as np
import pytest
from helpers import plain_logprobs, scenario, tiny, tokenizer, voice
from servers import JudgeServer
from test_report import record

import data_gen
import eval as evaluation
import report
import reward
import selfplay
from cli import UserError
from report import figure

SHORT = "--max-turns 3 --turn-tokens 6 --final-tokens 8 --answer-tokens 6 --dtype fp32 --batch 4"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two tiny models as Hugging Face folders, A and B."""
    folders = []
    for seed in (0, 1):
        folders.append(str(tmp_path_factory.mktemp("models") / f"tiny-{seed}"))
        model = tiny(seed=seed)
        model.config.max_position_embeddings = (
            4096  # room for the longest scenario in tokens of the tiny tokenizer
        )
        model.save_pretrained(folders[-1])
        tokenizer().save_pretrained(folders[-1])
    return folders


@pytest.fixture
def run(tmp_path, models):
    """A function that runs a command with A and B against a scripted judge; returns what it wrote, and the rows by (figure, of)."""

    def call(command, server, *flags, baseline=True):
        out = tmp_path / f"{command}.json"
        sides = ["--model", models[0]] + ["--baseline", models[1]] * baseline
        judged = ["--judge-url", server.url, "--judge-mode", "json", "--judge-cache", "off"]
        assert (
            evaluation.main([command, *sides, *judged, "--out", str(out), *SHORT.split(), *flags])
            == 0
        )
        found = json.loads(out.read_text())
        return found, {(row["figure"], row["of"]): row for row in found["rows"]}

    return call


def questions(server):
    """What was asked: the last message of each request."""
    return [body["messages"][-1]["content"] for _, body, _, _ in server.requests]


# ---- conflict ---------------------------------------------------------------------------------------------------------------


def test_conflict_counts_and_pairs(run):
    by_length = lambda text: min(5, len(text) / 10)  # transparent: longer is better
    with JudgeServer(by_length, agree=lambda text: True, offers=("json",)) as server:
        found, rows = run("conflict", server, "--limit", "4", "--seeds", "2")
        asked = questions(server)
    assert found["settings"]["A"]["max_turns"] == 3 and found["judge"] == "scripted, read by json"
    assert (
        rows["ca_score", "A"]["n"] == rows["ca_score", "A - B"]["n"] == 8
        and rows["ca_score", "B"]["scenarios"] == 4
    )
    assert rows["ca_score", "A - B"]["value"] == pytest.approx(
        rows["ca_score", "A"]["value"] - rows["ca_score", "B"]["value"], abs=1e-5
    )
    assert (
        rows["agreed", "A"]["value"] == 1.0
        and rows["turns_to_agreement", "B"]["value"] == 2.0
        and rows["agreed_at_once", "A"]["value"] == 1.0
    )
    assert sum('"winner"' in q for q in asked) == 2 * 2 * 8  # two questions, both orders
    for name in ("win_rate_ca", "win_rate_conflict"):
        row = rows[name, "A against B"]
        assert (
            row["pairs"]
            == 8
            == row["wins"] + row["losses"] + row["ties"] + row["inconsistent"] + row["missing"]
        )
        assert row["inconsistent"] == row["missing"] == 0
    # each persona was asked on its own about each final: no other creed stands in the question
    endorsing = [q for q in asked if "How satisfied" in q]  # an empty final needs no question
    creeds = [
        p["creed"][:30]
        for s in data_gen.spread(data_gen.load_scenarios(data_gen.DATA / "eval_conflict.jsonl"), 4)
        for p in s.personas
    ]
    assert 8 <= len(endorsing) <= 2 * 16 and all(
        sum(creed in q for creed in creeds) == 1 for q in endorsing
    )


def test_a_judge_that_always_says_a_wins_nothing(run):
    class Biased(JudgeServer):
        def share(self, kind, prompt):
            return 0.9 if kind == "compare" else super().share(kind, prompt)

    with Biased(offers=("json",)) as server:
        _, rows = run("conflict", server, "--limit", "3")
    for name in ("win_rate_ca", "win_rate_conflict"):
        row = rows[name, "A against B"]
        assert (
            row["value"],
            row["n"],
            row["wins"],
            row["losses"],
            row["ties"],
            row["inconsistent"],
            row["missing"],
        ) == (None, 0, 0, 0, 0, 3, 0)


def test_both_see_the_same_scenarios_and_a_model_ties_with_itself(run, models):
    with JudgeServer(lambda text: len(text) % 6, offers=("json",)) as server:
        found, rows = run(
            "conflict", server, "--limit", "3", "--baseline", models[0], baseline=False
        )
    assert found["settings"]["A"]["model"] == found["settings"]["B"]["model"]
    assert (
        rows["ca_score", "A - B"]["value"] == 0.0 == rows["distinct_2", "A - B"]["high"]
        and rows["win_rate_ca", "A against B"]["ties"] == 3
    )
    items = list(
        report.whole_lines(str(found["settings"]["A"]["out"]).replace(".json", ".items.jsonl"))
    )
    assert (
        len([i for i in items if i["key"][1] == "conflict"]) == 3
    )  # the same identity: played once


def test_missing_verdicts_are_counted_not_zero(run, tmp_path):
    class Silent(JudgeServer):
        scored = 0

        def _chat(self, body):
            answer, prompt = super()._chat(body), body["messages"][-1]["content"]
            if "How well" in prompt and "Ana wants" not in prompt:
                with self.lock:
                    self.scored += 1
                    if self.scored in (1, 3):
                        answer["choices"][0]["message"]["content"] = "I would rather not say."
            return answer

    with Silent(offers=("json",)) as server:
        _, rows = run("conflict", server, "--limit", "6", baseline=False)
    row = rows["ca_score", "A"]
    scores = [
        item["value"]["reward"] for item in report.whole_lines(tmp_path / "conflict.items.jsonl")
    ]
    assert row["n"] + row["missing"] == 6 and row["missing"] == scores.count(None) == 2
    assert row["value"] == pytest.approx(
        sum(s for s in scores if s is not None) / row["n"], abs=1e-5
    )


# ---- killed and started again -----------------------------------------------------------------------------------------------


def test_goes_on_where_it_was(run, tmp_path):
    file, scored = (
        tmp_path / "conflict.items.jsonl",
        lambda: sum("How well" in q and "Ana wants" not in q for q in questions(server)),
    )
    with JudgeServer(lambda text: 1 + len(text) % 5, offers=("json",)) as server:
        whole, _ = run("conflict", server, "--limit", "6")
        lines = [line for line in file.read_bytes().split(b"\n") if line]
        file.write_bytes(
            b"\n".join(lines[:5]) + b"\n" + lines[5][:40]
        )  # as if killed in the middle of a write
        server.requests.clear()
        again, _ = run("conflict", server, "--limit", "6")
        assert again["rows"] == whole["rows"] and 0 < scored() <= 7  # of 12 dialogues 5 were there
        server.requests.clear()
        third, _ = run("conflict", server, "--limit", "6")
        assert third["rows"] == whole["rows"] and all(
            "Ana wants" in q for q in questions(server)
        )  # nobody was asked but in the preflight
        run("conflict", server, "--limit", "7")
        assert 0 < scored() <= 2  # only what is new is played


def test_a_dead_judge_stops_the_run_and_records_nothing(run, tmp_path):
    with JudgeServer(
        offers=("json",), faults=lambda number, path: "400" if number > 0 else None
    ) as server:
        with pytest.raises(
            UserError,
            match=r"[34] of 4 questions have no answer .http 400.; look after the judge, then start again",
        ):
            run("conflict", server, "--limit", "5", "--agreement", "none")
    assert (tmp_path / "conflict.items.jsonl").read_bytes() == b"" and not (
        tmp_path / "conflict.json"
    ).exists()


def test_a_spent_budget_is_one_line(run):
    with (
        JudgeServer(offers=("json",)) as server,
        pytest.raises(
            UserError, match="--judge-budget 9: all calls are used; start again with more"
        ),
    ):
        run("conflict", server, "--limit", "5", "--judge-budget", "9")


def test_items_depend_on_settings_and_weights(models, tmp_path):
    name = lambda *flags: evaluation.identity(evaluation.read_settings("conflict", flags)[0]["A"])
    base = name("--model", models[0])
    assert base == name(
        "--model",
        models[0],
        "--limit",
        "3",
        "--seeds",
        "4",
        "--out",
        "x.json",
        "--baseline",
        models[1],
        "--judge-timeout",
        "5",
    )
    others = [
        name("--model", models[1]),
        name("--model", models[0], "--greedy"),
        name("--model", models[0], "--max-turns", "5"),
        name("--model", models[0], "--judge-url", "http://127.0.0.1:9/v1"),
    ]
    assert len({base, *others}) == 5
    copy = tmp_path / "copy"
    shutil.copytree(models[0], copy)
    before = name("--model", str(copy))
    tiny(seed=5).save_pretrained(copy)
    assert before != name("--model", str(copy))


# ---- settings ---------------------------------------------------------------------------------------------------------------


def test_a_run_plays_as_it_was_trained(tmp_path, models):
    step = tmp_path / "single-0" / "checkpoints" / "step_000004"
    shutil.copytree(models[0], step)
    (step / "COMPLETE").write_text("")
    shutil.copytree(
        models[0], tmp_path / "single-0" / "checkpoints" / "step_000009"
    )  # not complete
    trained = {
        "max_turns": 0,
        "agreement": "none",
        "temperature": 0.8,
        "on_impasse": "zero",
        "model": "x",
        "seed": 7,
        "judge_url": "http://judge:8000/v1",
        "judge_model": "strong",
        "judge_mode": "expect",
        "judge_attempts": 9,
    }
    (tmp_path / "single-0" / "config.json").write_text(json.dumps(trained))
    sides, out = evaluation.read_settings(
        "conflict", ["--model", str(tmp_path / "single-0"), "--baseline", models[1]]
    )
    a, b = sides["A"], sides["B"]
    assert (a.model, a.max_turns, a.agreement, a.temperature, a.on_impasse, a.seed) == (
        str(step),
        0,
        "none",
        0.8,
        "complete",
        0,
    )
    for side in (a, b):  # by the judge that trained A, read as it was then
        assert (side.judge_url, side.judge_model, side.judge_mode, side.judge_attempts) == (
            "http://judge:8000/v1",
            "strong",
            "expect",
            4,
        )
    other = evaluation.read_settings(
        "conflict", ["--model", str(tmp_path / "single-0"), "--judge-url", "http://other:1/v1"]
    )[0]["A"]
    assert (other.judge_url, other.judge_model, other.judge_mode) == (
        "http://other:1/v1",
        "",
        "auto",
    )
    assert (b.model, b.max_turns, b.agreement) == (
        models[1],
        selfplay.PlaySettings.max_turns,
        "judge",
    )
    assert out == tmp_path / "single-0" / "eval" / "conflict-single-0-step_000004-tiny-1.json"
    flags = ["--max-turns", "2", "--greedy", "--baseline-temperature", "0.5"]
    sides, out = evaluation.read_settings(
        "open", ["--model", models[1], "--baseline", str(step), *flags]
    )
    assert (sides["B"].max_turns, sides["B"].temperature, sides["B"].final_temperature) == (
        2,
        0.5,
        0.5,
    ) and sides["A"].temperature == 0
    assert str(out) == "runs/eval/open-tiny-1-single-0-step_000004-T0.5-greedy-max_turns_2.json"
    name = lambda *flags: evaluation.read_settings("open", ["--model", models[1], *flags])[1].name
    assert (
        name("--limit", "3", "--judge-attempts", "9") == name() == "open-tiny-1.json"
    )  # what changes no item changes no name
    assert (
        len(
            {
                name("--judge-url", f"http://{host}:8000/v1", "--judge-model", "m" * 90)
                for host in "ab"
            }
            | {name()}
        )
        == 3
    )


def test_a_model_without_a_run_plays_as_the_other_side_was_trained(tmp_path, models):
    for name, play in (
        (
            "paper-0",
            {
                "max_turns": 7,
                "turn_tokens": 256,
                "temperature": 0.7,
                "top_p": 0.95,
                "context_turns": 2,
                "on_impasse": "zero",
            },
        ),
        ("single-0", {"max_turns": 0, "agreement": "none", "final_tokens": 99}),
    ):
        shutil.copytree(models[0], tmp_path / name / "checkpoints" / "step_000004")
        (tmp_path / name / "checkpoints" / "step_000004" / "COMPLETE").write_text("")
        (tmp_path / name / "config.json").write_text(json.dumps(play))
    sides = lambda *flags: evaluation.read_settings("conflict", list(flags))[0]
    for run, plain in (
        sides("--model", str(tmp_path / "paper-0"), "--baseline", models[1]).values(),
        reversed(sides("--model", models[1], "--baseline", str(tmp_path / "paper-0")).values()),
    ):
        assert dataclasses.replace(run, model="") == dataclasses.replace(plain, model="")
        assert (plain.max_turns, plain.turn_tokens, plain.top_p, plain.on_impasse) == (
            7,
            256,
            0.95,
            "complete",
        )
    found = sides(
        "--model", str(tmp_path / "single-0"), "--baseline", str(tmp_path / "paper-0")
    )  # two runs: each as it was trained
    assert (found["A"].max_turns, found["B"].max_turns, found["B"].final_tokens) == (
        0,
        7,
        selfplay.PlaySettings.final_tokens,
    )
    found = sides(
        "--model", str(tmp_path / "single-0"), "--baseline", models[1]
    )  # beside a single answer it negotiates
    assert (found["B"].max_turns, found["B"].agreement, found["B"].final_tokens) == (
        selfplay.PlaySettings.max_turns,
        "judge",
        99,
    )


def test_a_copy_of_a_checkpoint_is_not_taken_for_one(tmp_path):
    for name in ("step_000002", "step_000010", "step_000010_backup", "step_1000000", "best"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "COMPLETE").write_text("")
    (tmp_path / "checkpoints" / "step_000003").symlink_to("best")  # moved elsewhere, and still one
    (tmp_path / "checkpoints" / "latest").symlink_to("step_000002")
    assert [p.name for p in report.checkpoints_of(tmp_path)] == [
        "step_000002",
        "step_000003",
        "step_000010",
        "step_1000000",
    ]
    assert report.locate(str(tmp_path))[0].endswith("step_1000000")


def test_mistakes_are_told_in_one_line(tmp_path, models):
    for argv, says in (
        (["conflicts"], "conflict|open|general|cross|audit|report"),
        ([], "say what"),
        (["report"], "name the folder of a run"),
        (["report", str(tmp_path)], "no metrics.jsonl"),
        (["conflict", "--seeds", "0"], "--seeds 0: must be at least 1"),
    ):
        with pytest.raises(UserError, match=says.replace("|", r"\|")):
            evaluation.main(argv)
    with pytest.raises(UserError, match="--out .*/x.json: cannot be written"):
        evaluation.main(
            ["conflict", "--out", str(tmp_path / "file" / "x.json")]
            if (tmp_path / "file").write_text("") == 0
            else []
        )
    for path in (tmp_path, tmp_path / "file" / "x.html"):
        with pytest.raises(UserError, match="--out .*: cannot be written"):
            report.write(path, "page")
    with pytest.raises(UserError, match="--out .*: cannot be written .it is a folder"):
        evaluation.main(["general", "--out", str(tmp_path)])
    for model, baseline in (
        ("no such model", ""),
        (models[0], "no such model"),
    ):  # and no judge is started, no file is made
        with pytest.raises(
            UserError, match="--model no such model: not negotiator-135m, smollm2-135m, a folder"
        ):
            evaluation.main(
                [
                    "conflict",
                    "--model",
                    model,
                    "--baseline",
                    baseline,
                    "--judge-url",
                    "http://127.0.0.1:9/v1",
                    "--out",
                    str(tmp_path / "x.json"),
                ]
            )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]
    with pytest.raises(UserError, match=r'bad.jsonl:1: no kind "instruction"; use choice or exact'):
        (tmp_path / "bad.jsonl").write_text(
            '{"id": "a", "kind": "instruction", "prompt": "Say."}\n'
        )
        evaluation.main(
            ["general", "--data", str(tmp_path / "bad.jsonl"), "--out", str(tmp_path / "g.json")]
        )
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no complete checkpoint"):
        evaluation.read_settings("conflict", ["--model", str(tmp_path)])


# ---- the other commands -----------------------------------------------------------------------------------------------------


def test_open(run):
    with JudgeServer(lambda text: len(text) % 6, offers=("json",)) as server:
        _, rows = run("open", server, "--limit", "5")
        asked = questions(server)
    assert rows["ca_score", "A"]["n"] == 5 and rows["win_rate_ca", "A against B"]["pairs"] == 5
    assert ("agreed", "A") not in rows and ("win_rate_conflict", "A against B") not in rows
    question = data_gen.load_jsonl(data_gen.DATA / "eval_open.jsonl")[0]["question"]
    assert sum(f"Dilemma: {question}" in q for q in asked) == 2 + 2


def test_greedy_answers_are_the_models_own():
    """The batch decodes as transformers' generate does, one prompt at a time."""
    speaker, prompts = (
        voice(),
        [
            "Who gets the water?",
            "Say a longer thing about the council and the farm, please.",
            "No.",
        ],
    )
    turns = evaluation.answers(
        speaker,
        prompts,
        12,
        0.0,
        1.0,
        [evaluation.rng_of(evaluation.Settings(), p) for p in prompts],
    )
    for prompt, turn in zip(prompts, turns):
        messages = [
            {"role": "system", "content": evaluation.HELPER},
            {"role": "user", "content": prompt},
        ]
        ids = tokenizer().apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        speaker.model.set_attn_implementation("eager")
        expected = speaker.model.generate(
            ids, attention_mask=ids > -1, max_new_tokens=12, do_sample=False
        )[0, ids.shape[1] :].tolist()
        speaker.model.set_attn_implementation("negotiate")
        assert turn.ids == expected


def test_general_needs_no_judge(run, models):
    class Nobody:
        url = "http://127.0.0.1:9/v1"

    _, rows = run("general", Nobody, baseline=False)
    assert (rows["choice", "A"]["n"], rows["exact", "A"]["n"]) == (35, 25)
    assert rows["exact", "A"]["value"] < 0.5  # a random model's babble
    text = (data_gen.DATA / "public_domain.txt").read_text(encoding="utf-8")
    assert rows["token_loss", "A"]["n"] == len(text.split()) // 192
    assert 4 < rows["token_loss", "A"]["value"] < 12  # near log(400) = 6, or worse


def test_choices_by_mean_logprob_per_token():
    """The choice that the model finds likelier per token is chosen, whatever its length."""
    speaker = voice()
    row = {
        "id": "q",
        "kind": "choice",
        "prompt": "Who?",
        "choices": ["the farm", "the council of the hospital", "No"],
        "answer": 0,
    }
    side = types.SimpleNamespace(voice=speaker, settings=evaluation.Settings())
    (value,) = evaluation.general_items(side, [(row, 0)])
    prefix = (
        speaker.chat.head(evaluation.HELPER) + speaker.chat.plain("Who?") + speaker.chat.opening
    )
    for choice, got in zip(row["choices"], value["logprobs"]):
        ids = speaker.chat.plain(choice)
        assert got == pytest.approx(
            plain_logprobs(speaker.model, prefix + ids)[-len(ids) :].mean().item(), abs=1e-4
        )
    assert value["value"] == (max(value["logprobs"]) == value["logprobs"][0])


def test_cross_swaps_partners(run, tmp_path):
    with JudgeServer(lambda text: len(text) % 6, offers=("json",)) as server:
        _, rows = run("cross", server, "--limit", "2")
    columns = [
        "A with A",
        "A with B",
        "B with A",
        "B with B",
        "A with stubborn",
        "A with hostile",
        "A with grasping",
    ]
    assert [of for name, of in rows if name == "agreed" and " - " not in of] == columns
    assert all(rows["ca_score", of]["n"] == 2 for of in columns)
    gap = rows["ca_score", "A with hostile"]["value"] - rows["ca_score", "A with A"]["value"]
    assert rows["ca_score", "A with hostile - A with A"]["value"] == pytest.approx(gap, abs=1e-5)
    for item in report.whole_lines(tmp_path / "cross.items.jsonl"):
        script, turns = (
            item["key"][3],
            [turn["text"] for turn in item["value"]["turns"] if turn["speaker"] == 1],
        )
        assert (
            turns == evaluation.PARTNERS[script][:1]
            if script
            else turns[0] not in sum(evaluation.PARTNERS.values(), [])
        )


def labels(n=40):
    """Labelled solutions on ten dilemmas, four each: the longer, the better."""
    return [
        {
            "id": f"l{i}",
            "scenario_id": f"dilemma {i // 4}",
            "personas": [{"name": "Ana", "creed": "You."}, {"name": "Ben", "creed": "Your."}],
            "solution": "They share the well number %d. " % i + "Then they talk. " * (i % 4),
            "score": float(i % 4),
            "split": "test",
        }
        for i in range(n)
    ]


def test_audit(run, tmp_path):
    """A judge who knows the labels: all is perfect. One who sees the opposite: nothing is."""
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels()))
    by_label, by_contrary = lambda text: text.count("talk"), lambda text: 4 - text.count("talk")
    with (
        JudgeServer(by_label, offers=("json",)) as server,
        JudgeServer(by_contrary, offers=("json",)) as second,
    ):
        _, rows = run(
            "audit",
            server,
            "--judge2-url",
            second.url,
            "--data",
            str(tmp_path / "own.jsonl"),
            "--batch",
            "60",
            baseline=False,
        )
    assert (
        rows["exact", "judge, judge again"]["value"] == 1.0
        and rows["spearman", "judge, judge again"]["n"] == 40
    )
    assert rows["spearman", "judge, second judge"]["value"] == pytest.approx(-1)
    assert (
        rows["spearman", "judge"]["value"] == rows["pairs_right", "judge"]["value"] == 1.0
        and rows["pairs_right", "judge"]["n"] == 60
    )
    assert (
        rows["spearman", "second judge"]["value"] == pytest.approx(-1)
        and rows["pairs_right", "second judge"]["value"] == 0
    )
    assert (
        rows["pairs_right", "length alone"]["value"] > 0.95
        and rows["score_length_spearman", "judge"]["value"] > 0.9
    )


def test_audit_of_the_shipped_labels_takes_their_test_part(run):
    with JudgeServer(lambda text: 3, offers=("json",)) as server:
        _, rows = run("audit", server, "--limit", "30", baseline=False)
    shipped = data_gen.load_jsonl(data_gen.DATA / "judge_labels.jsonl")
    assert rows["exact", "judge, judge again"]["n"] == 30 and rows["pairs_right", "judge"][
        "value"
    ] in (0.5, None)
    test = [row["scenario_id"] for row in shipped if row["split"] == "test"]
    assert not set(test) & {row["scenario_id"] for row in shipped if row["split"] == "fit"}


def test_a_judge_that_is_another_one_is_asked_again(run):
    with JudgeServer(lambda text: 2, offers=("json",)) as server:
        run("conflict", server, "--limit", "2")
        server.requests.clear()
        server.rule, server.models = lambda text: 4, ("another",)
        found, rows = run("conflict", server, "--limit", "2")
    assert found["judge"] == "another, read by json" and rows["ca_score", "A"]["value"] == 4


# ---- numbers, worked by hand ---------------------------------------------------------------------


def test_measures_of_one_dialogue():
    said = ["one two three", "one two three", "four"]
    ours = record(turns=said, agreed=True, final="Rosa brings water", endorse=[1.0, 4.0])
    none = record("none", final=None, reward=None, endorse=[None, 4.0])
    column = evaluation.measured([ours, none])
    assert column["s", 0] == {
        "ca_score": 3.0,
        "endorse_min": 1.0,
        "endorse_mean": 2.5,
        "endorse_first": 1.0,
        "endorse_second": 4.0,
        "agreed": 1.0,
        "turns_to_agreement": 3,
        "truncated": 0.0,
        **report.text_measures(ours),
    }
    known = {key: value for key, value in column["none", 0].items() if value is not None}
    assert known == {"endorse_second": 4.0, "truncated": 0.0}


def test_an_exact_answer_is_whole_words_of_the_first_line():
    assert not evaluation.says_one("The answer is 15.", ["5", "five"])
    assert evaluation.says_one("**Five**", ["5", "five"])
    for row in data_gen.load_jsonl(data_gen.DATA / "eval_general.jsonl"):
        if row["kind"] == "exact":
            assert evaluation.says_one(f" It is {row['answers'][0]}.", row["answers"])
            assert not evaluation.says_one("I do not know.\n" + row["answers"][0], row["answers"])


def test_agreement_and_correlations():
    # Without ties it is 1 - 6 sum d^2 / n (n^2 - 1).
    ranked = evaluation.spearman(np.array([1, 2, 3, 4]), np.array([10, 20, 40, 30]))
    assert ranked == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert evaluation.spearman(np.array([1, 2, 3]), np.array([9, 4, 1])) == pytest.approx(-1)
    tied = evaluation.spearman(np.array([1, 2, 2, 3]), np.array([1, 2, 3, 4]))
    assert tied == pytest.approx(4.5 / np.sqrt(4.5 * 5))  # equal numbers share their mean rank
    assert evaluation.same_points(np.array([0.2, 4.9]), np.array([0, 4])) == 0.5
    constant = figure("x", "A", [(i, 1.0, float(i)) for i in range(5)], evaluation.spearman)
    assert (constant.value, constant.low) == (None, None)


def test_pairs_on_one_dilemma_whose_labels_differ():
    labels = {"a": ("s", 1.0), "b": ("s", 2.0), "c": ("s", 2.25), "d": ("t", 5.0), "e": ("s", 4.0)}
    rows = [
        {"id": name, "dilemma": dilemma, "score": score}
        for name, (dilemma, score) in labels.items()
    ]
    scores = {"a": 1.0, "b": 3.0, "c": 1.0, "d": 0.0, "e": None}
    # a-b is right, a-c a tie; b-c lie too near, d is alone, three pairs with e are missing.
    row = evaluation.against_labels("judge", scores, rows)[1]
    assert (row.value, row.n, row.missing) == (0.75, 2, 3)


def test_win_rate_bookkeeping():
    said = ("AB", "BA", ("tie", "tie"), "AA", "BB", ("A", "tie"), ("A", None), (None, None))
    ended = ["wins", "losses", "ties", *["inconsistent"] * 3, "missing", "missing"]
    assert [evaluation.outcome(*both) for both in said] == ended
    outcomes = [
        ("s1", "wins"),
        ("s1", "wins"),
        ("s2", "losses"),
        ("s2", "ties"),
        ("s3", "inconsistent"),
        ("s3", "missing"),
    ]
    row = evaluation.win_rate("w", outcomes)
    assert row.value == pytest.approx(2 / 3, abs=1e-6)
    assert (row.n, row.scenarios, row.pairs) == (3, 2, 6)
    assert (row.wins, row.losses, row.ties, row.inconsistent, row.missing) == (2, 1, 1, 1, 1)


def test_table_pairs_what_belongs_together():
    a = {("s1", 0): {"ca_score": 3.0, "overlap": None}, ("s2", 0): {"ca_score": None}}
    b = {("s1", 0): {"ca_score": 1.0, "overlap": None}, ("s2", 0): {"ca_score": 2.0}}
    a["s2", 0]["overlap"], b["s2", 0]["overlap"] = 0.5, 0.25
    rows = {(row.figure, row.of): row for row in evaluation.table({"A": a, "B": b})}
    assert list(rows) == [(n, of) for n in ("ca_score", "overlap") for of in ("A", "B", "A - B")]
    both = rows["ca_score", "A - B"]
    assert (both.value, both.n, both.missing) == (2.0, 1, 1)
    one = rows["overlap", "A"]
    assert (one.n, one.missing) == (1, 0)  # nothing was asked, so nothing is missing


# ---- what train.py calls ------------------------------------------------------------------------------------------------------


def test_heldout_is_the_same_every_time_and_on_any_number_of_ranks():
    speaker, scenarios = (
        voice(),
        [
            scenario("a"),
            scenario("b", "A well is dry. Who digs?"),
            scenario("c", "Who speaks first?"),
        ],
    )
    settings = evaluation.Settings(
        max_turns=2,
        turn_tokens=6,
        final_tokens=8,
        judge_mode="json",
        judge_cache="off",
        agreement="none",
    )
    with JudgeServer(lambda text: len(text) % 6, offers=("json",)) as server:
        with reward.open_judge(dataclasses.replace(settings, judge_url=server.url)) as judge:
            records, again = (
                evaluation.heldout(speaker, scenarios, settings, judge) for _ in range(2)
            )
            shares = [
                evaluation.heldout(speaker, scenarios, settings, judge, share=slice(rank, None, 2))
                for rank in (0, 1)
            ]
    metrics, said = (
        evaluation.heldout_row(records),
        lambda rs: sorted((r["scenario_id"], r["member"], r["final_ids"], r["reward"]) for r in rs),
    )
    assert (
        records == again
        and said(records) == said(shares[0] + shares[1])
        and list(map(len, shares)) == [3, 3]
    )
    assert (
        len(records) == 6
        and metrics["n"] == 6
        and metrics["missing"] == 0
        and metrics["scenarios"] == 3
    )
    assert metrics["reward"] == pytest.approx(sum(r["reward"] for r in records) / 6, abs=1e-5)
    assert metrics["reward_low"] <= metrics["reward"] <= metrics["reward_high"]
    assert {
        "distinct_2",
        "overlap",
        "grounding",
        "final_words",
        "agreed_at_once",
        "agreed_rate",
    } <= set(metrics)


def test_a_judge_who_is_away_costs_the_held_out_rewards_and_not_the_run():
    settings = evaluation.Settings(
        max_turns=2,
        turn_tokens=6,
        final_tokens=8,
        judge_mode="json",
        judge_cache="off",
        agreement="none",
        judge_attempts=1,
    )
    with JudgeServer(lambda text: 3, offers=("json",)) as server:
        with reward.open_judge(dataclasses.replace(settings, judge_url=server.url)) as judge:
            server.offers = ()
            records = evaluation.heldout(voice(), [scenario("a"), scenario("b")], settings, judge)
    assert [r["reward"] for r in records] == [None] * 4 and evaluation.heldout_row(records)[
        "missing"
    ] == 4
