"""`sphere audit` on runs of pico models."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil

import pytest
import torch
from pico_runs import place, settings

from sphere_plugin.cli import main
from sphere_plugin.errors import CacheError, ConfigError, RequestError
from sphere_plugin.evaluation.audits import EDITED, NEIGHBOURS, grown, lowered, path_of, read_audit, read_audits
from sphere_plugin.evaluation.paraphrases import source_of
from sphere_plugin.evaluation.responses import Sampling
from sphere_plugin.files import read_json, write_json
from sphere_plugin.journaling import run_lock
from sphere_plugin.journaling.undoing import undo
from sphere_plugin.sequence.audit import Options, RunAudit
from sphere_plugin.sequence.audit_command import run, table
from sphere_plugin.sequence.runner import start

ENTRIES = ("memit", "memit+sphere")
SUBJECTS = ("The Eiffel Tower", "The Colosseum", "Leo Tolstoy", "Thelonious Monk", "Jimi Hendrix", "Toyota Camry")
QUICK = {"sampling": Sampling(samples=2, tokens=3, temperature=1.0), "facts": 3}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """Two entries on six facts with neighbours, in batches of two."""
    folder = tmp_path_factory.mktemp("audit")
    facts = [
        {
            "prompt": f"What is known of {subject}",
            "subject": subject,
            "target_new": target,
            "rephrase_prompt": f"{subject} is",
            "locality_prompt": f"What is known of {SUBJECTS[k - 1]}" if k % 2 else "Water is",
            "locality_ground_truth": "Rome",
        }
        for k, (subject, target) in enumerate(zip(SUBJECTS, ("piano", "Toyota", "Rome") * 2, strict=True))
    ]
    data = folder / "facts.json"
    data.write_text(json.dumps(facts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPHERE_PLUGIN_CACHE", str(folder / "cache"))
        whole = settings(place(folder), ",".join(ENTRIES), data=str(data), edits=6, checkpoints=[6], order=1)
        for entry in ENTRIES:
            start(whole.for_entry(entry), folder / "runs" / entry)
    return folder / "runs"


@pytest.fixture
def runs(comparison, tmp_path):
    """A copy of them."""
    return shutil.copytree(comparison, tmp_path / "runs")


class Embed:
    """Vectors of texts by a hash; counts what it embeds, and ends a run where it is told to."""

    def __init__(self, until: int | None = None) -> None:
        self.calls, self.until = 0, until

    def __call__(self, texts):
        self.calls += 1
        if self.until is not None and self.calls > self.until:
            raise KeyboardInterrupt
        seeds = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:7]) for text in texts]
        return torch.stack([torch.randn(8, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def audit(folder, **options) -> RunAudit:
    told = Options(**{**QUICK, **options})
    return RunAudit(folder, told, source_of(told.paraphrases))


def audited(folder, embed=None, others=(), **options) -> RunAudit:
    one = audit(folder, **options)
    one.measure(embed or Embed(), others)
    return one


def content(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "audit").glob("*.json"))}


def test_a_run_before_its_edits_and_after(runs) -> None:
    embed = Embed()
    one = audited(runs / "memit", embed)
    assert embed.calls == 6  # three facts, twice
    assert sorted(content(runs / "memit")) == ["000000.json", "000006.json"]
    before, after = (read_audit(path_of(runs / "memit", edits)) for edits in (0, 6))
    assert before.weights == one.journal.fingerprint(0)
    assert after.weights == one.journal.fingerprint(3)
    assert [m.probe for m in before.edited] == [m.probe for m in after.edited]
    assert len(before.edited) == 3
    assert [m.uncertainty for m in before.edited] != [m.uncertainty for m in after.edited]
    assert not before.neighbours
    told = json.loads(content(runs / "memit")["000006.json"])
    first = told["edited"][0]
    assert first["uncertainty"] == (first["aleatoric"] + first["epistemic"]) / 2
    assert first["source"] == "templates of sentences"
    assert len(first["prompts"]) == len(first["written"]) == 6
    assert told["settings"]["temperature"] == 1.0


def test_the_same_audit_twice_is_the_same_to_the_byte(runs, comparison, tmp_path) -> None:
    other = shutil.copytree(comparison / "memit", tmp_path / "other")
    audited(runs / "memit", around=True, at=(2, 6))
    audited(other, around=True, at=(2, 6))
    assert content(runs / "memit") == content(other)


def test_an_audit_that_was_stopped_goes_on(runs, comparison, tmp_path) -> None:
    whole = audited(shutil.copytree(comparison / "memit", tmp_path / "whole"), around=True)
    wanted = sum(len(one) for probes in whole.probes.values() for one in probes.values())
    with pytest.raises(KeyboardInterrupt):
        audited(runs / "memit", Embed(until=4), around=True)
    assert audit(runs / "memit", around=True).due
    embed = Embed()
    one = audited(runs / "memit", embed, around=True)
    assert embed.calls == wanted - 4
    assert content(runs / "memit") == content(tmp_path / "whole")
    assert not one.due


def test_the_unedited_model_of_a_comparison_is_measured_once(runs) -> None:
    first = audited(runs / "memit")
    embed = Embed()
    second = audited(runs / "memit+sphere", embed, [first])
    assert embed.calls == 3
    assert first.audits[0] == second.audits[0]
    one, other = first.audits[6], second.audits[6]
    assert lowered(first.audits[0], one, other, EDITED).n == 3
    parts = grown(first.audits[0], one, EDITED)
    before, after = ([m.uncertainty.total for m in a.edited] for a in (first.audits[0], one))
    assert parts["total"].change.value == pytest.approx(sum(after) / sum(before) - 1)
    assert parts["aleatoric"].before == pytest.approx(sum(m.uncertainty.aleatoric for m in first.audits[0].edited) / 3)


def test_more_facts_join_those_that_are_there(runs) -> None:
    audited(runs / "memit")
    embed = Embed()
    one = audited(runs / "memit", embed, facts=5)
    assert embed.calls == 4
    assert len(one.audits[0].edited) == len(one.audits[6].edited) == 5


def test_earlier_moments_ask_what_was_edited_by_then(runs) -> None:
    one = audited(runs / "memit", at=(2, 6), facts=2)
    known = [m.probe.record for m in one.audits[2].edited]
    assert set(known) == {fact["record"] for fact in one.journal.record(1)["facts"]}
    union = {m.probe.record for edits in (2, 6) for m in one.audits[edits].edited}
    assert {m.probe.record for m in one.audits[0].edited} == union
    assert grown(one.audits[0], one.audits[2], EDITED)["total"].change.n == 2


def test_neighbours_are_asked_as_well(runs) -> None:
    one = audited(runs / "memit", around=True, facts=6)
    assert len(one.audits[6].neighbours) == 6
    assert grown(one.audits[0], one.audits[6], NEIGHBOURS)["total"].change.n == 6
    assert "neighbours" in "\n".join(table([one], ()))
    with pytest.raises(ConfigError, match="move .* away"):
        audit(runs / "memit", sampling=Sampling(samples=3, tokens=3, temperature=1.0))


def test_the_order_of_edits_does_not_change_who_is_asked(runs) -> None:
    one, other = audit(runs / "memit"), audit(runs / "memit", sampling=Sampling(2, 3, 1.0, seed=5))
    records = [probe.record for probe in one.probes[6][EDITED]]
    assert len(set(records)) == 3
    assert records != [probe.record for probe in other.probes[6][EDITED]]


def test_the_records_paraphrases_and_a_users_file(runs, tmp_path) -> None:
    one = audit(runs / "memit", paraphrases="record")
    (first, *_) = one.probes[6][EDITED]
    assert first.source == "the record"
    assert first.prompts == (first.prompt, f"{first.subject} is")
    file = tmp_path / "mine.json"
    ways = [{"level": level, "rephrase": f"Way {level} to ask for Tolstoy"} for level in (1, 2)]
    file.write_text(json.dumps([{"question": "What is known of Leo Tolstoy", "generated_questions": ways}]))
    (mine,) = audit(runs / "memit", paraphrases=str(file)).probes[6][EDITED]
    assert mine.source == "file mine.json"
    assert mine.subject == "Leo Tolstoy"
    file.write_text(json.dumps([{"question": "Who?", "generated_questions": ways}]))
    with pytest.raises(ConfigError, match="paraphrases of an edited fact"):
        audit(runs / "memit", paraphrases=str(file))


def test_wrong_moments_files_and_audits_are_refused(runs, tmp_path) -> None:
    with pytest.raises(ConfigError, match="nearest are 2 and 4"):
        audit(runs / "memit", at=(3,))
    with pytest.raises(ConfigError, match="--at"):
        Options(at=(0,))
    with pytest.raises(ConfigError, match="--device"):
        Options(device="nonsense")
    with pytest.raises(ConfigError, match="--device: got 'meta', expected a device that holds values"):
        Options(device="meta")
    with pytest.raises(ConfigError, match="--data"):
        audit(runs / "memit", data=tmp_path / "none.json")
    other = tmp_path / "other.json"
    other.write_text("[]")
    with pytest.raises(CacheError, match="as in the manifest"):
        audit(runs / "memit", data=other)
    one = audited(runs / "memit", facts=1)
    path = path_of(runs / "memit", 6)
    write_json(path, {**read_json(path), "weights": "0" * 32})
    with pytest.raises(CacheError, match="taken back"):
        audit(runs / "memit", facts=1)
    write_json(path, {**read_json(path), "edited": [{}]})
    with pytest.raises(CacheError, match="as this package wrote it"):
        read_audits(one.folder)


def test_sphere_is_compared_within_its_comparison(runs, tmp_path) -> None:
    """Two orders of the same entries below one folder."""
    for order in ("one", "two"):
        shutil.copytree(runs, tmp_path / "orders" / order)
    ended = [
        audited(tmp_path / "orders" / order / entry) for order in ("one", "two") for entry in ("memit", "memit+sphere")
    ]
    pairs, alone = _pairs_of(ended), _pairs_of(ended[:2])
    assert pairs == alone * 2 and len(alone) == 1
    code, lines = run(_arguments(tmp_path / "orders", facts=3, samples=2, tokens=3, paraphrases="templates"))
    assert code == 0 and [line for line in lines if line.startswith("SPHERE on MEMIT (one/memit): ΔU")]
    rows = [line for line in lines if line.startswith("MEMIT")]
    folders = [f"{order}/{entry}" for order in ("one", "two") for entry in ("memit", "memit+sphere")]
    assert [row[row.index("(") + 1 : row.index(")")] for row in rows] == folders
    assert len({len(row) for row in rows}) == 1


def test_sphere_is_compared_with_the_run_that_has_most_settings_in_common(runs) -> None:
    """Another run of the method alone beside it, whose learning rate is another one."""
    expected = _pairs_of([audited(runs / entry) for entry in ENTRIES])
    for name, changes in (("other", {"v_lr": 0.1}), ("zother", {"v_lr": 0.2})):
        folder = shutil.copytree(runs / "memit", runs / name)
        manifest = read_json(folder / "manifest.json") | {"label": name}
        manifest["method"]["hparams"] |= changes
        write_json(folder / "manifest.json", manifest)
    names = ("other", *ENTRIES, "zother")
    assert _pairs_of([audited(runs / name) for name in names]) == expected != []


def _pairs_of(runs) -> list[str]:
    return [line for line in table(runs, ()) if line.startswith("SPHERE on")]


def test_edits_are_not_taken_back_while_they_are_audited(runs) -> None:
    audited(runs / "memit")
    with run_lock(runs / "memit" / "audit"), pytest.raises(CacheError, match="held by process"):
        undo(runs / "memit", 2)
    assert audit(runs / "memit").edits == 6
    undo(runs / "memit", 2)
    assert audit(runs / "memit").edits == 2


FLAGS = ("--facts", "2", "--samples", "2", "--tokens", "3", "--temperature", "1")


def test_the_command(runs, capsys) -> None:
    """With MiniLM; the second time nothing is measured."""
    assert main(["audit", str(runs), "--neighbours", *FLAGS]) == 0
    said = capsys.readouterr().out
    rows = {line[:28].strip(): line[28:].split() for line in said.splitlines()}
    assert rows["edited facts"][:2] == ["edits", "prompts"]
    assert rows["MEMIT"][:2] == ["6", "2"]
    before = read_audit(path_of(runs / "memit", 0))
    change = grown(before, read_audit(path_of(runs / "memit", 6)), EDITED)["total"]
    assert f"{change.before:.4f}     {change.after:.4f}" in said
    assert f"{change.change.value:+.3f}" in said
    assert said.count("SPHERE on MEMIT: ΔU") == 2
    assert "paraphrases of edited facts: templates of sentences (2)" in said
    first = content(runs / "memit")
    assert before.settings["embedder"] == "minilm"
    assert main(["audit", str(runs), "--neighbours", *FLAGS]) == 0
    assert capsys.readouterr().out == said
    assert content(runs / "memit") == first


def test_what_the_command_refuses(runs, tmp_path, capsys) -> None:
    for flags, told in (
        (("--at", "x"), "numbers with commas"),
        (("--at", "8"), "a number up to 6 edits"),
        (("--top-p", "2"), "top_p"),
        (("--paraphrases", str(tmp_path / "none.json")), "templates, record, or a file"),
    ):
        assert main(["audit", str(runs), *flags]) == 1
        assert told in capsys.readouterr().err
    assert main(["audit", str(tmp_path / "nowhere")]) == 1
    assert "manifest.json" in capsys.readouterr().err
    assert not list(runs.glob("*/audit/*.json"))


def test_a_model_that_gives_no_numbers_leaves_the_others_alone(runs, capsys, monkeypatch) -> None:
    """One entry's weights are not numbers any more."""
    from sphere_plugin.journaling.revisit import Revisited

    go = Revisited.go

    def broken(self, edits):
        go(self, edits)
        if edits and self.manifest["entry"] == "memit":
            with torch.no_grad():
                next(iter(self.weights.values())).fill_(float("nan"))

    monkeypatch.setattr(Revisited, "go", broken)
    assert main(["audit", str(runs), *FLAGS]) == 1
    said = capsys.readouterr().out
    assert "MEMIT: logits: got 'numbers that are not finite'" in said
    assert "MEMIT + SPHERE" in said
    assert not path_of(runs / "memit", 6).exists()
    assert path_of(runs / "memit+sphere", 6).exists()


def test_an_entry_that_ended_early(runs) -> None:
    one, other = audit(runs / "memit", at=(6,)), audit(runs / "memit+sphere", at=(6, 8))
    assert (one.moments, other.moments) == ([6], [6])
    assert "MEMIT + SPHERE: 6 edits made" in table([one, other], (6, 8))


def _arguments(target, **changes) -> argparse.Namespace:
    names = {"at": None, "facts": 1, "neighbours": False, "paraphrases": "record", "seed": 0}
    names |= {"samples": 2, "tokens": 2, "temperature": 1.0, "top_p": 0.9, "embedder": "minilm"}
    names |= {"data": None, "model": None, "device": "cpu"}
    return argparse.Namespace(target=target, **names | changes)


def test_run_takes_what_the_parser_gives(runs) -> None:
    code, lines = run(_arguments(runs / "memit", at="2"))
    assert code == 0
    assert lines[-1] == f"sphere report {runs / 'memit'}"
    with pytest.raises(RequestError):
        run(_arguments(runs / "memit", at="2", paraphrases="none.json"))
