"""Questions about names that nobody has: what a transcoder is to do where the model itself is not sure."""

from dataclasses import replace

import numpy as np
from transformers import PreTrainedTokenizerFast

from examples.lab.vocabulary import CONTINUES
from examples.lab.world import Question


def invented(
    questions: list[Question], tokenizer: PreTrainedTokenizerFast, n: int, random: np.random.Generator
) -> list[Question]:
    """Of `questions`, `n` with another subject: the first pieces of one name and the last of another.

    No subject of theirs is among the names. Answers stay those of the question whose name comes first.
    """
    known = {question.subject for question in questions}
    pieces = {subject: tokenizer.tokenize(subject) for subject in sorted(known)}
    several = [question for question in questions if len(pieces[question.subject]) > 1]
    result: list[Question] = []
    while len(result) < n:
        first, last = (several[i] for i in random.integers(len(several), size=2))
        start, end = pieces[first.subject], pieces[last.subject]
        joined = start[: random.integers(1, len(start))] + end[random.integers(1, len(end)) :]
        name = " ".join(joined).replace(f" {CONTINUES}", "")
        if name not in known and tokenizer.tokenize(name) == joined:
            result.append(replace(first, prompt=first.prompt.replace(first.subject, name), subject=name))
    return result
