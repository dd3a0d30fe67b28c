"""Measures, checks and statistics against cases worked by hand."""

import json

import numpy as np
import pytest

import data_gen
import measure
from measure import figure, outcome, table, win_rate

# ---- texts ---------------------------------------------------------------------------------------------------------------


def test_words_and_ngrams():
    assert measure.words("Don't stop: 3 well-known Öfen_!") == [
        "don't",
        "stop",
        "3",
        "well",
        "known",
        "öfen",
    ]
    assert (
        measure.ngrams("a b c a", 3) == [("a", "b", "c"), ("b", "c", "a")]
        and measure.ngrams("a b", 3) == []
    )


def test_overlap_is_over_the_one_with_fewer_trigrams():
    # {abc, bcd} and {abc, bcx, cxy, xyz}: one of two is shared; the texts of one speaker are not joined
    assert measure.overlap(["a b c d"], ["A, b c x y z"]) == 0.5
    assert measure.overlap(["a b c"], ["a b", "c d e"]) == 0.0
    assert measure.overlap(["a b"], ["a b c"]) is None and measure.overlap([], ["a b c"]) is None


def test_distinct_and_repetition():
    assert measure.distinct(["a b a b", "a b"]) == 2 / 4  # ab ba ab, ab
    assert measure.distinct(["a"]) is None
    # abcdabcd: abcd bcda cdab dabc abcd, one of five again; the second text repeats the first, which does not count
    assert measure.repetition(["a b c d a b c d", "a b c d"]) == 1 / 6
    assert measure.repetition(["a b c"]) is None


def test_grounding_compares_the_first_letters_of_content_words():
    # content: hospitals, water, pump, friday (not we, will, give, the... "give" has 4 letters and is no common word)
    assert (
        measure.grounding(
            "We will give the hospitals water, and a pump.", ["The hospital has no waters."]
        )
        == 2 / 4
    )
    assert measure.grounding("We will.", ["The hospital."]) is None


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


def test_measure_of_one_dialogue():
    m = measure.measure(
        record(
            turns=["one two three", "one two three", "four"],
            agreed=True,
            final="Rosa brings water",
            endorse=[1.0, 4.0],
        )
    )
    assert m == {
        "ca_score": 3.0,
        "endorse_min": 1.0,
        "endorse_mean": 2.5,
        "endorse_first": 1.0,
        "endorse_second": 4.0,
        "agreed": 1.0,
        "agreed_at_once": 0.0,
        "turns_to_agreement": 3,
        "final_words": 3,
        "truncated": 0.0,
        "overlap": 1.0,
        "distinct_2": 4 / 6,
        "repetition": None,
        "grounding": 2 / 3,
    }
    none = measure.measure(record(final=None, reward=None, endorse=[None, 4.0]))
    assert (
        none["ca_score"] is None
        and none["endorse_min"] is None
        and none["endorse_second"] == 4.0
        and none["agreed"] is None
    )


def test_diversity_and_collapse():
    talk, same = (
        ["we could share the river", "no the farm needs more of it"],
        ["yes let us work together"] * 2,
    )
    lively = [
        record(turns=talk, final=f"{name} brings water on Friday") for name in ("Rosa", "Chen")
    ]
    dull = [
        record(
            turns=same, agreed=True, final="Together we grow and we grow and we grow and we grow"
        )
    ] * 2
    first, now = measure.diversity(lively), measure.diversity(dull)
    assert (
        first["distinct_openings"] == 1.0
        and now["distinct_openings"] == 0.5
        and now["overlap"] == 1.0
        and now["agreed_at_once"] == 1.0
    )
    assert first["grounding"] == (2 / 4 + 1 / 4) / 2 and now["grounding"] == 0.0
    assert measure.collapse(first, first) == ""
    warning = measure.collapse(now, first)
    for sign in ("overlap", "repetition", "agreed_at_once", "grounding"):
        assert f"({sign})" in warning
    assert "final_words" not in warning
    assert (
        measure.collapse(measure.diversity([record(final=None)]), first) == ""
    )  # nothing measured: nothing claimed


# ---- checks ----------------------------------------------------------------------------------------------------------------

CASES = {  # type: (check, texts that pass, texts that fail)
    "min_words": ({"value": 3}, ["one two three"], ["one two"]),
    "max_words": ({"value": 3}, ["one two three"], ["one two three four"]),
    "must_include": (
        {"words": ["tea", "window"]},
        ["Tea at the WINDOW."],
        ["The team at the window.", "tea"],
    ),
    "must_not_include": ({"words": ["blue"]}, ["Bluebells are nice."], ["So blue!"]),
    "lowercase": ({}, ["all small, 3 words"], ["One capital"]),
    "uppercase": ({}, ["WET FLOOR 2!"], ["WET floor", "123"]),
    "no_comma": ({}, ["No such sign."], ["One, two"]),
    "sentences": (
        {"value": 2},
        ["One. Two!", 'He said "No." Then he left.'],
        ["One.", "One. Two? Three."],
    ),
    "starts_with": ({"value": "First"}, ["First, wash."], ["Firstly, wash.", "At First"]),
    "ends_with": ({"value": "You can do it!"}, ["Go. You can do it!  "], ["You can do it! Go."]),
    "bullets": (
        {"value": 2},
        ["- one\n- two", "So:\n* a\n* b"],
        ["- one", "- a\n- b\n- c", "-a\n-b"],
    ),
    "json": (
        {"keys": ["name"]},
        ['{"name": 1}', '```json\n{"name": "x", "age": 2}\n```'],
        ['{"age": 2}', 'Here: {"name": 1}', "[1]", "name"],
    ),
    "language": (
        {"value": "es"},
        ["La gente va a la playa y come en el mar con los amigos."],
        [
            "People go to the beach and they eat with the others.",
            "Hola",
            "Les gens vont dans la mer et des enfants sont avec le chien.",
        ],
    ),
}


@pytest.mark.parametrize("kind", list(measure.CHECKS))
def test_each_check_passes_and_fails(kind):
    check, good, bad = CASES[kind]
    row = {"kind": "instruction", "checks": [{"type": kind, **check}]}
    assert [measure.passed(row, text) for text in good] == [[True]] * len(good)
    assert [measure.passed(row, text) for text in bad + [" "]] == [[False]] * (len(bad) + 1)


def test_each_check_of_the_shipped_set_is_known():
    rows = data_gen.load_jsonl(data_gen.DATA / "eval_general.jsonl")
    assert {
        c["type"] for row in rows if row["kind"] == "instruction" for c in row["checks"]
    } == set(measure.CHECKS)
    for row in rows:
        if row["kind"] == "exact":
            assert measure.passed(row, f"It is {row['answers'][0]}.") == [True]
            assert measure.passed(row, "I do not know.\n" + row["answers"][0]) == [False]


def test_exact_wants_whole_words():
    assert measure.passed({"kind": "exact", "answers": ["5", "five"]}, "The answer is 15.") == [
        False
    ]
    assert measure.passed({"kind": "exact", "answers": ["5", "five"]}, "**Five**") == [True]


# ---- numbers ---------------------------------------------------------------------------------------------------------------


def array(*values):
    return np.array(values, dtype=float)


def test_ranks_and_correlations_by_hand():
    assert measure.ranks(array(10, 30, 20, 20)).tolist() == [1, 4, 2.5, 2.5]
    assert measure.pearson(array(1, 2, 3), array(2, 4, 7)) == pytest.approx(5 / np.sqrt(2 * 38 / 3))
    assert measure.spearman(array(1, 2, 3, 4), array(1, 2, 4, 3)) == pytest.approx(
        1 - 6 * 2 / (4 * 15)
    )  # no ties: 1 - 6 sum d^2 / n (n^2 - 1)
    assert measure.spearman(array(1, 2, 3), array(9, 4, 1)) == pytest.approx(-1)


def test_auc_by_hand():
    # good: 3 and 1, others: 2 and 1; pairs won: 3>2, 3>1, 1<2, 1=1, so 2.5 of 4
    assert measure.auc(array(3, 1, 2, 1), array(1, 1, 0, 0)) == 2.5 / 4
    with np.errstate(invalid="ignore"):
        assert np.isnan(measure.auc(array(1, 2), array(1, 1)))


def test_kappa_by_hand():
    # ratings (0,0) (1,2) (2,1): mean square difference 2/3; if independent, over all nine pairs: (0+4+1 + 1+1+0 + 4+0+1) / 9 = 12/9
    assert measure.kappa(array(0, 1, 2), array(0, 2, 1)) == pytest.approx(1 - (2 / 3) / (12 / 9))
    assert measure.kappa(array(0.2, 4.9), array(0, 5)) == pytest.approx(1)  # whole points


def test_figure_of_a_known_case():
    row = figure("x", "A", [("s1", 0.0), ("s2", 1.0), ("s2", None)])
    assert row == {
        "figure": "x",
        "of": "A",
        "value": 0.5,
        "low": 0.0,
        "high": 1.0,
        "n": 2,
        "scenarios": 2,
        "missing": 1,
    }
    many = figure("x", "A", [(i, float(i % 2)) for i in range(400)], rounds=2000)
    assert many["value"] == 0.5 and (many["low"], many["high"]) == pytest.approx(
        (0.5 - 1.96 * 0.025, 0.5 + 1.96 * 0.025), abs=0.008
    )
    assert many == figure("x", "A", [(i, float(i % 2)) for i in range(400)], rounds=2000)  # seeded


def test_the_bootstrap_draws_scenarios():
    """Ten copies of each number on one scenario say no more than one."""
    one = figure("x", "A", [(i, float(i)) for i in range(20)])
    ten = figure("x", "A", [(i, float(i)) for i in range(20) for _ in range(10)])
    assert (
        (one["low"], one["high"]) == (ten["low"], ten["high"])
        and ten["n"] == 200
        and ten["scenarios"] == 20
    )


def test_figure_without_enough_to_say():
    assert figure("x", "A", [])["value"] is None and figure("x", "A", [("s", None)])["missing"] == 1
    one = figure("x", "A", [("s", 1.0), ("s", 2.0)])
    assert one["value"] == 1.5 and one["low"] is None and one["high"] is None
    constant = figure("x", "A", [(i, 1.0, float(i)) for i in range(5)], measure.pearson)
    assert constant["value"] is None and constant["low"] is None
    json.dumps(constant, allow_nan=False)


def test_win_rate_bookkeeping():
    assert [
        outcome(*v)
        for v in (
            ("A", "B"),
            ("B", "A"),
            ("tie", "tie"),
            ("A", "A"),
            ("B", "B"),
            ("A", "tie"),
            ("A", None),
            (None, None),
        )
    ] == [
        "win",
        "loss",
        "tie",
        "inconsistent",
        "inconsistent",
        "inconsistent",
        "missing",
        "missing",
    ]
    row = win_rate(
        "w",
        [
            ("s1", "win"),
            ("s1", "win"),
            ("s2", "loss"),
            ("s2", "tie"),
            ("s3", "inconsistent"),
            ("s3", "missing"),
        ],
    )
    assert row["value"] == pytest.approx(2 / 3, abs=1e-6) and (
        row["n"],
        row["scenarios"],
        row["pairs"],
    ) == (3, 2, 6)
    assert (row["wins"], row["losses"], row["ties"], row["inconsistent"], row["missing"]) == (
        2,
        1,
        1,
        1,
        1,
    )


def test_table_pairs_what_belongs_together():
    a = {
        ("s1", 0): {"ca_score": 3.0, "overlap": None},
        ("s2", 0): {"ca_score": None, "overlap": 0.5},
    }
    b = {
        ("s1", 0): {"ca_score": 1.0, "overlap": None},
        ("s2", 0): {"ca_score": 2.0, "overlap": 0.25},
    }
    rows = {(row["figure"], row["of"]): row for row in table({"A": a, "B": b})}
    assert list(rows) == [
        ("ca_score", "A"),
        ("ca_score", "B"),
        ("ca_score", "A - B"),
        ("overlap", "A"),
        ("overlap", "B"),
        ("overlap", "A - B"),
    ]
    assert (
        rows["ca_score", "A - B"]["value"] == 2.0
        and rows["ca_score", "A - B"]["n"] == 1
        and rows["ca_score", "A - B"]["missing"] == 1
    )
    assert (
        rows["overlap", "A"]["n"] == 1 and rows["overlap", "A"]["missing"] == 0
    )  # nothing was asked, so nothing is missing
