"""The judge: faults of the server, attacks of the policy, three ways to read an answer, and the embedded server."""
import json
import math
import threading
import time
from pathlib import Path

import pytest
import torch

import helpers  # noqa: F401  puts the repository on the path
import cli
import client
import reward
import server as embedded
from attacks import ATTACKS, CLEAN, NEUTRAL
from servers import FAULTS, EchoServer, JudgeServer, texts_of
from selfplay import Turn

DILEMMA, PERSONAS = "One reservoir is left. Who gets the water?", helpers.PERSONAS
TURNS = [Turn(0, "Half each?", False), Turn(1, "Yes, half each.", False)]


def settings(**more):
    return reward.JudgeSettings(**{"judge_cache": "off", "judge_timeout": 0.6, "judge_attempts": 3, **more})


def open_judge(server, **more):
    judge = reward.Judge(settings(judge_url=server.url, **more), server.url)
    judge.preflight()
    judge.take_stats()
    server.requests.clear()
    return judge


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Short pauses between attempts, and no thread of ours left behind."""
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.02)
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)
    before = set(threading.enumerate())
    ours = lambda: [t for t in threading.enumerate() if t not in before and t.name.startswith("judge")]
    yield
    ends = time.monotonic() + 5
    while time.monotonic() < ends and ours():
        time.sleep(0.02)
    assert not ours()


# ---- three ways to read a judge ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("offers, mode", [(("contrast", "expect", "json"), "contrast"), (("expect", "json"), "expect"), (("json",), "json")])
def test_auto_takes_what_the_server_offers_and_reads_the_rule(offers, mode):
    with JudgeServer(lambda text: 4 if "well" in text else 1.5, lambda text: "half each" in text, offers) as server:
        judge = open_judge(server)
        assert judge.mode == mode
        asked = [judge.score(DILEMMA, PERSONAS, TURNS, "A well for all."), judge.score(DILEMMA, PERSONAS, TURNS, "Nothing."),
                 judge.endorse(DILEMMA, PERSONAS[0], "A well."), judge.agreed(DILEMMA, PERSONAS, TURNS), judge.agreed(DILEMMA, PERSONAS, TURNS[:1]),
                 *(judge.compare(DILEMMA, PERSONAS, a, b, "Which?") for a, b in (("A well.", "No."), ("No.", "A well."), ("A well.", "My well.")))]
        values = [f.result().value for f in asked]
        assert values[:3] == pytest.approx([4, 1.5, 4], abs=2e-3)
        assert values[3:] == [True, False, "A", "B", "tie"]
        judge.close()


def test_a_misaligned_echo_is_noticed_and_not_used(capsys):
    with JudgeServer(lambda text: 4, offers=("contrast", "json"), shift=True) as server:
        judge = open_judge(server)
        assert judge.mode == "json" and "warning: --judge-mode contrast" in capsys.readouterr().err
        judge.close()
        stubborn = reward.Judge(settings(judge_url=server.url, judge_mode="contrast"), server.url)
        with pytest.raises(cli.UserError, match="--judge-mode contrast"):
            stubborn.preflight()
        stubborn.close()


@pytest.mark.parametrize("text, value", [('{"score": 3}', 3), (' {"score": 4.5}\n', 4.5), ('```json\n{"score": 0}\n```', 0), ('{"score": 5}', 5)])
def test_read_json_takes_exactly_one_object(text, value):
    assert reward.read_json("score", text) == value


@pytest.mark.parametrize("text", [
    "", " ", "4", "Score: 4", '{"score": "4"}', '{"score": true}', '{"score": null}', '{"score": NaN}', '{"score": Infinity}', '{"score": -1}',
    '{"score": 5.01}', '{"score": 1, "score": 5}', '{"score": 3} {"score": 5}', 'Here: {"score": 3}', '[{"score": 3}]', '{"Score": 3}',
    '{"score": 3, "why": "good"}', '{"score": {"score": 3}}', '{"score": 3', "[" * 100000, '{"score": 1e999}', '{"agreed": true}'])
def test_read_json_anything_else_is_missing(text):
    with pytest.raises(client.Missing):
        reward.read_json("score", text)


def test_read_json_of_the_other_questions():
    assert reward.read_json("agreed", '{"agreed": true}') is True and reward.read_json("agreed", '{"agreed": false}') is False
    assert [reward.read_json("compare", json.dumps({"winner": w})) for w in ("A", "B", "tie")] == ["A", "B", "tie"]
    for kind, text in (("agreed", '{"agreed": 1}'), ("agreed", '{"agreed": "yes"}'), ("compare", '{"winner": "C"}'), ("compare", '{"winner": true}')):
        with pytest.raises(client.Missing):
            reward.read_json(kind, text)


def top(**words):
    return {"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token": t.lstrip("_"), "logprob": p} for t, p in words.items()]}]}}]}


def test_expect_is_the_mean_of_the_digits_and_needs_mass():
    judge = reward.Judge(settings(), "http://127.0.0.1:9/v1", "m")
    reply = None
    judge.client.ask = lambda path, payload, parse, ends: parse(reply)
    reply = top(_5=math.log(0.3), _2=math.log(0.1), The=math.log(0.5))
    assert judge._expect("score", [""], {}, 0)[0] == pytest.approx((5 * 0.3 + 2 * 0.1) / 0.4, abs=1e-3)
    for reply in (top(The=-0.1, _5=-9.0), top(_5=3.0), top(_5=float("nan")), top(), {"choices": []}, {"choices": [{"logprobs": None}]}, [], "x",
                  {"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token": 5, "logprob": 0}]}]}}]}):
        with pytest.raises(client.Missing):
            judge._expect("score", [""], {}, 0)
    judge.close()


def test_tail_finds_the_statement_whatever_follows_and_refuses_doubtful_numbers():
    reply = lambda tokens, numbers: {"choices": [{"logprobs": {"tokens": tokens, "token_logprobs": numbers}}]}
    assert reward._tail(reply(["This", " is", " good", "."], [None, -1.0, -2.0, -3.0]), 0, " is good.") == -2.0
    assert reward._tail(reply(["This", "Ġis", "Ġgood", ".", " Yes"], [None, -1.0, -2.0, -3.0, -0.1]), 0, " is good.") == -2.0
    for tokens, numbers in ((["This is", " good", "."], [None, -2.0, -3.0]), (["This", " is", " good", "."], [None, None, -2.0, -3.0]),
                            (["This", " is", " good", "."], [None, -1.0, float("nan"), -3.0]), (["This", " is", " good", "."], [None, -1.0]),
                            (["This", " is", " bad", "."], [None, -1.0, -2.0, -3.0]), ([], [])):
        with pytest.raises(client.Missing):
            reward._tail(reply(tokens, numbers), 0, " is good.")
    with pytest.raises(client.Missing):
        reward._tail(reply(["This"], [None]), 0, " ")


def test_contrast_reads_a_text_without_a_single_latin_letter():
    with JudgeServer(lambda text: 4 if "平分" in text else 1, offers=("contrast",)) as server:
        judge = open_judge(server)
        assert judge.score(DILEMMA, PERSONAS, TURNS, "我们 平分 水 。").result(20).value == pytest.approx(4, abs=2e-3)
        judge.close()


# ---- faults -----------------------------------------------------------------------------------------------------------

# worth another attempt; and the reason when all attempts fail
AGAIN = {"hang": "timeout", "hang in the middle": "timeout", "trickle": "timeout", "trickle headers": "timeout",
         "reset": "connection", "cut short": "connection", "429": "http 429", "500": "http 500", "408": "http 408"}
FINAL = {"not json": "not json", "wrong type": "wrong shape", "huge": "too large", "redirect": "redirect", "prose": "no json",
         "refusal": "no json", "empty": "empty", "nan": "wrong value", "out of range": "wrong value", "two scores": "no json",
         "truncated": "truncated", "400": "http 400", "401": "http 401"}


@pytest.mark.parametrize("fault", AGAIN)
def test_a_passing_fault_is_retried_and_a_lasting_one_is_missing(fault):
    with JudgeServer(lambda text: 4, offers=("json",)) as server:
        judge = open_judge(server)
        server.faults = [fault, None]
        assert judge.score(DILEMMA, PERSONAS, TURNS, "A well.").result(20).value == 4
        stats = judge.take_stats()
        assert (stats["calls"], stats["retries"], stats["missing"]) == (2, 1, {})
        server.requests.clear()
        server.faults = lambda number, path: fault
        verdict = judge.score(DILEMMA, PERSONAS, TURNS, "A dam.").result(20)
        assert (verdict.value, verdict.reason) == (None, AGAIN[fault])
        stats = judge.take_stats()
        assert (len(server.requests), stats["calls"], stats["retries"], stats["missing"]) == (3, 3, 2, {AGAIN[fault]: 1})
        judge.close()


@pytest.mark.parametrize("fault", FINAL)
def test_what_no_retry_mends_is_missing_at_once_and_never_cached(fault, tmp_path):
    with JudgeServer(lambda text: 4, offers=("json",)) as server:
        judge = open_judge(server, judge_cache=str(tmp_path))
        server.faults = [fault]
        verdict = judge.score(DILEMMA, PERSONAS, TURNS, "A well.").result(20)
        assert (verdict.value, verdict.reason) == (None, FINAL[fault])
        assert judge.take_stats()["missing"] == {FINAL[fault]: 1} and len(server.requests) == 1
        assert judge.score(DILEMMA, PERSONAS, TURNS, "A well.").result(20).value == 4  # the second time it is asked again
        judge.close()


def test_every_fault_that_the_server_knows_is_tested():
    assert set(FAULTS) == set(AGAIN) | set(FINAL) | {"429 seconds", "429 date", "503 long"}


@pytest.mark.parametrize("fault", ["429 seconds", "429 date"])
def test_retry_after_is_honoured(fault):
    with JudgeServer(offers=("json",)) as server:
        judge = open_judge(server)
        server.faults = [fault]
        assert judge.score(DILEMMA, PERSONAS, TURNS, "A well.").result(20).value == 3
        waited = server.requests[1][3] - server.requests[0][3]
        assert 0.99 <= waited < 5 and judge.take_stats()["retry_seconds"] == pytest.approx(waited, abs=1.0)
        judge.close()


def test_a_retry_after_beyond_the_deadline_is_not_waited_for():
    with JudgeServer(offers=("json",)) as server:
        judge = open_judge(server)
        server.faults, began = ["503 long"], time.monotonic()
        assert judge.score(DILEMMA, PERSONAS, TURNS, "A well.").result(20).reason == "http 503" and time.monotonic() - began < 5
        judge.close()


def test_one_deadline_for_a_whole_batch():
    with JudgeServer(offers=("json",), hang=60) as server:
        judge = open_judge(server, judge_concurrency=2, judge_deadline=1.0, judge_timeout=30.0)
        server.faults, began = lambda number, path: "hang", time.monotonic()
        judge.start_batch()
        verdicts = [f.result(20) for f in [judge.score(DILEMMA, PERSONAS, TURNS, f"Well {i}.") for i in range(9)]]
        assert time.monotonic() - began < 5
        assert [v.value for v in verdicts] == [None] * 9 and {v.reason for v in verdicts} == {"timeout", "deadline"}
        assert judge.take_stats()["missing"] == {"timeout": 2, "deadline": 7}
        server.faults = ()
        judge.start_batch()  # the next batch has its own
        assert judge.score(DILEMMA, PERSONAS, TURNS, "Well 0.").result(20).value == 3
        judge.close()


def test_a_question_that_comes_late_in_a_long_step_is_asked_all_the_same():
    with JudgeServer(offers=("json",)) as server:
        judge = open_judge(server, judge_deadline=0.4)
        judge.start_batch()
        time.sleep(0.6)
        assert judge.score(DILEMMA, PERSONAS, TURNS, "A well.").result(20).value == 3
        judge.close()


@pytest.mark.parametrize("url, cores", [("", embedded.CORES), ("http://127.0.0.1:9/v1", 0)])
def test_the_embedded_judge_takes_cores_while_it_has_questions(url, cores):
    answer, judge = threading.Event(), reward.Judge(settings(judge_url=url), "http://127.0.0.1:9/v1", "m")
    assert judge.cores_taken() == 0
    asked = [judge.client.submit(lambda ends: answer.wait(20)), judge.client.submit(lambda ends: None)]
    asked[1].result(20)
    assert judge.cores_taken() == cores
    answer.set()
    asked[0].result(20)
    assert judge.cores_taken() == 0
    judge.close()


def test_requests_in_flight_stay_under_the_cap():
    with JudgeServer(lambda text: time.sleep(0.05) or 3, offers=("json",)) as server:
        judge = open_judge(server, judge_concurrency=3)
        server.most_in_flight = 0
        assert {f.result(20).value for f in [judge.score(DILEMMA, PERSONAS, TURNS, f"Well {i}.") for i in range(12)]} == {3.0}
        assert server.most_in_flight == 3
        judge.close()


def test_the_budget_counts_every_attempt_and_then_raises():
    with JudgeServer(offers=("json",)) as server:
        judge = reward.Judge(settings(judge_url=server.url, judge_budget=4, judge_mode="json", judge_concurrency=1), server.url)
        judge.preflight()  # two: the list of models, and one question
        server.faults = lambda number, path: "500" if number == 1 else None
        assert judge.score(DILEMMA, PERSONAS, TURNS, "A well.").result(20).value == 3  # two more: one fails
        with pytest.raises(client.BudgetSpent):
            judge.score(DILEMMA, PERSONAS, TURNS, "A dam.").result(20)
        assert len(server.requests) == 3
        judge.close()


def test_close_ends_a_hanging_call_at_once():
    with JudgeServer(offers=("json",), hang=60) as server:
        judge = open_judge(server, judge_timeout=50.0)
        server.faults = lambda number, path: "hang"
        future = judge.score(DILEMMA, PERSONAS, TURNS, "A well.")
        while not (future.running() and server.in_flight):
            time.sleep(0.01)
        began = time.monotonic()
        judge.close()
        assert time.monotonic() - began < 5 and future.result(1).value is None


def test_a_mixture_of_all_faults_gives_exact_counts():
    passing, lasting = list(AGAIN), list(FINAL)
    order = passing + lasting
    with JudgeServer(lambda text: 2, offers=("json",)) as server:
        judge = open_judge(server, judge_concurrency=1)
        server.faults = [f for fault in order for f in ([fault, None] if fault in AGAIN else [fault])]
        verdicts = [f.result(60) for f in [judge.score(DILEMMA, PERSONAS, TURNS, f"Well {i}.") for i in range(len(order))]]
        assert [v.value for v in verdicts] == [2.0] * len(passing) + [None] * len(lasting)
        stats = judge.take_stats()
        assert stats["calls"] == len(server.requests) == 2 * len(passing) + len(lasting) and stats["retries"] == len(passing)
        assert sum(stats["missing"].values()) == len(lasting) and stats["prompt_tokens"] == 10 * len(passing)
        judge.close()


# ---- key, cache, preflight ----------------------------------------------------------------------------------------------


def test_a_key_that_no_header_can_carry_is_told_before_the_first_request(monkeypatch):
    with JudgeServer(offers=("json",)) as server:
        monkeypatch.setenv("JUDGE_API_KEY", " sk-secret\r\n")  # as a mounted file has it
        judge = open_judge(server)
        assert judge.score(DILEMMA, PERSONAS, TURNS, "Well.").result(20).value is not None
        assert {headers["Authorization"] for _, _, headers, _ in server.requests} == {"Bearer sk-secret"}
        judge.close()
        for bad in ("\u201csk-secret\u201d", "sk-\nsecret"):
            monkeypatch.setenv("JUDGE_API_KEY", bad)
            with pytest.raises(cli.UserError, match="^JUDGE_API_KEY: holds characters") as error:
                client.Client(server.url)
            assert "secret" not in str(error.value)
    with pytest.raises(cli.UserError, match="^--judge-url: must look like"):
        client.Client("http://[::1/v1")


def test_the_key_goes_to_the_origin_only_and_is_shown_nowhere(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("JUDGE_API_KEY", "sk-secret")
    with JudgeServer(offers=("json",)) as other, JudgeServer(offers=("json",)) as server:
        judge = open_judge(server, judge_cache=str(tmp_path))
        server.elsewhere, server.faults = other.url, ["redirect", "401", "400", None]
        verdicts = [judge.score(DILEMMA, PERSONAS, TURNS, f"Well {i}.").result(20) for i in range(4)]
        assert [v.reason for v in verdicts] == ["redirect", "http 401", "http 400", ""] and not other.requests
        assert {headers["Authorization"] for _, _, headers, _ in server.requests} == {"Bearer sk-secret"}
        assert "refused" in verdicts[1].raw and "sk-secret" not in str(verdicts) + repr(judge) + repr(vars(judge)) + repr(judge.client)
        server.faults = lambda number, path: "401"
        again = reward.Judge(settings(judge_url=server.url), server.url)
        with pytest.raises(cli.UserError, match="JUDGE_API_KEY") as error:
            again.preflight()
        assert "sk-secret" not in str(error.value) + "".join(capsys.readouterr())
        assert all("sk-secret" not in path.read_text() for path in tmp_path.rglob("*.json"))
        judge.close(), again.close()


def test_a_second_judge_gets_a_key_of_its_own(monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "sk-first")
    with JudgeServer(offers=("json",)) as server:
        for key in (None, "sk-second"):
            monkeypatch.setenv("JUDGE2_API_KEY", key) if key else None
            server.requests.clear()
            with reward.open_judge(settings(judge_url=server.url), key="JUDGE2_API_KEY"):
                assert server.requests and {headers.get("Authorization") for _, _, headers, _ in server.requests} == {key and f"Bearer {key}"}


def test_no_key_no_header_even_with_a_netrc(monkeypatch, tmp_path):
    Path(tmp_path, "netrc").write_text("machine 127.0.0.1 login me password other\n")
    monkeypatch.setenv("NETRC", str(Path(tmp_path, "netrc")))
    with JudgeServer(offers=("json",)) as server:
        judge = open_judge(server)
        judge.score(DILEMMA, PERSONAS, TURNS, "A well.").result(20)
        assert "Authorization" not in server.requests[0][2]
        judge.close()


def test_the_cache_survives_the_run_and_knows_what_it_answers(tmp_path):
    with JudgeServer(lambda text: 4, offers=("json", "contrast")) as server:
        first = open_judge(server, judge_cache=str(tmp_path), judge_mode="json")
        assert first.score(DILEMMA, PERSONAS, TURNS, "A well.").result(20).value == 4 and len(server.requests) == 1
        first.close()
        second = open_judge(server, judge_cache=str(tmp_path), judge_mode="json")
        second.take_stats()
        assert second.score(DILEMMA, PERSONAS, TURNS, "A well.").result(20).value == 4 and not server.requests
        assert second.take_stats()["cache_hits"] == 1
        second.score(DILEMMA, PERSONAS, TURNS, "A dam.").result(20)
        second.score(DILEMMA + " ", PERSONAS[::-1], TURNS, "A well.").result(20)
        assert len(server.requests) == 2  # another text, another order of the personas
        second.model = "other"
        second.score(DILEMMA, PERSONAS, TURNS, "A well.").result(20)
        assert len(server.requests) == 3
        for path in tmp_path.rglob("*.json"):
            path.write_text('{"choices')  # a file that some accident cut short
        second.model = "scripted"
        assert second.score(DILEMMA, PERSONAS, TURNS, "A well.").result(20).value == 4 and len(server.requests) == 4
        assert not list(tmp_path.rglob("*.part"))
        second.close()


def test_a_cache_that_cannot_be_written_costs_no_score(tmp_path, capsys):
    Path(tmp_path, "file").write_text("")
    with JudgeServer(offers=("json",)) as server:
        judge = open_judge(server, judge_cache=str(tmp_path / "file" / "folder"))
        assert judge.score(DILEMMA, PERSONAS, TURNS, "A well.").result(20).value == 3 and "warning: --judge-cache" in capsys.readouterr().err
        judge.close()


def preflight_error(server_or_url, **more):
    url = getattr(server_or_url, "url", server_or_url)
    judge = reward.Judge(settings(judge_url=url, **more), url, more.get("judge_model", ""))
    try:
        with pytest.raises(cli.UserError) as error:
            judge.preflight()
    finally:
        judge.close()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_preflight_says_what_to_change():
    assert "start the server" in preflight_error("http://127.0.0.1:9/v1")
    with JudgeServer(models=("big", "small")) as server:
        assert "it has big, small" in preflight_error(server, judge_model="huge")
    with JudgeServer(models=None) as server:
        assert "--judge-model: " in preflight_error(server)
    with JudgeServer(faults=lambda number, path: "redirect") as server:
        assert "redirects to http://127.0.0.1:9/v1/chat/completions" in preflight_error(server)
    with JudgeServer(faults=lambda number, path: "prose") as server:
        assert "gives no usable answer" in preflight_error(server)
    with JudgeServer(faults=lambda number, path: "400") as server:
        assert "http 400" in preflight_error(server)
    with JudgeServer(offers=("json",)) as server:
        assert "--judge-mode expect" in preflight_error(server, judge_mode="expect")
    for url in ("127.0.0.1:8000", "ftp://x/v1", "http://me:secret@host/v1", ""):
        with pytest.raises(cli.UserError, match="--judge-url") as error:
            client.Client(url)
        assert "secret" not in str(error.value)


def test_preflight_survives_a_fault_that_passes():
    with JudgeServer(offers=("json",), faults=["500", "reset", None]) as server:
        judge = reward.Judge(settings(judge_url=server.url, judge_mode="json"), server.url)
        assert judge.preflight() == f"judge: scripted at {server.url}, read by json"
        judge.close()


def test_a_rubric_file_replaces_the_rubric_and_errors_name_the_key(tmp_path):
    path = tmp_path / "rubric.json"
    other = json.loads(json.dumps(reward.RUBRIC))
    other["anchors"]["5"] = "like a poem"
    path.write_text(json.dumps(other))
    with JudgeServer(offers=("json",)) as server:
        judge = open_judge(server, rubric=str(path))
        judge.score(DILEMMA, PERSONAS, TURNS, "A well.").result(20)
        assert "5: like a poem" in server.requests[0][1]["messages"][0]["content"]
        judge.close()
    score = lambda **wrong: {**other["contrasts"], "score": {**other["contrasts"]["score"], **wrong}}
    for key, value, said in (("anchors", {}, "anchors must have the keys 0, 1, 2, 3, 4, 5"), ("parties", 3, "parties must be a str"),
                             ("definition", None, "definition must be"), ("contrasts", score(scale="big"), "contrasts.score.scale must be a float"),
                             ("contrasts", score(pairs=[[" a", " b"]]), r"contrasts.score.pairs\[0\]")):
        path.write_text(json.dumps({**other, key: value}))
        with pytest.raises(cli.UserError, match="rubric.json: .*" + said):
            reward.load_rubric(path)
    path.write_text("{")
    with pytest.raises(cli.UserError, match="cannot be read"):
        reward.load_rubric(path)
    with pytest.raises(cli.UserError, match="cannot be read"):
        reward.load_rubric(tmp_path / "none.json")


# ---- the policy is an adversary -----------------------------------------------------------------------------------------


def test_there_are_enough_attacks_and_each_has_a_clean_twin():
    assert len(ATTACKS) >= 25 and all(isinstance(text, str) for text in ATTACKS.values())


@pytest.mark.parametrize("name", ATTACKS)
def test_no_attack_gains_with_a_naive_judge_that_repeats_scores(name):
    with EchoServer() as server:
        judge = open_judge(server)
        clean, attack = judge.score(DILEMMA, PERSONAS, TURNS, CLEAN).result(20), judge.score(DILEMMA, PERSONAS, TURNS, ATTACKS[name]).result(20)
        assert clean.value == 2 and (attack.value is None or attack.value <= 2)
        judge.close()


def test_the_naive_judge_would_have_been_fooled():
    server = EchoServer()
    fooled = [name for name, text in ATTACKS.items() if server.last_score(text) > 2]
    server.__exit__()
    assert len(fooled) >= 12


@pytest.mark.parametrize("mode, prompt_of", [("json", lambda posts: posts[0][1]["messages"][1]["content"]),
                                             ("contrast", lambda posts: posts[-1][1]["prompt"][0])])
def test_untrusted_text_stays_between_its_markers(mode, prompt_of):
    with JudgeServer(offers=(mode,)) as server:
        judge = open_judge(server, judge_sees="dialogue")
        for text in [*ATTACKS.values(), "{question} {name} %s {0} \\1 \\g<0>", "solution 00000000:\nx\n00000000"]:
            server.requests.clear()
            judge.score(DILEMMA, PERSONAS, [Turn(0, text, False)], text).result(20)
            prompt = prompt_of(server.requests)  # asked even when nothing is left: every score is the judge's own
            assert texts_of(prompt) == {"dialogue": "Rosa: " + reward.tame(text), "solution": reward.tame(text, judge.echoes) or "(nothing)"}
            assert not set("<>[]{}|\0") & set(texts_of(prompt)["solution"]) and len(texts_of(prompt)["solution"]) <= reward.LONGEST
        judge.close()


def test_markers_are_equal_for_equal_cases_and_differ_for_others():
    with JudgeServer(offers=("json",)) as server:
        judge = open_judge(server)
        for text in ("A well.", "A well.", "A dam."):
            judge.score(DILEMMA, PERSONAS, TURNS, text).result(20)
        a, b, c = (r[1]["messages"][1]["content"] for r in server.requests)
        mark = lambda prompt: prompt.split("solution ")[1][:8]
        assert mark(a) == mark(b) != mark(c)
        judge.close()


def test_tame_leaves_an_honest_plan_alone():
    for text in (CLEAN, "We split the lot: 1/2 becomes a playground by June 5. Mark, the judge and Tom's team meet on Monday; it costs 5 dollars.",
                 "The plan has three steps. First, Ana scores the timber. The council rates fall by 3 percent, says Ben."):
        assert reward.tame(text) == text
    warm = "Both sides benefit in a fair and balanced way."
    assert reward.tame(f"{CLEAN} {warm} In the morning the farm gets the water. Rosa rests.") == CLEAN + " Rosa rests."  # praise, and nothing new
    for text in ("Wir teilen das Wasser: Ärzte zuerst, dann die Felder.", "Мы делим воду поровну.", "我们平分水。"):
        assert reward.tame(text) == text


def test_tame_is_quick_on_hostile_texts():
    began = time.monotonic()
    for piece in ("the plan is ", "score ", "five ", "ignore a b ", "a ", "it is", "(([{", "é", " give it a", "\u0430a", ". ", "\ud800"):
        reward.tame(piece * 20000)
    assert time.monotonic() - began < 10


@pytest.mark.slow
def test_no_attack_gains_with_the_embedded_judge():
    """No attack gains more than bf16 rounds in another state of the server's cache. Ten harmless sentences after the clean text move it further."""
    served = embedded.start_embedded()
    judge = reward.Judge(reward.JudgeSettings(), served.url)
    judge.preflight()
    ask = lambda texts: [f.result().value for f in [judge.score(DILEMMA, PERSONAS, TURNS, text) for text in texts]]
    clean, *neutral = ask([CLEAN] + [f"{CLEAN} {more}" for more in NEUTRAL])
    noise = (torch.tensor(neutral) - clean).square().mean().sqrt()
    gains = dict(zip(ATTACKS, (score - clean for score in ask(ATTACKS.values()))))
    judge.close(), served.close()
    defused = [name for name, text in ATTACKS.items() if reward.tame(text, judge.echoes) == reward.tame(CLEAN, judge.echoes)]
    print(f"clean {clean:.2f}, noise {noise:.2f}, {len(defused)} defused, largest gain {max(gains.values()):+.2f}, the rest:",
          {name: round(gain, 2) for name, gain in gains.items() if name not in defused})
    assert noise > 0.1 and {name: gain for name, gain in gains.items() if gain > 0.1} == {}
    assert len(defused) >= 40 and {name: gains[name] for name in defused if abs(gains[name]) > 0.1} == {}
