"""What a transcoder is evaluated on: prompts, or text; and which prompts are traced for the scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tracer.errors import TraceError
from tracer.replacement import ReplacementModel
from transcoders.corpus import Corpus, open_corpus
from transcoders.families import longest_context
from transcoders.passages import Passages, passages_of_corpus, passages_of_prompts

CONTEXT = 128
"""Tokens of a sequence, where the model reads so many."""
OPENING = 32
"""Tokens of a document that are traced."""


@dataclass(frozen=True)
class Material:
    """What to evaluate on."""

    name: str
    passages: Passages
    traced: tuple[str, ...]
    """Prompts to be traced."""
    reads_last: bool
    """Whether answers are read after the last token of each prompt only."""


def material_of_prompts(replacement: ReplacementModel, prompts: Sequence[str], name: str, n_graphs: int) -> Material:
    """Prompts; some of them, spread over all, are traced."""
    passages = passages_of_prompts([replacement.tokenize(prompt).token_ids for prompt in prompts])
    return Material(name, passages, tuple(spread(prompts, n_graphs)), reads_last=True)


def material_of_corpus(
    replacement: ReplacementModel, corpus: Corpus, *, context: int | None, n_tokens: int, n_graphs: int
) -> Material:
    """The first tokens of a corpus; the openings of its first documents are traced."""
    longest: int = longest_context(replacement.model) or context or CONTEXT
    length = min(CONTEXT, longest) if context is None else context
    if not 2 <= length <= longest:
        raise TraceError(f"--context is {length}; the model reads {longest} tokens at most, and 2 are the least.")
    passages = passages_of_corpus(corpus, replacement.tokenizer, context=length, n_tokens=n_tokens)
    openings = (opening(replacement, text, min(OPENING, length - 1)) for text in corpus.documents(0))
    return Material(corpus.name, passages, tuple(islice(filter(None, openings), n_graphs)), reads_last=False)


def read_prompts(path: Path, column: str) -> list[str]:
    """The lines of a text file, or a column of a JSONL or Parquet file."""
    if path.suffix != ".txt":
        return list(open_corpus(path, column=column).documents(0))
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise TraceError(f"{path} cannot be read ({error}); give a UTF-8 text file, a prompt on each line.") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise TraceError(f"{path} holds no prompt; expected one on each line.")
    return prompts


def spread(prompts: Sequence[str], n: int) -> list[str]:
    """So many of the prompts, at even distances: those of one kind often stand together."""
    return [prompts[i * len(prompts) // n] for i in range(n)] if n < len(prompts) else list(prompts)


def opening(replacement: ReplacementModel, text: str, n_tokens: int) -> str:
    """A text up to so many of its tokens; empty where it has fewer than two."""
    offsets = replacement.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return text[: offsets[:n_tokens][-1][1]] if len(offsets) > 1 else ""
