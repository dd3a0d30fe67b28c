"""Evaluation end to end: tiny models, a judge whose rule everybody can read, and a kill."""

import dataclasses
import functools
import json
import math
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
from helpers import plain_logprobs, scenario, tiny, tokenizer, voice
from servers import JudgeServer
from test_measure import record

import audit
import checkpoint
import dataset
import eval as evaluation
import measure
import report
import reward
import selfplay
import sides
from cli import UserError
from measure import figure

SHORT = "--max-turns 3 --turn-tokens 6 --final-tokens 8 --answer-tokens 6 --dtype fp32 --batch 4"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two tiny models as Hugging Face folders, A and B."""
    folders = []
    for seed in (0, 1):
        folder = str(tmp_path_factory.mktemp("models") / f"tiny-{seed}")
        model = tiny(seed=seed)
        model.config.max_position_embeddings = 4096  # room for the longest scenario
        model.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        folders.append(folder)
    return folders


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """test_measure.py is about the intervals; here they took most of the time."""
    monkeypatch.setattr(measure, "bootstrap", functools.partial(measure.bootstrap, rounds=50))


@pytest.fixture
def run(tmp_path, models):
    """A function that evaluates A and B: what was written, and the rows by (figure, of)."""

    def call(command, server, *flags, baseline=True):
        out = tmp_path / f"{command}.json"
        pair = ["--model", models[0]] + ["--baseline", models[1]] * baseline
        judged = ["--judge-url", server.url, "--judge-mode", "json"]
        settings = [*judged, "--out", str(out), *SHORT.split()]
        assert evaluation.main([command, *pair, *settings, *flags]) == 0
        found = json.loads(out.read_text())
        return found, {(row["figure"], row["of"]): row for row in found["rows"]}

    return call


def questions(server):
    """What was asked: the last message of each request."""
    return [body["messages"][-1]["content"] for _, body, _, _ in server.requests]


def negotiated_items(path):
    """The negotiations among the finished items."""
    return [item for item in checkpoint.whole_lines(path) if item["key"][1] == "conflict"]


# ---- conflict ------------------------------------------------------------------------------------


def test_conflict_counts_and_pairs(run):
    def by_length(text):
        return min(5, len(text) / 10)

    with JudgeServer(by_length, agree=lambda text: True, offers=("json",)) as server:
        found, rows = run("conflict", server, "--limit", "4", "--seeds", "2")
        asked = questions(server)
    assert found["settings"]["A"]["max_turns"] == 3
    assert found["judge"] == "scripted, read by json"
    a, b, gap = (rows["ca_score", of] for of in ("A", "B", "A - B"))
    assert a["n"] == gap["n"] == 8
    assert b["scenarios"] == 4
    assert gap["value"] == pytest.approx(a["value"] - b["value"], abs=1e-5)
    assert rows["agreed", "A"]["value"] == rows["agreed_at_once", "A"]["value"] == 1.0
    assert rows["turns_to_agreement", "B"]["value"] == 2.0
    assert sum('"winner"' in q for q in asked) == 2 * 2 * 8  # two questions, both orders
    for name in ("win_rate_ca", "win_rate_conflict"):
        row = rows[name, "A against B"]
        assert row["pairs"] == row["wins"] + row["losses"] + row["ties"] == 8
        assert row["inconsistent"] == row["missing"] == 0


def test_each_persona_endorses_on_its_own(run):
    """No other creed stands in the question."""
    with JudgeServer(offers=("json",)) as server:
        run("conflict", server, "--limit", "4", baseline=False)
        endorsing = [q for q in questions(server) if "How satisfied" in q]
    creeds = []
    scenarios = dataset.load_scenarios(dataset.DATA / "eval_conflict.jsonl")
    for chosen in dataset.spread(scenarios, 4):
        creeds += [persona["creed"][:30] for persona in chosen.personas]
    assert 2 <= len(endorsing) <= 8  # an empty final needs no question
    for question in endorsing:
        assert sum(creed in question for creed in creeds) == 1


def test_a_judge_that_always_says_a_wins_nothing(run):
    class Biased(JudgeServer):
        def share(self, kind, prompt):
            return 0.9 if kind == "compare" else super().share(kind, prompt)

    with Biased(offers=("json",)) as server:
        _, rows = run("conflict", server, "--limit", "3")
    for name in ("win_rate_ca", "win_rate_conflict"):
        row = rows[name, "A against B"]
        assert (row["value"], row["n"], row["inconsistent"], row["missing"]) == (None, 0, 3, 0)
        assert row["wins"] == row["losses"] == row["ties"] == 0


def test_both_see_the_same_scenarios_and_a_model_ties_with_itself(run, models, tmp_path):
    with JudgeServer(lambda text: len(text) % 6, offers=("json",)) as server:
        flags = ("--limit", "3", "--baseline", models[0])
        found, rows = run("conflict", server, *flags, baseline=False)
    assert found["settings"]["A"]["model"] == found["settings"]["B"]["model"]
    assert rows["ca_score", "A - B"]["value"] == rows["distinct_2", "A - B"]["high"] == 0.0
    assert rows["win_rate_ca", "A against B"]["ties"] == 3
    keys = [item["key"] for item in checkpoint.whole_lines(tmp_path / "conflict.items.jsonl")]
    # The same identity: played once.
    assert sum(key[1] == "conflict" for key in keys) == 3


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
    items = checkpoint.whole_lines(tmp_path / "conflict.items.jsonl")
    scores = [item["value"]["reward"] for item in items]
    assert row["missing"] == scores.count(None) == 2
    assert row["n"] == 4
    known = [score for score in scores if score is not None]
    assert row["value"] == pytest.approx(sum(known) / 4, abs=1e-5)


def test_the_best_of_n_by_the_same_judge_stands_for_the_baseline(run, models, tmp_path):
    """A model beside its own best of three: its first dialogue is among them."""
    with JudgeServer(lambda text: len(text) % 6, offers=("json",)) as server:
        flags = ("--limit", "3", "--baseline", models[0], "--seeds", "2", "--best-of", "3")
        found, rows = run("conflict", server, *flags, baseline=False)
    assert [found["settings"][side]["best_of"] for side in "AB"] == [1, 3]
    scores = {}
    for item in negotiated_items(tmp_path / "conflict.items.jsonl"):
        record = item["value"]
        scores.setdefault((record["scenario_id"], record["member"] // 3), []).append(
            record["reward"]
        )
    assert [len(three) for three in scores.values()] == [3] * 6
    best = np.mean([max(three) for three in scores.values()])
    assert rows["ca_score", "B"]["value"] == pytest.approx(best, abs=1e-5)
    assert rows["ca_score", "A"]["n"] == rows["win_rate_ca", "A against B"]["pairs"] == 6


def test_a_missing_reward_is_never_the_best():
    records = [{"member": i, "reward": reward} for i, reward in enumerate((None, 0.0, 1.0, 3.0))]
    assert evaluation.best_of(2, records) == [
        {"member": 0, "reward": 0.0},
        {"member": 1, "reward": 3.0},
    ]
    assert evaluation.best_of(2, [{"member": 4, "reward": None}]) == [{"member": 2, "reward": None}]


# ---- killed and started again --------------------------------------------------------------------


def test_goes_on_where_it_was(run, tmp_path):
    def scored():
        """Scores that were asked for, the preflight's question aside."""
        return sum("How well" in q and "Ana wants" not in q for q in questions(server))

    file = tmp_path / "conflict.items.jsonl"
    with JudgeServer(lambda text: 1 + len(text) % 5, offers=("json",)) as server:
        whole, _ = run("conflict", server, "--limit", "6")
        lines = [line for line in file.read_bytes().split(b"\n") if line]
        # As if killed in the middle of a write.
        file.write_bytes(b"\n".join(lines[:5]) + b"\n" + lines[5][:40])
        server.requests.clear()
        again, _ = run("conflict", server, "--limit", "6")
        assert again["rows"] == whole["rows"]
        assert 0 < scored() <= 7  # of 12 dialogues 5 were there
        server.requests.clear()
        third, _ = run("conflict", server, "--limit", "6")
        assert third["rows"] == whole["rows"]
        assert all("Ana wants" in q for q in questions(server))  # only the preflight asked
        run("conflict", server, "--limit", "7")
        assert 0 < scored() <= 2  # only what is new is played


def test_a_dead_judge_stops_the_run_and_records_nothing(run, tmp_path):
    def dead(number, path):
        return "400" if number > 0 else None

    says = r"[34] of 4 questions have no answer .http 400.; look after the judge, then start again"
    with (
        JudgeServer(offers=("json",), faults=dead) as server,
        pytest.raises(UserError, match=says),
    ):
        run("conflict", server, "--limit", "5", "--agreement", "none")
    assert not list(tmp_path.glob("conflict*"))


def test_a_spent_budget_is_one_line(run):
    says = "--judge-budget 9: all calls are used"
    with JudgeServer(offers=("json",)) as server, pytest.raises(UserError, match=says):
        run("conflict", server, "--limit", "5", "--judge-budget", "9")


def test_items_depend_on_settings_and_weights(models, tmp_path):
    def identity(model, flags=""):
        argv = ["--model", str(model), *flags.split()]
        return sides.identity(sides.read_sides("conflict", argv)[0]["A"])

    base = identity(models[0])
    free = f"--limit 3 --seeds 4 --out x.json --baseline {models[1]} --judge-timeout 5"
    assert base == identity(models[0], free)
    others = [identity(models[1])]
    for flags in ("--temperature 0.3", "--max-turns 5", "--judge-url http://127.0.0.1:9/v1"):
        others.append(identity(models[0], flags))
    assert len({base, *others}) == 5
    copy = tmp_path / "copy"
    shutil.copytree(models[0], copy)
    before = identity(copy)
    tiny(seed=5).save_pretrained(copy)
    assert before != identity(copy)


# ---- settings ------------------------------------------------------------------------------------


def make_run(folder, model, config):
    """A run folder with one complete checkpoint, which is returned."""
    step = folder / "checkpoints" / "step_000004"
    shutil.copytree(model, step)
    (folder / "config.json").write_text(json.dumps({"recipe": "debug", **config}))
    return step


JUDGE = {
    "judge_url": "http://judge:8000/v1",
    "judge_model": "strong",
    "judge_mode": "expect",
    "judge_attempts": 9,
}
ALONE = {"max_turns": 0, "agreement": "none", "temperature": 0.8, "on_impasse": "zero"}


def test_a_run_plays_as_it_was_trained(tmp_path, models):
    single = tmp_path / "single-0"
    step = make_run(single, models[0], {"model": "x", "seed": 7, **ALONE, **JUDGE})
    shutil.copytree(models[0], single / "checkpoints" / ".partial-step_000009")
    argv = ["--model", str(single), "--baseline", models[1]]
    found, out = sides.read_sides("conflict", argv)
    assert out == single / "eval" / "conflict-single-0-step_000004-tiny-1.json"
    a, b = found["A"], found["B"]
    assert (a.model, a.max_turns, a.agreement, a.temperature) == (str(step), 0, "none", 0.8)
    assert (a.on_impasse, a.seed) == ("complete", 0)
    # Beside a single answer the other side negotiates.
    turns = selfplay.PlaySettings.max_turns
    assert (b.model, b.max_turns, b.agreement) == (models[1], turns, "judge")
    for side in (a, b):  # by the judge that trained A, read as it was then
        assert (side.judge_url, side.judge_model) == ("http://judge:8000/v1", "strong")
        assert (side.judge_mode, side.judge_attempts) == ("expect", 4)
    other = [*argv, "--judge-url", "http://other:1/v1"]
    a = sides.read_sides("conflict", other)[0]["A"]
    assert (a.judge_url, a.judge_model, a.judge_mode) == ("http://other:1/v1", "", "auto")


@pytest.mark.parametrize(
    "config, says",
    [
        ({"agreement": "foo"}, "--agreement foo: must be one of"),
        ({"max_turns": "ten"}, "config.json has --max-turns ten: must be"),
        ({"temperature": None}, "--temperature None: must be"),
        ({"recipe": 5}, "config.json"),
        ([1], "config.json is not that of a run"),
    ],
)
def test_a_run_whose_settings_are_wrong_is_not_compared(tmp_path, models, config, says):
    make_run(tmp_path / "run", models[0], {})
    text = json.dumps({"recipe": "debug", **config} if type(config) is dict else config)
    (tmp_path / "run" / "config.json").write_text(text)
    with pytest.raises(UserError, match=says):
        sides.read_sides("conflict", ["--model", str(tmp_path / "run")])


def test_flags_overrule_the_run_and_name_the_results(tmp_path, models):
    step = make_run(tmp_path / "single-0", models[0], ALONE)
    flags = "--max-turns 2 --baseline-temperature 0.5 --best-of 4"
    argv = ["--model", models[1], "--baseline", str(step), *flags.split()]
    found, out = sides.read_sides("open", argv)
    name = "open-tiny-1-single-0-step_000004-max_turns_2-baseline_temperature_0.5-best_of_4.json"
    assert str(out) == f"runs/eval/{name}"
    a, b = found["A"], found["B"]
    assert (b.max_turns, b.temperature, b.final_temperature, b.best_of) == (2, 0.5, 0.5, 4)
    assert (a.max_turns, a.temperature, a.best_of) == (2, 0.8, 1)  # as its baseline was trained

    def name(*flags):
        return sides.read_sides("open", ["--model", models[1], *flags])[1].name

    # What changes no item changes no name.
    assert name() == name("--limit", "3", "--judge-attempts", "9") == "open-tiny-1.json"
    long = ("--judge-model", "m" * 90, "--judge-url")
    assert len({name(), name(*long, "http://a:1/v1"), name(*long, "http://b:1/v1")}) == 3


def test_a_model_without_a_run_plays_as_the_other_side_was_trained(tmp_path, models):
    play = {"max_turns": 7, "turn_tokens": 256, "top_p": 0.95, "on_impasse": "zero"}
    paper, single = tmp_path / "paper-0", tmp_path / "single-0"
    make_run(paper, models[0], {**play, "temperature": 0.7, "context_turns": 2})
    make_run(single, models[0], {"max_turns": 0, "agreement": "none", "final_tokens": 99})

    def compared(model, baseline):
        argv = ["--model", str(model), "--baseline", str(baseline)]
        found = sides.read_sides("conflict", argv)[0]
        return found["A"], found["B"]

    for plain, run in (compared(paper, models[1])[::-1], compared(models[1], paper)):
        assert dataclasses.replace(run, model="") == dataclasses.replace(plain, model="")
        assert (plain.max_turns, plain.turn_tokens, plain.top_p) == (7, 256, 0.95)
        assert plain.on_impasse == "complete"
    default = selfplay.PlaySettings
    a, b = compared(single, paper)  # two runs: each as it was trained
    assert (a.max_turns, b.max_turns, b.final_tokens) == (0, 7, default.final_tokens)
    _, b = compared(single, models[1])  # beside a single answer it negotiates
    assert (b.max_turns, b.agreement, b.final_tokens) == (default.max_turns, "judge", 99)


def test_a_copy_of_a_checkpoint_is_not_taken_for_one(tmp_path):
    folder = tmp_path / "checkpoints"
    for name in ("step_000002", "step_000010", "step_000010_backup", "step_1000000", "best"):
        (folder / name).mkdir(parents=True)
    (folder / "step_000003").symlink_to("best")  # moved elsewhere, and still one
    (folder / "latest").symlink_to("step_000002")
    names = [path.name for path in checkpoint.checkpoints_of(tmp_path)]
    assert names == ["step_000002", "step_000003", "step_000010", "step_1000000"]
    assert checkpoint.locate(str(tmp_path))[0].endswith("step_1000000")


@pytest.mark.parametrize(
    "argv, says",
    [
        (["conflicts"], r"conflict\|open\|general\|cross\|audit\|blind\|report"),
        (["conflicts"], "conflicts: there is no such command; say what"),
        ([], "^say what: .*python eval.py --help"),
        (["report"], "name the folder of a run"),
        (["report", "nowhere"], "no metrics.jsonl"),
        (["conflict", "--seeds", "0"], "--seeds 0: must be at least 1"),
        (["conflict", "--best-of", "2"], "--best-of: of a --baseline, in conflict, open or blind"),
    ],
)
def test_mistakes_are_told_in_one_line(argv, says):
    with pytest.raises(UserError, match=says):
        evaluation.main(argv)


def test_results_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out .*/x.json: cannot be written"):
        evaluation.main(["conflict", "--out", str(tmp_path / "file" / "x.json")])
    with pytest.raises(UserError, match="--out .*: cannot be written .Is a directory"):
        evaluation.main(["general", "--out", str(tmp_path)])
    with pytest.raises(UserError, match="--out .*: cannot be written .File name too long"):
        evaluation.main(["conflict", "--out", "x" * 300])
    for path in (tmp_path, tmp_path / "file" / "x.html"):
        with pytest.raises(UserError, match="--out .*: cannot be written"):
            report.write(path, "page")


def test_a_wrong_model_starts_no_judge_and_makes_no_file(tmp_path, models):
    says = "--model no such model: not negotiator-135m, smollm2-135m, a folder"
    flags = ["--judge-url", "http://127.0.0.1:9/v1", "--out", str(tmp_path / "x.json")]
    for model, baseline in (("no such model", ""), (models[0], "no such model")):
        pair = ["--model", model, "--baseline", baseline]
        with pytest.raises(UserError, match=says):
            evaluation.main(["conflict", *pair, *flags])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no complete checkpoint"):
        sides.read_sides("conflict", ["--model", str(tmp_path)])


CHOICE = {"id": "a", "prompt": "Say.", "choices": ["yes", "no"], "answer": 1}


@pytest.mark.parametrize(
    "change, says",
    [
        ({"choices": "both"}, 'bad.jsonl:2: "choices" is text instead of a list'),
        ({"choices": []}, 'bad.jsonl:2: "choices" must be texts, "answer" the number of one'),
        ({"choices": [1, 2]}, "must be texts"),
        ({"choices": ["yes", ""]}, "must be texts"),
        ({"choices": ["yes", "\ud800"]}, "must be texts"),
        ({"answer": 2}, '"answer" the number of one'),
        ({"answer": -1}, '"answer" the number of one'),
        ({"id": "a"}, 'id "a" occurs twice'),
    ],
)
def test_a_bad_line_of_data_is_named(tmp_path, models, change, says):
    bad = tmp_path / "bad.jsonl"
    rows = [CHOICE, {**CHOICE, "id": "b", **change}]
    bad.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model", models[0], "--data", str(bad), "--out", str(tmp_path / "new" / "g.json")]
    with pytest.raises(UserError, match=says):
        evaluation.main(["general", *flags])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "change, says",
    [
        ({"score": math.nan}, "no number from 0 to 5: NaN"),
        ({"score": math.inf}, "no number from 0 to 5: Infinity"),
        ({"score": 10**400}, "no number from 0 to 5: 1000"),
        ({"id": "l0"}, 'id "l0" occurs twice'),
    ],
)
def test_a_bad_label_is_named(tmp_path, change, says):
    rows = labels(2)
    rows[1] |= change
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=f"own.jsonl:2: .*{says}"):
        audit.labelled(sides.EvalSettings(data=str(tmp_path / "own.jsonl")))


@pytest.mark.parametrize(
    "command, out",
    [
        ("conflict --data own.jsonl", "own.jsonl"),
        ("audit --data own.jsonl", "own.jsonl"),
        ("conflict --rubric own.jsonl", "own.jsonl"),
        ("blind --read own.jsonl", "own.jsonl"),
        ("blind --read own.jsonl", "own.jsonl.key"),
        ("blind", "own.jsonl"),
    ],
)
def test_no_file_of_a_person_is_replaced(tmp_path, models, monkeypatch, command, out):
    monkeypatch.chdir(tmp_path)
    for name in ("own.jsonl", "own.jsonl.key"):
        Path(name).write_text('{"id": "0", "score": 3}\n')
    with pytest.raises(UserError, match=f"--out {out}: is there already"):
        evaluation.main([*command.split(), "--model", models[0], "--out", out])
    kept = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert kept == dict.fromkeys(("own.jsonl", "own.jsonl.key"), '{"id": "0", "score": 3}\n')


def test_a_mistake_leaves_nothing_behind(tmp_path, models):
    flags = ["--model", models[0], "--out", str(tmp_path / "new" / "x.json")]
    nobody = ["--judge-url", "http://127.0.0.1:9/v1", "--judge-wait", "0"]
    nobody += ["--judge-attempts", "1"]
    for wrong in (["--data", "none"], ["--rubric", "none"], ["--judge-model", "none"], nobody):
        with pytest.raises(UserError):
            evaluation.main(["conflict", *flags, *wrong])
    assert list(tmp_path.iterdir()) == []


def test_a_judge_who_knows_scores_only_is_not_asked_who_agrees(run, tmp_path, models):
    flags = ("--limit", "1", "--judge-mode", "rm")
    with JudgeServer(lambda text: 3, offers=("pooling",)) as server:
        with pytest.raises(UserError, match="--agreement judge: .* knows scores only"):
            run("conflict", server, *flags, baseline=False)
        assert not list(tmp_path.glob("conflict*"))
        with pytest.raises(UserError, match="--agreement judge: .* knows scores only"):
            selfplay.main(["--model", models[0], "--judge-url", server.url])
        _, rows = run("conflict", server, *flags, "--agreement", "none", baseline=False)
    assert rows["ca_score", "A"]["n"] == 1


def test_items_on_a_full_disk_or_of_somebody_else(tmp_path):
    items = sides.Items(tmp_path / "x.items.jsonl", 1)
    items.path = Path("/dev/full")
    with pytest.raises(UserError, match="/dev/full: cannot be written .No space left"):
        items.finish("", {("a",): 1}, lambda arguments: arguments)
    for line in ("5", '{"id": "0"}'):
        (tmp_path / "x.items.jsonl").write_text(line + "\n")
        with pytest.raises(UserError, match="x.items.jsonl: is there already, to be kept"):
            sides.Items(tmp_path / "x.items.jsonl", 1)
    for line in ('{"key": 5}', '{"key": ["a"]}', '{"key": [[]], "value": 1}'):
        (tmp_path / "x.items.jsonl").write_text(line + "\n")
        with pytest.raises(UserError, match="x.items.jsonl: a line cannot be read .*take it out"):
            sides.Items(tmp_path / "x.items.jsonl", 1)
        assert (tmp_path / "x.items.jsonl").read_text() == line + "\n"


# ---- the other commands --------------------------------------------------------------------------


def test_open(run):
    with JudgeServer(lambda text: len(text) % 6, offers=("json",)) as server:
        _, rows = run("open", server, "--limit", "5")
        asked = questions(server)
    assert rows["ca_score", "A"]["n"] == rows["win_rate_ca", "A against B"]["pairs"] == 5
    assert ("agreed", "A") not in rows
    assert ("win_rate_conflict", "A against B") not in rows
    question = dataset.load_jsonl(dataset.DATA / "eval_open.jsonl")[0]["question"]
    assert sum(f"Dilemma: {question}" in q for q in asked) == 2 + 2


def test_greedy_answers_are_the_models_own():
    """The batch decodes as transformers' generate does, one prompt at a time."""
    speaker = voice()
    longer = "Say a longer thing about the council and the farm, please."
    prompts = ["Who gets the water?", longer, "No."]
    turns = evaluation.answers(speaker, prompts, 12, 0.0, 1.0, [0] * 3)
    speaker.model.set_attn_implementation("eager")
    for prompt, turn in zip(prompts, turns):
        messages = [
            {"role": "system", "content": evaluation.HELPER},
            {"role": "user", "content": prompt},
        ]
        asked = tokenizer().apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        said = speaker.model.generate(**asked, max_new_tokens=12, do_sample=False)
        assert turn.ids == said[0, asked["input_ids"].shape[1] :].tolist()


def test_an_answer_depends_on_its_seed_and_not_on_the_batch():
    speaker, prompts = voice(), ["Who gets the water?", "No."]
    seeds = [[0, 1], [0, 2]]
    both = evaluation.answers(speaker, prompts, 12, 0.8, 0.9, seeds)
    one = evaluation.answers(speaker, prompts[1:], 12, 0.8, 0.9, seeds[1:])
    other = evaluation.answers(speaker, prompts[1:], 12, 0.8, 0.9, seeds[:1])
    assert both[1].ids == one[0].ids != other[0].ids


def test_general_needs_no_judge(run):
    nobody = types.SimpleNamespace(url="http://127.0.0.1:9/v1")
    _, rows = run("general", nobody, baseline=False)
    assert rows["choice", "A"]["n"] == 35
    text = (dataset.DATA / "public_domain.txt").read_text(encoding="utf-8")
    assert rows["token_loss", "A"]["n"] == len(text.split()) // 192
    assert 4 < rows["token_loss", "A"]["value"] < 12  # near log(400) = 6, or worse


def test_choices_by_mean_logprob_per_token():
    """The choice that the model finds likelier per token is chosen, whatever its length."""
    speaker = voice()
    side = types.SimpleNamespace(voice=speaker, settings=sides.EvalSettings())
    choices = ["the farm", "the council of the hospital", "No"]
    row = {"id": "q", "prompt": "Who?", "choices": choices}
    chat = speaker.chat
    prefix = chat.prompt(evaluation.HELPER) + chat.encode([("Who?" + chat.opening, True)])
    continuations = [chat.plain(choice) for choice in choices]
    means = evaluation.mean_logprobs(speaker, prefix, continuations)
    for ids, got in zip(continuations, means):
        plain = plain_logprobs(speaker.model, prefix + ids)[-len(ids) :]
        assert got == pytest.approx(plain.mean().item(), abs=1e-4)
    for answer in range(3):
        (value,) = evaluation.general_items(side, None, [({**row, "answer": answer}, 0)])
        assert value == {"choice": float(np.argmax(means) == answer), "token_loss": None}


def test_cross_swaps_partners(run, tmp_path):
    with JudgeServer(lambda text: len(text) % 6, offers=("json",)) as server:
        _, rows = run("cross", server, "--limit", "2")
    pairings = ["A with A", "A with B", "B with A", "B with B"]
    columns = pairings + [f"A with {script}" for script in ("stubborn", "hostile", "grasping")]
    assert [of for name, of in rows if name == "agreed" and " - " not in of] == columns
    assert all(rows["ca_score", of]["n"] == 2 for of in columns)
    gap = rows["ca_score", "A with hostile"]["value"] - rows["ca_score", "A with A"]["value"]
    row = rows["ca_score", "A with hostile - A with A"]
    assert row["value"] == pytest.approx(gap, abs=1e-5)
    partners = json.loads((dataset.DATA / "partners.json").read_text())
    lines = sum(partners.values(), [])
    for item in checkpoint.whole_lines(tmp_path / "cross.items.jsonl"):
        script = item["key"][3]
        said = [turn["text"] for turn in item["value"]["turns"] if turn["speaker"] == 1]
        if script:
            assert said == partners[script][:1]
        else:
            assert said[0] not in lines


def test_blind(models, tmp_path):
    """The sheet knows no sides; with its key the ratings come back as rows."""
    sheet = tmp_path / "sheet.jsonl"
    pair = ["--model", models[0], "--baseline", models[1], "--limit", "4", "--seeds", "2"]
    with JudgeServer(lambda text: 2, offers=("json",)) as server:
        judged = ["--judge-url", server.url, "--judge-mode", "json"]
        flags = ["blind", *pair, *judged, "--out", str(sheet), *SHORT.split()]
        assert evaluation.main(flags) == 0
        with pytest.raises(UserError, match="sheet.jsonl: is there already, to be kept"):
            evaluation.main(flags)
    lines = dataset.load_jsonl(sheet)
    columns = {"id", "dilemma", "personas", "solution", "score"}
    assert all(set(line) == columns for line in lines)
    assert all(line["score"] is None for line in lines)
    key = json.loads((tmp_path / "sheet.jsonl.key").read_text())["items"]
    key = {item["id"]: item for item in key}
    played = {}
    for item in negotiated_items(tmp_path / "sheet.items.jsonl"):
        played.setdefault(item["value"]["final"], []).append(item["value"]["scenario_id"])
    assert len(lines) == len(key) == 2 * 4 * 2
    order = [key[line["id"]]["side"] for line in lines]
    assert sorted(order) == ["A"] * 8 + ["B"] * 8 != order  # shuffled
    for line in lines:
        assert key[line["id"]]["scenario"] in played[line["solution"]]
        line["score"] = 4.0 if key[line["id"]]["side"] == "A" else 1.5
    lines[3]["score"] = None
    sheet.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert evaluation.main(["blind", "--read", str(sheet)]) == 0
    found = json.loads((tmp_path / "sheet.jsonl.json").read_text())
    rows = {row["of"]: row for row in found["rows"]}
    assert found["settings"]["B"]["model"] == models[1]
    assert [rows[of]["value"] for of in ("A", "B", "A - B")] == [4.0, 1.5, 2.5]
    assert rows["A - B"]["low"] == rows["A - B"]["high"] == 2.5
    assert (rows["A - B"]["n"], rows["A - B"]["missing"], rows["A - B"]["scenarios"]) == (7, 1, 4)


@pytest.mark.parametrize(
    "line, says",
    [
        ('{"id": "0", "score": "good"}', 'jsonl:1: "score" is no number from 0 to 5: "good"'),
        ('{"id": "0", "score": NaN}', "from 0 to 5: NaN"),
        ('{"id": "0", "score": 99}', "from 0 to 5: 99"),
        (f'{{"id": "0", "score": 1{"0" * 400}}}', "from 0 to 5: 1000"),
        ('{"id": "0", "score": 3}\n{"id": "0", "score": 4}', 'jsonl:2: id "0" occurs twice'),
        ('{"id": "7", "score": 3}', 'sheet.jsonl: id "7" is not in .*sheet.jsonl.key'),
    ],
)
def test_a_sheet_that_cannot_be_read(tmp_path, line, says):
    item = {"id": "0", "side": "A", "scenario": "s", "member": 0}
    key = {"settings": {"A": {}}, "items": [item]}
    (tmp_path / "sheet.jsonl.key").write_text(json.dumps(key))
    (tmp_path / "sheet.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=says):
        audit.read_sheet(tmp_path / "sheet.jsonl")


@pytest.mark.parametrize(
    "key", ["", "5", "[" * 100_000, "{}", '{"settings": {"A": {}}, "items": [5]}']
)
def test_a_key_that_cannot_be_read(tmp_path, key):
    (tmp_path / "sheet.jsonl").write_text('{"id": "0", "score": 3}\n')
    (tmp_path / "sheet.jsonl.key").write_text(key)
    with pytest.raises(UserError, match="sheet.jsonl.key: cannot be read"):
        audit.read_sheet(tmp_path / "sheet.jsonl")


def labels(n=40):
    """Labelled solutions on ten dilemmas, four each: the longer, the better."""
    personas = [{"name": "Ana", "creed": "You."}, {"name": "Ben", "creed": "Your."}]
    rows = []
    for i in range(n):
        solution = f"They share the well number {i}. " + "Then they talk. " * (i % 4)
        about = {"id": f"l{i}", "scenario_id": f"dilemma {i // 4}", "personas": personas}
        rows.append({**about, "solution": solution, "score": float(i % 4)})
    return rows


def test_audit(run, tmp_path):
    """A judge who knows the labels: all is perfect. One who sees the opposite: nothing is."""

    def by_label(text):
        return text.count("talk")

    def by_contrary(text):
        return 4 - text.count("talk")

    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps(row) + "\n" for row in labels()))
    with (
        JudgeServer(by_label, offers=("json",)) as server,
        JudgeServer(by_contrary, offers=("json",)) as second,
    ):
        flags = ("--judge2-url", second.url, "--data", str(own), "--batch", "60")
        _, rows = run("audit", server, *flags, baseline=False)
    values = {key: row["value"] for key, row in rows.items()}
    assert values["spearman", "judge, judge again"] == pytest.approx(1)
    assert rows["spearman", "judge, judge again"]["n"] == 40
    assert values["spearman", "judge, second judge"] == pytest.approx(-1)
    assert values["spearman", "judge"] == values["pairs_right", "judge"] == 1.0
    assert rows["pairs_right", "judge"]["n"] == 60
    assert values["spearman", "second judge"] == pytest.approx(-1)
    assert values["pairs_right", "second judge"] == 0
    assert values["pairs_right", "length alone"] > 0.95
    assert values["score_length_spearman", "judge"] > 0.9


def test_audit_of_the_shipped_labels_takes_their_test_part(run):
    with JudgeServer(lambda text: 3, offers=("json",)) as server:
        _, rows = run("audit", server, "--limit", "30", baseline=False)
    assert rows["spearman", "judge, judge again"]["n"] == 30
    assert rows["pairs_right", "judge"]["value"] in (0.5, None)
    dilemmas = {"test": set(), "fit": set()}
    for row in dataset.load_jsonl(dataset.DATA / "judge_labels.jsonl"):
        dilemmas[row["split"]].add(row["scenario_id"])
    assert not dilemmas["test"] & dilemmas["fit"]


def test_a_judge_that_is_another_one_is_asked_again(run):
    with JudgeServer(lambda text: 2, offers=("json",)) as server:
        run("conflict", server, "--limit", "2")
        server.rule, server.models = lambda text: 4, ("another",)
        found, rows = run("conflict", server, "--limit", "2")
    assert found["judge"] == "another, read by json"
    assert rows["ca_score", "A"]["value"] == 4


# ---- numbers, worked by hand ---------------------------------------------------------------------


def test_measures_of_one_dialogue():
    said = ["one two three", "one two three", "four"]
    ours = record(turns=said, agreed=True, final="Rosa brings water", endorse=[1.0, 4.0])
    none = record("none", final=None, reward=None, endorse=[4.0, None])
    column = evaluation.measured([ours, none])
    assert column["s", 0] == {
        "ca_score": 3.0,
        "endorse_min": 1.0,
        "endorse_first": 1.0,
        "agreed": 1.0,
        "turns_to_agreement": 3,
        "truncated": 0.0,
        **measure.text_measures(ours),
    }
    known = {key: value for key, value in column["none", 0].items() if value is not None}
    assert known == {"endorse_first": 4.0, "truncated": 0.0}


def test_agreement_and_correlations():
    # Without ties it is 1 - 6 sum d^2 / n (n^2 - 1).
    ranked = audit.spearman(np.array([1, 2, 3, 4]), np.array([10, 20, 40, 30]))
    assert ranked == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert audit.spearman(np.array([1, 2, 3]), np.array([9, 4, 1])) == pytest.approx(-1)
    tied = audit.spearman(np.array([1, 2, 2, 3]), np.array([1, 2, 3, 4]))
    assert tied == pytest.approx(4.5 / np.sqrt(4.5 * 5))  # equal numbers share their mean rank
    constant = figure("x", "A", [(i, 1.0, float(i)) for i in range(5)], audit.spearman)
    assert (constant.value, constant.low) == (None, None)


def test_pairs_on_one_dilemma_whose_labels_differ():
    labels = {"a": ("s", 1.0), "b": ("s", 2.0), "c": ("s", 2.25), "d": ("t", 5.0), "e": ("s", 4.0)}
    rows = [
        {"id": name, "dilemma": dilemma, "score": score}
        for name, (dilemma, score) in labels.items()
    ]
    scores = {"a": 1.0, "b": 3.0, "c": 1.0, "d": 0.0, "e": None}
    # a-b is right, a-c a tie; b-c lie too near, d is alone, three pairs with e are missing.
    row = audit.against_labels("judge", scores, rows)[1]
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


# ---- what train.py calls -------------------------------------------------------------------------

HELD_OUT = sides.EvalSettings(
    max_turns=2,
    turn_tokens=6,
    final_tokens=8,
    judge_mode="json",
    judge_attempts=1,
    agreement="none",
)


def test_heldout_is_the_same_every_time_and_on_any_number_of_ranks():
    def said(records):
        return sorted((r["scenario_id"], r["member"], r["final_ids"], r["reward"]) for r in records)

    dilemmas = {"a": "Who waits?", "b": "A well is dry. Who digs?", "c": "Who speaks first?"}
    fixed = voice(), [scenario(*item) for item in dilemmas.items()], HELD_OUT
    with JudgeServer(lambda text: len(text) % 6, offers=("json",)) as server:
        settings = dataclasses.replace(HELD_OUT, judge_url=server.url)
        with reward.open_judge(settings) as judge:
            records = evaluation.heldout(*fixed, judge)
            assert records == evaluation.heldout(*fixed, judge)
            shares = []
            for rank in (0, 1):
                shares.append(evaluation.heldout(*fixed, judge, share=slice(rank, None, 2)))
            assert evaluation.heldout(*fixed, judge, share=slice(6, None, 7)) == []
    assert [len(share) for share in shares] == [3, 3]
    assert said(records) == said(shares[0] + shares[1])
    metrics = evaluation.heldout_row(records)
    assert (metrics["n"], metrics["missing"], metrics["scenarios"]) == (6, 0, 3)
    assert metrics["reward"] == pytest.approx(sum(r["reward"] for r in records) / 6, abs=1e-5)
    assert metrics["reward_low"] <= metrics["reward"] <= metrics["reward_high"]
    assert {"agreed_rate", "turns_mean", *measure.diversity(records)} <= set(metrics)


def test_a_judge_who_is_away_costs_the_held_out_rewards_and_not_the_run():
    with JudgeServer(lambda text: 3, offers=("json",)) as server:
        settings = dataclasses.replace(HELD_OUT, judge_url=server.url)
        with reward.open_judge(settings) as judge:
            server.offers = ()
            scenarios = [scenario("a"), scenario("b")]
            records = evaluation.heldout(voice(), scenarios, settings, judge)
    assert [record["reward"] for record in records] == [None] * 4
    assert evaluation.heldout_row(records)["missing"] == 4
