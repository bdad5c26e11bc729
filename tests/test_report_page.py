"""The page and its files: complete, self-contained, escaped, and never without a word about what is missing."""

import json
import math
import re
from html.parser import HTMLParser

import pytest
from report_runs import LAYERS, checkpoint, manifest, sample_report, write_run

from sphere_plugin.cli import main
from sphere_plugin.errors import CacheError, ConfigError, HostError
from sphere_plugin.files import read_json
from sphere_plugin.report import cases, page
from sphere_plugin.report.cases import Piece
from sphere_plugin.report.grid import csv_text
from sphere_plugin.report.page import Options, write_report

SECTIONS = ("table", "curves", "scatter", "bars", "paired", "neurons", "batches", "cases", "manifest")


class Reader(HTMLParser):
    """Collects tags with their attributes, ids, text, and the cells of the comparison tables."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for key, value in attrs if key == "id"]

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return sample_report(tmp_path_factory.getbasetemp() / "sample")


@pytest.fixture(scope="module")
def text(out):
    return (out / "report.html").read_text(encoding="utf-8")


def test_every_section_and_file_is_there(out, text):
    ids = Reader(text).ids
    assert {f"study{k}-{name}" for k in (1, 2) for name in SECTIONS} <= set(ids)
    names = {path.name for path in out.iterdir()}
    figures = ("curves", "scatter", "bars", "cosines", "tsne", "batches")
    assert {f"study1-{name}.{kind}" for name in figures for kind in ("png", "pdf")} <= names
    tables = ("table", "curves", "spearman", "regression", "bars", "paired", "batches", "scores")
    assert {f"study1-{name}.csv" for name in tables} <= names
    assert {"report.json", "study1-table.tex", "study2-table.tex"} <= names


def test_no_id_is_there_twice(text):
    ids = Reader(text).ids
    assert len(ids) == len(set(ids))


def test_nothing_is_loaded_from_anywhere(text):
    for tag, attributes in Reader(text).tags:
        assert tag not in ("iframe", "object", "embed", "base")
        for key in ("src", "href", "xlink:href", "data", "action"):
            assert attributes.get(key, "#").startswith(("#", "data:")), f"{tag} {key}={attributes[key][:60]}"
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert "default-src 'none'" in text


def test_what_a_model_writes_never_becomes_markup(text):
    reader = Reader(text)
    assert [attributes.get("type") for tag, attributes in reader.tags if tag == "script"] == ["application/json", None]
    assert not [tag for tag, _ in reader.tags if tag == "b"]
    assert "<script>alert(" not in text
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in text
    assert "A river & its <b>banks</b>" in "".join(reader.text)


def test_the_numbers_in_the_page_are_those_of_the_json(out, text):
    stored = read_json(out / "report.json")
    assert json.loads(re.search(r'id="numbers">(.*?)</script>', text, re.DOTALL).group(1)) == stored
    cells = [a for tag, a in Reader(text).tags if tag == "td" and "data-metric" in a]
    wanted = [
        (metric, value["mean"])
        for study in stored["studies"]
        for row in study["table"]
        for metric, value in row["values"].items()
    ]
    assert [(a["data-metric"], float(a["data-value"]) if "data-value" in a else None) for a in cells] == wanted


def test_the_json_is_what_the_checkpoints_say(out):
    stored = json.loads((out / "report.json").read_text())
    (row,) = [row for row in stored["studies"][1]["table"] if row["entry"] == "alphaedit"]
    path = out.parent / "runs" / "shared" / "alphaedit" / "checkpoints" / "000080.json"
    checkpoint = json.loads(path.read_text())
    scores = checkpoint["scores"]["efficacy_exact"]
    assert row["values"]["efficacy"]["mean"] == pytest.approx(sum(scores) / len(scores))
    assert row["values"]["perplexity"]["mean"] == pytest.approx(math.exp(checkpoint["scores"]["nll"]))
    before = json.loads(path.with_name("000000.json").read_text())
    changes = [checkpoint["energy"][name]["2"] / before["energy"][name]["2"] - 1 for name in LAYERS]
    assert row["values"]["energy"]["mean"] == pytest.approx(sum(changes) / 2)
    assert row["shared_targets"] is True
    assert row["method"] == "ALPHAEDIT †"


def test_shared_targets_and_the_papers_numbers_are_in_the_page(text):
    assert "† Targets were aimed once" in text
    assert "paper 52.89 ± 0.50" in text
    assert "15000 edits" in text


def test_the_same_runs_give_the_same_page(tmp_path):
    write_run(tmp_path / "memit", manifest("memit"), [checkpoint(10, {"efficacy_exact": [1.0, 0.0]})])
    pages = [write_report([tmp_path / "memit"], tmp_path / name).read_bytes() for name in ("a", "b")]
    assert pages[0] == pages[1]


def empty(folder):
    write_run(folder / "memit", manifest("memit"))


def one_point(folder):
    write_run(folder / "memit", manifest("memit"), [checkpoint(10, {"efficacy_exact": [1.0]})])


def only_before(folder):
    write_run(folder / "memit", manifest("memit"), [checkpoint(0, {"efficacy_exact": [1.0]}, {"w": {"2": 3.0}})])


def nothing_scored(folder):
    write_run(folder / "memit", manifest("memit"), [checkpoint(0, {}), checkpoint(10, {"efficacy_exact": [None]})])


def collapsed(folder):
    points = [checkpoint(0, {"efficacy_exact": [0.0, 0.0]}, {"w": {"2": 3.0}}, nll=2.0)]
    points += [checkpoint(k, {"efficacy_exact": [0.0, 0.0]}, {"w": {"2": None}}, nll=700.0 + k) for k in (10, 20, 30)]
    for entry in ("memit", "memit+sphere"):
        write_run(folder / entry, manifest(entry), points)


def bare(folder):
    write_run(folder / "memit", {"format": 1, "entry": "memit"}, [checkpoint(10, {"efficacy": [1.0, 0.5]})])


@pytest.mark.parametrize("build", [empty, one_point, only_before, nothing_scored, collapsed, bare])
def test_missing_pieces_are_said_and_never_a_crash(tmp_path, build):
    build(tmp_path / "runs")
    text = write_report([tmp_path / "runs"], tmp_path / "out").read_text()
    assert "not available: it has no journal" in text
    assert "no checkpoint has case studies" in text
    assert "not scored" in text or "not available: no checkpoint after an edit" in text


def test_a_damaged_run_is_named_and_nothing_is_written(tmp_path):
    one_point(tmp_path / "runs")
    (tmp_path / "runs" / "memit" / "checkpoints" / "000010.json").write_text("{")
    with pytest.raises(CacheError, match="000010.json"):
        write_report([tmp_path / "runs"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_writes_beside_the_runs(tmp_path, capsys):
    one_point(tmp_path)
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report" / "report.html")
    assert main(["report", str(tmp_path), "--at", "7"]) == 1
    assert "--at" in capsys.readouterr().err
    assert main(["report", str(tmp_path), "--neurons", "1"]) == 1
    assert main(["report", str(tmp_path / "nowhere")]) == 1


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "jinja2" else object())
    with pytest.raises(HostError, match=r"no jinja2.*sphere-plugin\[report\]"):
        page.check_libraries()


def test_without_texts_nothing_of_the_data_is_told_and_no_folder(tmp_path):
    case = {"prompt": "The tower is in", "subject": "tower", "target_new": "Rome", "text": "The tower is in Paris"}
    told = manifest("memit", settings={"data": "/home/somebody/facts.json", "guard": None, "layers": [3]})
    told["model"]["name"] = "/home/somebody/models/mine"
    write_run(tmp_path / "run", told, [checkpoint(10, {"efficacy_exact": [1.0, 0.0]}, cases=[case])])
    with_texts = write_report([tmp_path / "run"], tmp_path / "with").read_text()
    without = write_report([tmp_path / "run"], tmp_path / "without", Options(texts=False)).read_text()
    assert "The tower is in" in with_texts and "study1-cases" in with_texts
    assert "The tower" not in without and "study1-cases" not in without
    for text in (with_texts, without):
        assert "somebody" not in text and "mine, facts.json, after 10 edits" in text
        assert "&#34;data&#34;: &#34;facts.json&#34;" in text
    for path in (tmp_path / "without").iterdir():
        assert b"The tower" not in path.read_bytes() and b"somebody" not in path.read_bytes()


def test_the_scores_of_every_scored_edit_are_told(out):
    lines = (out / "study1-scores.csv").read_text().splitlines()
    assert lines[0].startswith("entry,order,edits,position,record,efficacy,")
    table = {one["entry"]: one for one in json.loads((out / "report.json").read_text())["studies"][0]["table"]}
    scores = [float(line.split(",")[5]) for line in lines[1:] if line.startswith("memit,") and line.split(",")[5]]
    value = table["memit"]["values"]["efficacy"]
    assert len(scores) == value["n"] * len(value["each_order"] or [0])
    assert sum(scores) / len(scores) == pytest.approx(value["mean"])


def test_options_are_checked():
    with pytest.raises(ConfigError, match="--neurons"):
        Options(neurons=1)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("A is B B.", (Piece("A is ", "prompt"), Piece("B", "target"), Piece(" "), Piece("B", "target"), Piece("."))),
        ("C\n\n  D", (Piece("C ⏎ D"),)),
        ("", ()),
    ],
)
def test_cases_are_cut_at_the_prompt_and_the_target(text, pieces):
    assert cases.marked(text, "A is ", " B") == pieces


def test_no_cell_of_a_csv_is_a_formula():
    assert csv_text(("a",), [["=1+1"], ["-0.5"], ["+2 %"], [None]]) == "a\n'=1+1\n-0.5\n'+2 %\n\"\"\n"
