"""Build ``sphere_plugin/data/facts.json`` from the hand-made tables in ``facts_source.yaml``.

The output follows CounterFact's schema, with one addition: ``neighborhood_targets`` gives the true answer
of every neighbourhood prompt.  Some subjects are held out: no record edits them, and neighbourhood prompts
are about them only, so that locality can still be measured after all records have been applied.

All "random" choices are orderings by a keyed SHA-256 digest, so the file depends on nothing but the tables
and ``SEED``: not on the Python version or on hash randomisation.

Usage::

    python tools/build_facts.py            # rewrite the file
    python tools/build_facts.py --check    # exit 1 if the file differs from what would be written
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "tools" / "facts_source.yaml"
OUTPUT = ROOT / "sphere_plugin" / "data" / "facts.json"

SEED = "sphere-facts-1"
PARAPHRASES = 2
GENERATIONS = 2
MIN_NEIGHBORS = 5
MAX_NEIGHBORS = 10
MIN_HELD_OUT = 11  # held-out subjects per relation; more than enough for MIN_NEIGHBORS
MAX_EDITED = 45  # edited subjects per relation
DISTINCT_PREFIX = 300
BATCH = 50


class SourceError(ValueError):
    """The YAML tables break one of the rules they have to obey."""


class StrictLoader(yaml.SafeLoader):
    """A safe YAML loader that refuses duplicate mapping keys instead of keeping the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        repeated = [key for key, count in Counter(keys).items() if count > 1]
        if repeated:
            raise SourceError(f"repeated key {repeated[0]!r}{node.start_mark}")
        return super().construct_mapping(node, deep=deep)


@dataclass(frozen=True)
class Relation:
    """One table: its templates, and what kind of thing its objects are."""

    id: str
    kind: str
    prompt: str
    paraphrases: tuple[str, ...]
    generation: tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """One true statement; ``true_answers`` holds every acceptable object, in lower case."""

    relation: Relation
    subject: str
    target: str
    true_answers: frozenset[str] = field(compare=False)

    @property
    def prompt(self) -> str:
        """The edit prompt with the subject filled in."""
        return self.relation.prompt.format(self.subject)


def rank(*parts: str) -> str:
    """A reproducible pseudo-random sort key for the given strings."""
    return hashlib.sha256("\x1f".join((SEED, *parts)).encode("utf-8")).hexdigest()


def shuffled(facts: Iterable[Fact], *label: str) -> list[Fact]:
    """The facts in a seeded order that depends on the label but not on the order given."""
    return sorted(facts, key=lambda fact: rank(*label, fact.relation.id, fact.subject))


def mentions(text: str, subject: str) -> bool:
    """Whether the text contains the subject, upper and lower case alike."""
    return subject.casefold() in text.casefold()


def require(condition: bool, message: str) -> None:
    """Raise ``SourceError`` unless the condition holds."""
    if not condition:
        raise SourceError(message)


def check_template(template: str) -> None:
    """A template has one slot and leaves off where the next word can follow after a space."""
    require(
        template.count("{}") == 1 and template.format("") == template.replace("{}", ""),
        f"template needs exactly one {{}}: {template!r}",
    )
    require(
        template == template.strip() and template[-1] not in ".?!:,",
        f"template must end so that a word can follow: {template!r}",
    )


def check_fact(fact: Fact) -> None:
    """A fact's strings are clean, and its prompts name the subject once and do not give the answer away."""
    where = f"{fact.relation.id} {fact.subject!r} -> {fact.target!r}"
    for text in (fact.subject, fact.target):
        require(isinstance(text, str) and bool(text) and text == text.strip(), f"bad string in {where}")
    for template in (fact.relation.prompt, *fact.relation.paraphrases, *fact.relation.generation):
        filled = template.format(fact.subject)
        require(filled.casefold().count(fact.subject.casefold()) == 1, f"subject not once in {filled!r}")
        require(not re.search(rf"\b{re.escape(fact.target)}\b", filled), f"answer given away in {filled!r}")


def load_facts(path: Path) -> list[Fact]:
    """Read and check the tables."""
    with path.open(encoding="utf-8") as stream:
        source = yaml.load(stream, Loader=StrictLoader)  # a SafeLoader subclass
    aliases = [frozenset(name.casefold() for name in group) for group in source["aliases"]]
    facts: list[Fact] = []
    for table in source["relations"]:
        relation = Relation(
            id=table["relation_id"],
            kind=table["kind"],
            prompt=table["prompt"],
            paraphrases=tuple(table["paraphrases"]),
            generation=tuple(table["generation"]),
        )
        templates = (relation.prompt, *relation.paraphrases, *relation.generation)
        require(len(set(templates)) == len(templates), f"{relation.id}: repeated template")
        require(len(relation.paraphrases) >= 3, f"{relation.id}: fewer than three paraphrases")
        require(len(relation.generation) >= GENERATIONS, f"{relation.id}: too few generation templates")
        for template in templates:
            check_template(template)
        also = table.get("also", {})
        rows = [(subject, target) for target, subjects in table["facts"].items() for subject in subjects]
        subjects = [subject for subject, _ in rows]
        require(len(set(subjects)) == len(subjects), f"{relation.id}: a subject occurs twice")
        require(set(also) <= {*subjects, *table["facts"]}, f"{relation.id}: unknown name in `also`")
        for subject, target in rows:
            answers = {name.casefold() for name in (target, *also.get(subject, []), *also.get(target, []))}
            for group in aliases:
                if answers & group:
                    answers |= group
            facts.append(Fact(relation, subject, target, frozenset(answers)))
            check_fact(facts[-1])
    pairs = Counter((fact.subject, fact.relation.id) for fact in facts)
    require(max(pairs.values()) == 1, "a (subject, relation) pair occurs twice")
    return facts


def order_facts(facts: Sequence[Fact]) -> list[Fact]:
    """A seeded shuffle in which a subject returns only after a while.

    The first ``DISTINCT_PREFIX`` facts have distinct subjects, and no subject occurs twice within ``BATCH``
    facts, as far as the tables allow.
    """
    ordered: list[Fact] = []
    queue = shuffled(facts, "order")
    while queue:
        position = len(ordered)
        if position == DISTINCT_PREFIX:  # spread what was put off over the rest
            queue = shuffled(queue, "rest")
        window = ordered if position < DISTINCT_PREFIX else ordered[-(BATCH - 1) :]
        taken = {fact.subject for fact in window}
        left = Counter(fact.subject for fact in queue)
        free = [i for i, fact in enumerate(queue) if fact.subject not in taken]
        # a subject that has several facts left must come up while there is still room between them
        repeated = [i for i in free if left[queue[i].subject] > 1]
        urgent = [i for i in repeated if left[queue[i].subject] * BATCH >= len(queue)]
        index = (urgent or free or [0])[0]
        ordered.append(queue.pop(index))
    return ordered


def draw_new_targets(facts: Sequence[Fact]) -> dict[Fact, str]:
    """Give every fact a false object of its own relation, using all of a relation's objects about equally."""
    new_targets: dict[Fact, str] = {}
    for relation_id in sorted({fact.relation.id for fact in facts}):
        table = [fact for fact in facts if fact.relation.id == relation_id]
        uses = Counter({target: 0 for target in sorted({fact.target for fact in table})})
        for fact in shuffled(table, "new target"):
            first_word = fact.target.split()[0].casefold()
            candidates = [
                target
                for target in uses
                if target.casefold() not in fact.true_answers
                and target.split()[0].casefold() != first_word
                and not mentions(fact.subject, target)
                and not mentions(target, fact.subject)
            ]
            require(bool(candidates), f"no counterfactual object for {fact.prompt!r}")
            chosen = min(candidates, key=lambda target: (uses[target], rank(fact.prompt, target)))
            uses[chosen] += 1
            new_targets[fact] = chosen
    return new_targets


def hold_out(facts: Sequence[Fact]) -> frozenset[str]:
    """Choose the subjects that are kept for neighbourhoods.

    Half of the subjects of every object that has several, then more where a relation has fewer than
    ``MIN_HELD_OUT`` held-out or more than ``MAX_EDITED`` edited subjects.  A subject is held out of all its
    relations, so subjects that are held out already count first.
    """
    held: set[str] = set()

    def grow(group: Sequence[Fact], wanted: int) -> None:
        missing = wanted - sum(fact.subject in held for fact in group)
        free = [fact.subject for fact in shuffled(group, "held out") if fact.subject not in held]
        held.update(free[: max(missing, 0)])

    relation_ids = sorted({fact.relation.id for fact in facts})
    tables = [[fact for fact in facts if fact.relation.id == relation_id] for relation_id in relation_ids]
    for table in tables:
        for target in sorted({fact.target for fact in table}):
            group = [fact for fact in table if fact.target == target]
            grow(group, len(group) // 2)
    for table in tables:
        grow(table, max(MIN_HELD_OUT, len(table) - MAX_EDITED))
    return frozenset(held)


def neighbors(fact: Fact, held_out: Sequence[Fact], new_target: str) -> list[Fact]:
    """Held-out facts about other subjects, which the edit must leave alone.

    First those of the same relation with the same object, then those of other relations with that object
    (both up to ``MAX_NEIGHBORS``); failing that, other facts of the relation, up to ``MIN_NEIGHBORS``.
    Where the new target happens to be right for another subject, that subject is no use as a neighbour.
    """
    others = [
        other
        for other in held_out
        if not mentions(other.prompt, fact.subject) and new_target.casefold() not in other.true_answers
    ]
    same_kind = [o for o in others if o.relation.kind == fact.relation.kind and o.target == fact.target]
    same_relation = [o for o in same_kind if o.relation == fact.relation]
    cross_relation = [o for o in same_kind if o.relation != fact.relation]
    chosen = [*shuffled(same_relation, fact.prompt), *shuffled(cross_relation, fact.prompt)][:MAX_NEIGHBORS]
    if len(chosen) < MIN_NEIGHBORS:
        rest = [o for o in others if o.relation == fact.relation and o.target != fact.target]
        chosen += shuffled(rest, fact.prompt)[: MIN_NEIGHBORS - len(chosen)]
    require(len(chosen) >= MIN_NEIGHBORS, f"too few neighbours for {fact.prompt!r}")
    return chosen


def pick_templates(fact: Fact, templates: Sequence[str], count: int) -> list[str]:
    """Fill the subject into ``count`` of the templates, drawn with the seed."""
    drawn = sorted(templates, key=lambda template: rank(fact.subject, template))[:count]
    return [template.format(fact.subject) for template in drawn]


def build_records(facts: Sequence[Fact]) -> list[dict[str, Any]]:
    """All records, in their final order."""
    held = hold_out(facts)
    edited = [fact for fact in facts if fact.subject not in held]
    held_out = [fact for fact in facts if fact.subject in held]
    names = re.compile("|".join(rf"\b{re.escape(fact.subject)}\b" for fact in edited), re.IGNORECASE)
    for fact in held_out:
        require(not names.search(fact.prompt), f"an edited subject occurs in {fact.prompt!r}")
    new_targets = draw_new_targets(edited)
    records = []
    for case_id, fact in enumerate(order_facts(edited)):
        nearby = neighbors(fact, held_out, new_targets[fact])
        records.append(
            {
                "case_id": case_id,
                "requested_rewrite": {
                    "prompt": fact.relation.prompt,
                    "relation_id": fact.relation.id,
                    "target_new": {"str": new_targets[fact]},
                    "target_true": {"str": fact.target},
                    "subject": fact.subject,
                },
                "paraphrase_prompts": pick_templates(fact, fact.relation.paraphrases, PARAPHRASES),
                "neighborhood_prompts": [other.prompt for other in nearby],
                "neighborhood_targets": [other.target for other in nearby],
                "attribute_prompts": [],
                "generation_prompts": pick_templates(fact, fact.relation.generation, GENERATIONS),
            }
        )
    return records


def render(records: Sequence[dict[str, Any]]) -> str:
    """The records as a JSON array, one record a line."""
    return "[\n" + ",\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n]\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description="Build the facts data set from its YAML tables.")
    parser.add_argument("--check", action="store_true", help="compare with the file on disk, write nothing")
    parser.add_argument("--source", type=Path, default=SOURCE, help="the YAML tables")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the JSON file")
    args = parser.parse_args(argv)

    records = build_records(load_facts(args.source))
    text = render(records)
    if not args.check:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text, encoding="utf-8", newline="\n")
        print(f"wrote {len(records)} records to {args.output}")
        return 0
    if not args.output.is_file() or args.output.read_text(encoding="utf-8") != text:
        print(f"{args.output} is out of date: run python tools/build_facts.py")
        return 1
    print(f"{args.output} is up to date ({len(records)} records)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
