"""What is true at each token of a question, in words: the situations that features are named after."""

from transformers import PreTrainedTokenizerFast

from examples.lab.swaps import subject_end
from examples.lab.world import Question

KINDS = (
    "place", "about", "with", "relation", "asked", "lookup", "sum ends", "first ends", "second ends", "sum range",
    "sum about", "first about", "second about", "sum", "family", "say", "number", "token", "after", "text",
)  # fmt: skip
"""In order of preference: what the subject is about, what is asked, what will be said, then the words themselves."""
ASKED_OF = {
    "state fact": "a state", "two-hop state": "a state", "country fact": "a country", "two-hop country": "a country",
    "three-hop": "a country", "city of state": "a city", "city then state": "a city", "city of country": "a city",
    "city then country": "a city", "birthplace": "an inventor", "two-hop invention": "an inventor",
}  # fmt: skip
"""Whose relation is asked, by family."""
TEXTS = {
    "addition": "in a sum", "digits": "in a digits question", "opposites english": "in opposites",
    "opposites french": "in French", "opposites spanish": "in Spanish", "indirect object": "in a story",
}  # fmt: skip
"""What texts that are unlike all others are called, by family."""


def tags_of(question: Question, tokenizer: PreTrainedTokenizerFast) -> list[list[tuple[str, str]]]:
    """Per position of the prompt the (kind, name) of every situation that holds there; none where all prompts begin."""
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(question.prompt)["input_ids"])
    subject = subject_end(tokenizer, question) if question.subject else -1
    people = (question.answer, question.relation) if question.family == "indirect object" else ()
    result: list[list[tuple[str, str]]] = [[]]
    for position, token in enumerate(tokens[1:], start=1):
        tags = [("with", f"with {name}") for name in people if name in tokens[1 : position + 1]]
        if question.bridge and 0 < subject <= position:
            at_subject = position == subject
            tags.append(("place", question.bridge) if at_subject else ("about", f"about {question.bridge}"))
        if position == len(tokens) - 1:
            tags += _asked(question)
        if token.isdigit():
            tags.append(("number", f"number {_ten(int(token))}"))
        tags += [("token", f'"{token}"'), ("after", f'after "{tokens[position - 1]}"')]
        if question.family in TEXTS:
            tags.append(("text", TEXTS[question.family]))
        result.append(tags)
    return result


def _asked(question: Question) -> list[tuple[str, str]]:
    """Situations at the last word: the relation, the answer, and for sums the digits and magnitudes."""
    family, relation = question.family, question.relation
    if family == "addition":
        return _sum(question)
    tags = [("family", family), ("say", f"say {question.answer.split()[0]}")]
    if family != "indirect object":
        tags.append(("relation", relation))
    if family in ASKED_OF:
        by_birth = relation == "country" and family in ("two-hop invention", "three-hop")
        tags.append(("asked", f"{relation} of {'a birthplace' if by_birth else ASKED_OF[family]}"))
    return tags


def _sum(question: Question) -> list[tuple[str, str]]:
    a, b = map(int, question.subject.split("+"))
    total = a + b
    ten = total // 10 * 10
    return [
        ("lookup", f"_{a % 10}+_{b % 10}"),
        ("sum ends", f"sum ends in {total % 10}"),
        ("first ends", f"first ends in {a % 10}"),
        ("second ends", f"second ends in {b % 10}"),
        *(("sum range", f"sum {low}–{low + 19}") for low in (ten - 10, ten) if low >= 0),
        ("sum about", f"sum {_ten(total)}"),
        ("first about", f"first {_ten(a)}"),
        ("second about", f"second {_ten(b)}"),
        ("sum", f"sum = {total}"),
        ("family", "addition"),
    ]


def _ten(number: int) -> str:
    """The numbers that differ in the last digit only."""
    ten = number // 10 * 10
    return f"{ten}–{ten + 9}"
