"""Benchmarks in the four formats that `sphere abilities` reads, small and made up, and a pico model taught on them.

Every second record is taught, so that scores are neither 0 nor 1.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from pico import pico

SUMS = ((2, 3), (4, 1), (6, 2), (1, 1), (7, 5), (3, 3))
SAID = ("Rome", "Paris", "the piano", "Leo Tolstoy", "French", "the guitar")
ASKED = ("where is it", "which city", "who plays what", "who wrote", "what language", "who was known")
# The last five records of Natural Questions are the examples.
EXAMPLES = tuple((f"who {number}", f"man {number}") for number in range(5))
FACTS = ("water boils", "Rome is in France", "apples sing", "Paris is a city", "a tower stands", "guitars eat")
TRUE = (True, False, False, True, True, False)


def solution(first: int, second: int) -> str:
    return f"It is {first}+{second}={first + second}."


def write_benchmarks(folder: Path) -> Path:
    """Write all four files, six records each that are asked."""
    folder.mkdir(parents=True, exist_ok=True)
    gsm8k = [
        {"question": f"{a} and {b}?", "answer": f"{solution(a, b)}\n#### {a + b}", "more": "not read"} for a, b in SUMS
    ]
    nq = [
        {
            "question": f"{question}?",
            "answer": [answer, "something else"],
            "output": [f"\n\nThey say {answer}, and so."],
        }
        for question, answer in zip(ASKED, SAID, strict=True)
    ]
    nq += [{"question": question, "answer": [answer], "output": ["-"]} for question, answer in EXAMPLES]
    boolq = [
        {"question": f"is it that {fact}", "title": "-", "passage": f"They say {fact}.", "answer": true}
        for fact, true in zip(FACTS, TRUE, strict=True)
    ]
    rte = [
        f'{number}\tThey say "{fact}.\t{fact}\t{"entailment" if true else "not_entailment"}'
        for number, (fact, true) in enumerate(zip(FACTS, TRUE, strict=True))
    ]
    for name, records in (("reasoning", gsm8k), ("OpenDomainQA", nq), ("ClosedDomainQA", boolq)):
        (folder / f"test-{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    (folder / "test-NLI.tsv").write_text("\n".join(["index\tsentence1\tsentence2\tlabel", *rte, ""]))
    return folder


def questions() -> dict[str, list[tuple[str, str]]]:
    """Task -> (prompt, right continuation) of every record."""
    shots = "".join(f"Q: {question}\nA: {answer}\n\n" for question, answer in EXAMPLES)
    asked = list(zip(ASKED, SAID, strict=True))
    facts = [(fact, true) for fact, true in zip(FACTS, TRUE, strict=True)]
    claims = [
        (
            f'Text: They say "{fact}.\nClaim: {fact}\nBy the text, is the claim true or false?\nAnswer:',
            f" {str(true).lower()}\n",
        )
        for fact, true in facts
    ]
    return {
        "gsm8k": [(f"Question: {a} and {b}?\nAnswer:", f" {solution(a, b)}\nQuestion:") for a, b in SUMS],
        "gsm8k_given": [
            (
                f"Question: {a} and {b}?\nSolution: {solution(a, b)}\nThe result, as a number, is",
                f" {a + b}.\n",
            )
            for a, b in SUMS
        ],
        "nq": [(f"{shots}Q: {question}?\nA:", f" {answer}.\n") for question, answer in asked],
        "nq_given": [
            (f"Passage: They say {answer}, and so.\nQuestion: {question}?\nAnswer:", f" it is {answer}, they say\n")
            for question, answer in asked
        ]
        + [(f"Passage: -\nQuestion: {question}\nAnswer:", "\n") for question, _ in EXAMPLES],
        "boolq": [
            (f"Passage: They say {fact}.\nQuestion: is it that {fact}? Yes or no?\nAnswer:", f" {word}.\n")
            for fact, word in ((fact, "Yes" if true else "No") for fact, true in facts)
        ],
        "rte": claims,
        "rte_written": claims,
    }


def taught(kind: str = "llama", steps: int = 40):
    """A pico model that knows what follows every second prompt, and its tokenizer."""
    model, tokenizer = pico(kind)
    texts = [pair for pairs in questions().values() for pair in pairs[::2]]
    rows = [(tokenizer(prompt)["input_ids"], tokenizer(prompt + answer)["input_ids"]) for prompt, answer in texts]
    width = max(len(whole) for _, whole in rows)
    ids, wanted = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
    for number, (prompt, whole) in enumerate(rows):
        ids[number, : len(whole)] = torch.tensor(whole)
        wanted[number, len(prompt) : len(whole)] = ids[number, len(prompt) : len(whole)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
        for _ in range(steps):
            optimizer.zero_grad()
            model(input_ids=ids, labels=wanted).loss.backward()
            optimizer.step()
    model.zero_grad()
    return model.requires_grad_(False).eval(), tokenizer
