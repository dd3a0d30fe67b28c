"""What the documents say about the code is true of the code.

Tables of tests, names of functions, flags in commands, the map of the files, the contracts.
"""

import ast
import functools
import graphlib
import re
from pathlib import Path

import bench
import pytest
import runs

import eval as evaluation
import progress
from settings import RECIPES, Settings

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
TABLE = (TESTS / "README.md").read_text(encoding="utf-8")
FAULTS = 50  # rows of the list of faults
CONTRACTS = 14


@functools.cache
def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def names_in(path):
    """Names of all functions, methods and classes of a file."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name for node in ast.walk(parsed(path)) if isinstance(node, kinds)}


def has(path, name):
    """Whether a file has a function or class; where there is no such file, whether any has."""
    paths = [path] if path.exists() else path.parent.glob("*.py")
    return any(name in names_in(p) for p in paths)


# ---- tests/README.md -----------------------------------------------------------------------------


def rows_of_the_table():
    """(row number, file, test) of each row; the last two are empty where there is no test yet."""
    rows = []
    for line in TABLE.splitlines():
        cells = [cell.strip() for cell in line.replace(r"\|", "").strip("|").split("|")]
        if re.fullmatch(r"c?\d+", cells[0]):
            number, _, file, test = cells
            named = re.fullmatch(r"`(\w+)`(?: \(slow\))?", test)
            assert named or test == "none yet", line
            rows.append((number, file.strip("`"), named[1] if named else ""))
    return rows


def test_every_row_has_a_place_in_the_table():
    faults = [str(n + 1) for n in range(FAULTS)]
    contracts = [f"c{n + 1}" for n in range(CONTRACTS)]
    assert list(dict.fromkeys(number for number, _, _ in rows_of_the_table())) == faults + contracts


def test_every_test_of_the_table_exists():
    named = [(file, test) for _, file, test in rows_of_the_table() if test]
    assert len(named) > FAULTS
    assert [row for row in named if not has(TESTS / row[0], row[1])] == []


# ---- README.md -----------------------------------------------------------------------------------


def test_every_function_that_the_readme_names_exists():
    named = re.findall(r"`(\w+)\.(\w+)(?:\.(\w+))?(?:\(\))?`", README)
    named = [row for row in named if row[1] not in ("py", "md", "txt", "jsonl", "json")]
    assert len(named) >= 15
    for module, name, method in named:
        path = ROOT / f"{module}.py"
        assert has(path, name), f"{module}.{name}"
        assert not method or has(path, method), f"{module}.{name}.{method}"


def modules():
    """The modules of this repository."""
    return {path.stem for path in ROOT.glob("*.py")}


def imports_of(name):
    """Those that a module imports, at its top or in a function."""
    found = set()
    for node in ast.walk(parsed(ROOT / f"{name}.py")):
        if isinstance(node, ast.ImportFrom):
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & modules()


def test_imports_run_one_way():
    order = graphlib.TopologicalSorter({name: imports_of(name) for name in modules()})
    order.prepare()  # raises CycleError


@pytest.mark.skipif("attention" not in modules(), reason="the house is being rebuilt")
def test_the_map_is_in_reading_order():
    """It names all modules, each behind those that it imports."""
    section = README.split("## The files")[1].split("\n## ")[0]
    order = re.findall(r"^\| `(\w+)\.py` \|", section, re.MULTILINE)
    assert len(order) == len(set(order))
    assert set(order) == modules()
    for name in order:
        assert imports_of(name) <= set(order[: order.index(name)]), name


def flags_of_the_code():
    """Every flag of every command: the fields that are made by `option`."""
    flags = set()
    for path in [*ROOT.glob("*.py"), TESTS / "bench.py", TESTS / "workload.py"]:
        fields = re.findall(r"^    (\w+): \w+ = option\(", path.read_text("utf-8"), re.MULTILINE)
        flags |= {"--" + name.replace("_", "-") for name in fields}
    return flags


@pytest.mark.parametrize("document", ["README.md", "RESULTS.md", "data/README.md"])
def test_every_flag_that_a_document_names_exists(document):
    others = {"--nproc_per_node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint"}  # torchrun
    text = (ROOT / document).read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) - others
    assert named <= flags_of_the_code()


def test_every_row_that_the_results_explain_exists():
    section = RESULTS.split("## What a row of eval.py says")[1].split("\n## ")[0]
    code = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("*.py"))
    cells = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    figures = re.findall(r"`(\w+)`", " ".join(cells))
    assert len(figures) >= 15
    for figure in figures:  # eval.py joins win_rate_ and the question
        assert f'"{figure.removeprefix("win_rate_")}"' in code, figure


def test_the_readme_is_a_front_page():
    assert len(README.splitlines()) <= 200
    assert len(README.encode()) <= 14 * 1024


def test_every_link_leads_somewhere():
    for folder, text in ((ROOT, README), (TESTS, TABLE)):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", text):
            assert (folder / target).exists(), target


# ---- contracts that no other test holds ----------------------------------------------------------

FLAGS = """recipe model judge_url judge_model judge_mode steps out seed lr scenarios_per_step
group_size max_turns turn_tokens final_tokens context_turns train_tokens agreement temperature top_p
beta dtype scenarios save_every resume fsdp lora_rank"""


def test_train_keeps_its_flags_and_recipes():
    assert set(FLAGS.split()) <= set(Settings.__dataclass_fields__)
    assert {"debug", "paper", "single", "warm-start"} <= set(RECIPES)
    choices = {
        "judge_mode": {"auto", "expect", "json", "rm"},
        "train_tokens": {"dialogue", "final", "both"},
        "agreement": {"judge", "marker", "none"},
    }
    for name, wanted in choices.items():
        assert wanted <= set(Settings.__dataclass_fields__[name].metadata["choices"])


def test_eval_keeps_its_commands():
    assert {"conflict", "open", "general", "cross", "audit"} <= set(evaluation.COMMANDS)


def test_a_person_is_told_that_texts_are_cut_off():
    """PITFALLS 21: everything truncated, the reward flat, nobody told."""
    row = {**progress.summary([]), "step": 1, "no_evidence": False, "skipped": False}
    row["judge_missing"] = {}

    def told(share):
        return progress.warnings({**row, "truncated_rate": share}, 12, row)

    assert told(0.5) == told(None) == []
    (warning,) = told(0.51)
    assert "more than half of the texts were cut off" in warning
    assert "--turn-tokens" in warning


def test_the_benchmark_prints_its_three_lines(tmp_path, capsys):
    model = runs.saved_model(tmp_path / "tiny")
    flags = "--scenarios 1 --group 2 --turns 2 --turn-tokens 4 --final-tokens 4 --repeats 1"
    bench.main(["--model", model, *flags.split()])
    said = capsys.readouterr().out
    for phase in ("play", "learn", "step"):
        assert re.search(rf"^{phase} +\d+\.\d s\b", said, re.MULTILINE)
