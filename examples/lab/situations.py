"""What is true at each token of a question, in words: the situations that features are named after."""

from transformers import PreTrainedTokenizerFast

from examples.lab.swaps import subject_end
from examples.lab.world import Question


def tags_of(question: Question, tokenizer: PreTrainedTokenizerFast) -> list[list[tuple[str, str]]]:
    """Per position of the prompt the (kind, name) of every situation that holds there.

    Order of kinds is order of preference: what the subject is about, what is asked, what will be said, then the
    words themselves.
    """
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(question.prompt)["input_ids"])
    subject = subject_end(tokenizer, question) if question.subject else -1
    last = len(tokens) - 1
    result: list[list[tuple[str, str]]] = []
    for position, token in enumerate(tokens):
        tags: list[tuple[str, str]] = []
        if question.bridge and subject >= 0 and position >= subject:
            tags.append(("about", question.bridge))
        if position == last:
            tags += _asked(question)
        if position >= 1:
            tags.append(("token", f'"{token}"'))
            tags.append(("after", f'after "{tokens[position - 1]}"'))
        result.append(tags)
    return result


def _asked(question: Question) -> list[tuple[str, str]]:
    """Situations at the last word: the relation, the answer, and for sums the digits and magnitudes."""
    if question.family == "addition":
        return _sum(question)
    tags = [("relation", question.relation)] if question.family != "indirect object" else []
    return [*tags, ("family", question.family), ("say", f"say {question.answer.split()[0]}")]


def _sum(question: Question) -> list[tuple[str, str]]:
    a, b = map(int, question.subject.split("+"))
    total = a + b
    return [
        ("lookup", f"_{a % 10}+_{b % 10}"),
        ("sum ends", f"sum ends in {total % 10}"),
        ("first ends", f"first ends in {a % 10}"),
        ("second ends", f"second ends in {b % 10}"),
        ("sum about", f"sum {total // 10 * 10}–{total // 10 * 10 + 9}"),
        ("first about", f"first {a // 10 * 10}–{a // 10 * 10 + 9}"),
        ("second about", f"second {b // 10 * 10}–{b // 10 * 10 + 9}"),
        ("sum", f"sum = {total}"),
        ("family", "addition"),
    ]
