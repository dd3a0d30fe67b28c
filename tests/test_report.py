"""The report: figures against cases worked by hand, and the page, whose every text is hostile."""

import base64
import dataclasses
import hashlib
import itertools
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from helpers import tokenizer

import eval as evaluation
import report
from report import figure

EVIL = (
    '</script><script>document.title = "owned"</script><!-- <script> <img src=x '
    'onerror="document.title=1">\u2028 {{ run }}{% for %} <b>&amp;"\''
)

# ---- numbers of texts ----------------------------------------------------------------------------


def test_words_and_ngrams():
    said = report.words("Don't stop: 3 well-known Öfen_!")
    assert said == ["don't", "stop", "3", "well", "known", "öfen"]
    assert report.ngrams(["a b c a", "x y"], 3) == [("a", "b", "c"), ("b", "c", "a")]


def test_overlap_is_over_the_one_with_fewer_trigrams():
    # {abc, bcd} and {abc, bcx, cxy, xyz}: one of two is shared
    assert report.overlap(["a b c d"], ["A, b c x y z"]) == 0.5
    # The texts of one speaker are not joined.
    assert report.overlap(["a b c"], ["a b", "c d e"]) == 0.0
    assert report.overlap(["a b"], ["a b c"]) is None
    assert report.overlap([], ["a b c"]) is None


def test_distinct_and_repetition():
    assert report.distinct(["a b a b", "a b"]) == 2 / 4  # ab ba ab, ab
    assert report.distinct(["a"]) is None
    # abcd bcda cdab dabc abcd, one of five again; what another text says does not count.
    assert report.repetition(["a b c d a b c d", "a b c d"]) == 1 / 6
    assert report.repetition(["a b c"]) is None


def test_grounding_compares_the_first_letters_of_content_words():
    final = "We will give the hospitals water, and a pump."  # content: give, hospitals, water, pump
    assert report.grounding(final, ["The hospital has no", "waters."]) == 2 / 4
    assert report.grounding("We will.", ["The hospital."]) is None


def record(scenario="s", member=0, turns=(), agreed=False, final="", reward=3.0, **more):
    """A line of dialogues.jsonl with turns given as texts."""
    spoken = [{"speaker": i % 2, "text": text, "truncated": False} for i, text in enumerate(turns)]
    return {
        "scenario_id": scenario,
        "member": member,
        "dilemma": "Who gets the water?",
        "personas": [{"name": "Rosa", "creed": "You farm."}] * 2,
        "turns": spoken,
        "agreed": agreed,
        "final": final,
        "final_truncated": False,
        "reward": reward,
        **more,
    }


def test_measures_of_one_dialogue():
    said = ["one two three", "one two three", "four"]
    ours = report.text_measures(record(turns=said, agreed=True, final="Rosa brings water"))
    assert ours == {
        "agreed_at_once": 0.0,
        "final_words": 3,
        "overlap": 1.0,
        "distinct_2": 4 / 6,
        "repetition": None,
        "grounding": 2 / 3,
    }
    assert set(report.text_measures(record(final=None)).values()) == {None}


def test_diversity_and_collapse():
    talk = ["we could share the river", "no the farm needs more of it"]
    finals = [f"{name} brings water on Friday" for name in ("Rosa", "Chen")]
    first = report.diversity([record(turns=talk, final=final) for final in finals])
    assert first["distinct_openings"] == 1.0
    assert first["grounding"] == (2 / 4 + 1 / 4) / 2

    same = ["yes let us work together"] * 2
    final = "Together we grow and we grow and we grow and we grow"
    now = report.diversity([record(turns=same, agreed=True, final=final)] * 2)
    assert now["distinct_openings"] == 0.5
    assert now["overlap"] == now["agreed_at_once"] == 1.0
    assert now["grounding"] == 0.0

    assert report.collapse(first, first) == ""
    warning = report.collapse(now, first)
    for sign in ("overlap", "repetition", "agreed_at_once", "grounding"):
        assert f"({sign})" in warning
    assert "final_words" not in warning
    # Nothing measured: nothing claimed.
    assert report.collapse(report.diversity([record(final=None)]), first) == ""


# ---- how sure a number is ------------------------------------------------------------------------


def test_figure_of_a_known_case():
    row = figure("x", "A", [("s1", 0.0), ("s2", 1.0), ("s2", None)])
    assert row == report.Row("x", "A", 0.5, 0.0, 1.0, n=2, scenarios=2, missing=1)
    many = figure("x", "A", [(i, float(i % 2)) for i in range(400)])
    expected = (0.5 - 1.96 * 0.025, 0.5 + 1.96 * 0.025)
    assert many.value == 0.5
    assert (many.low, many.high) == pytest.approx(expected, abs=0.008)
    assert many == figure("x", "A", [(i, float(i % 2)) for i in range(400)])  # seeded


def test_the_bootstrap_draws_scenarios():
    """Ten copies of each number on one scenario say no more than one."""
    one = figure("x", "A", [(i, float(i)) for i in range(20)])
    ten = figure("x", "A", [(i, float(i)) for i in range(20)] * 10)
    assert (one.low, one.high) == (ten.low, ten.high)
    assert (one.low, one.high) == (6.95, 11.9)
    assert (ten.n, ten.scenarios) == (200, 20)


def test_figure_without_enough_to_say():
    assert figure("x", "A", []).value is None
    assert figure("x", "A", [("s", None)]).missing == 1
    one = figure("x", "A", [("s", 1.0), ("s", 2.0)])
    assert (one.value, one.low, one.high) == (1.5, None, None)

    def never(column):
        return np.mean(column) / 0

    infinite = figure("x", "A", [(i, 1.0) for i in range(5)], never)
    assert (infinite.value, infinite.low, infinite.high) == (None, None, None)
    json.dumps(dataclasses.asdict(infinite), allow_nan=False)


# ---- the page ------------------------------------------------------------------------------------


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


STEP = {
    "reward_mean": 2.0,
    "reward_std": 0.5,
    "judge_failures": 1,
    "missing_rewards": 1,
    "agreed_rate": 0.5,
    "truncated_rate": 0.1,
    "seconds_play": 3.0,
    "seconds_judge": 1.0,
    "seconds_learn": 2.0,
    "seconds_step": 6.0,
}
HELD = {"heldout": {"reward": 2.1, "reward_low": 1.9, "reward_high": 2.2}}


def evil_dialogue(step, member, score):
    """A line of dialogues.jsonl whose every text is hostile."""
    ids = tokenizer()("system: we share", add_special_tokens=False)["input_ids"]
    mask = [0] * (len(ids) - 3) + [1] * 3
    sample = {"ids": ids, "mask": mask, "logprobs": [-0.5] * len(ids)}
    return {
        **record("evil", member, [EVIL, EVIL], True, EVIL, score),
        "step": step,
        "group": 0,
        "stop": "agreed",
        "dilemma": EVIL,
        "personas": [{"name": EVIL, "creed": EVIL}, {"name": "Chen", "creed": "You."}],
        "advantage": None if score is None else 0.7,
        "judge": {"raw": EVIL, "failures": []},
        "final_ids": [],
        "final_sample": None,
        "streams": [{"speaker": me, "samples": [sample]} for me in (0, 1)],
    }


@pytest.fixture
def run(tmp_path):
    """A run folder of two steps, whose every text is evil."""
    folder = tmp_path / "run<b>"
    (folder / "eval").mkdir(parents=True)
    config = {"model": EVIL, "recipe": "debug", "seed": 0, "group_size": 2}
    (folder / "config.json").write_text(json.dumps({**config, "train_tokens": "dialogue"}))
    unknown = {"reward_mean": None, "reward_std": None}
    metrics = [
        {"step": 0, **HELD},
        {"step": 1, **STEP},
        {"step": 2, **STEP, **unknown},
        {"step": 2, **HELD},
    ]
    write_lines(folder / "metrics.jsonl", metrics)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "rewa')  # left by a kill
    pairs = itertools.product((1, 2), enumerate((3.5, None)))
    dialogues = [evil_dialogue(step, member, score) for step, (member, score) in pairs]
    write_lines(folder / "dialogues.jsonl", dialogues)
    row = dataclasses.asdict(report.Row(EVIL, "A - B", missing=2, wins=3))
    rows = [row, {**row, "low": 1.0, "high": 2.0}]
    found = {"settings": {"A": {"model": EVIL}}, "judge": EVIL, "rows": rows}
    (folder / "eval" / "conflict.json").write_text(json.dumps(found))
    checkpoint = folder / "checkpoints" / "step_000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "COMPLETE").write_text("")
    tokenizer().save_pretrained(checkpoint)
    return folder


def make(folder, *flags):
    """The page as text."""
    assert evaluation.main(["report", str(folder), *flags]) == 0
    return (folder / "report.html").read_text(encoding="utf-8")


def data_of(page):
    """The transcripts in a page."""
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_no_text_becomes_part_of_the_page(run):
    page = make(run, "--baseline", str(run))
    # Ours: the data, and the reader.
    assert page.count("<script") == page.count("</script>") == 2
    assert "<!--" not in page
    assert "<img src=x" not in page
    assert "run<b>" not in page
    assert "run&lt;b&gt;" in page
    (case,) = data_of(page)  # and yet nothing is lost
    assert case["dialogues"][0]["final"] == case["dilemma"] == EVIL
    assert "default-src 'none'" in page
    assert page.count("data:image/svg+xml") == 7
    # What the page loads comes from within.
    shell = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    places = re.findall(r"""\b(?:src|href|url)\b\s*[=(]\s*["']?(.{5})""", shell)
    assert set(places) == {"data:", "x one"}


def test_the_pages_policy_knows_its_script(run):
    """The digest is of the script as it stands in the page."""
    page = make(run)
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page


def test_results_and_facts_are_shown(run):
    page = make(run)
    for text in ("n 0 in 0, 3 wins, 2 missing", "1.000 to 2.000", "2.00 → 2.00", "2.10 → 2.10"):
        assert f">{text}<" in page
    assert "<b>0.2</b><span>minutes</span>" in page
    assert "judged by\nthe embedded small judge" in page


def test_gains_compare_what_both_runs_played(run):
    def scored(scores):
        return dataclasses.replace(report.read_run(run), scores=scores)

    pairs = itertools.product(range(1, 7), "ab")
    mine = {(step, name): float(step) for step, name in pairs}
    mine[6, "b"] = 9.0
    theirs = {(step, "a"): 0.5 for step in range(2, 9)}
    rows, row = report.gains(scored(mine), scored(theirs))
    # Step 1 and scenario b are in one run only.
    assert rows == [{"step": step, "gain": step - 0.5} for step in range(2, 7)]
    # Steps 5 and 6 of 2 to 6.
    assert (row.value, row.n, row.scenarios, row.low) == (5.0, 2, 1, None)
    nothing = dataclasses.replace(row, value=None, n=0, scenarios=0)
    assert report.gains(scored(mine), scored({})) == ([], nothing)
    mine[5, "b"], theirs[5, "b"] = 1.5, 1.0
    assert report.gains(scored(mine), scored(theirs))[1].value == 3.5


def test_a_baseline_stands_beside_the_run(run):
    # A missing reward is missing.
    assert report.read_run(run).scores == {(1, "evil"): 3.5, (2, "evil"): 3.5}
    page = make(run, "--baseline", str(run))
    assert "<b>+0.00</b>" in page
    assert "last third of the steps (no interval)" in page
    assert "same scenarios" not in make(run)


def test_the_reader_shows_what_was_trained(run):
    dialogues = data_of(make(run))[0]["dialogues"]
    ends = ("step 1, training, best", "step 1, training, worst")
    ends += ("step 2, training, worst", "step 2, training, best")
    assert [d["label"] for d in dialogues] == [f"{end} of 2" for end in ends]
    assert [d["reward"] for d in dialogues] == [3.5, None, None, 3.5]
    assert dialogues[0]["raw"] == EVIL
    read, *sampled = dialogues[0]["streams"][1]["spans"]
    assert read[1] is None
    assert [logprob for _, logprob in sampled] == [-0.5] * 3
    assert read[0] + "".join(text for text, _ in sampled) == "system: we share"


def test_only_the_first_and_last_step_are_kept(run):
    played = [evil_dialogue(step, 0, 3.5) for step in range(1, 6)]
    write_lines(run / "dialogues.jsonl", played)
    write_lines(run / "heldout.jsonl", [evil_dialogue(step, 0, 3.5) for step in (0, 3, 5)])
    kept = sorted(report.read_run(run).kept["evil"])
    assert kept == [(0, "held out"), (1, "training"), (5, "held out"), (5, "training")]


def test_a_run_without_a_checkpoint_has_no_tokens(run, capsys):
    shutil.rmtree(run / "checkpoints" / "step_000002")
    page = make(run, "--scenarios", "1")
    assert "no tokens in the transcripts" in capsys.readouterr().err
    assert data_of(page)[0]["dialogues"][0]["streams"] == []


def test_a_run_that_has_just_begun(run):
    for name in ("dialogues.jsonl", "config.json"):
        (run / name).unlink()
    (run / "metrics.jsonl").write_text("")
    shutil.rmtree(run / "eval")
    assert "None yet" in make(run)


# ---- in a browser ------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here; Debian's package is called chromium"
)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--window-size=1200,3000",
    "--virtual-time-budget=3000",
]


def open_page(page, folder):
    """(the page's elements once its script has run, lines that it wrote to the console)."""
    command = [
        CHROMIUM,
        *FLAGS,
        f"--user-data-dir={folder / 'profile'}",
        "--dump-dom",
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@browser
@pytest.mark.slow
def test_the_page_works_and_no_text_runs(run, tmp_path):
    make(run)
    dom, console = open_page(run / "report.html", tmp_path)
    assert console == [] and "owned" not in re.search(r"<title>(.*?)</title>", dom).group(1)
    assert (
        dom.count('class="pane"') == 2
        and dom.count('class="final"') == 2
        and dom.count("<i title=") == 2 * 2 * 3
    )
    assert (
        dom.count("score 3.50") == 2
        and "step 1, training, best of 2" in dom
        and "step 2, training, best of 2" in dom
        and "advantage +0.70" in dom
    )
    assert dom.count(
        "background: rgba(60, 120, 220, 0.28)"
    ) == 12 and "<img src=x" not in dom.replace("&lt;", "")
    lines = (run / "dialogues.jsonl").read_text().splitlines(keepends=True)
    (run / "dialogues.jsonl").write_text("".join(lines[:2]))  # one step: its worst beside its best
    make(run)
    dom, console = open_page(run / "report.html", tmp_path)
    assert (
        console == []
        and dom.count("score 3.50") == 1 == dom.count("score missing")
        and dom.count("background: rgba(60, 120, 220, 0.28)") == 6
    )


@browser
@pytest.mark.slow
def test_the_console_is_really_read(tmp_path):
    """The test above can fail: an error in a page's script is seen."""
    (tmp_path / "bad.html").write_text("<script>nothing.here()</script>")
    assert len(open_page(tmp_path / "bad.html", tmp_path)[1]) == 1
