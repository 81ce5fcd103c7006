"""The lab's tokenizer: whole words for what is asked and answered, shared pieces for the names of cities and people.

With one token per city a model copies the city's embedding to the last word and never hops between positions; names
made of pieces that other names share must first be recognised where they stand.
"""

import re
from collections import Counter
from itertools import pairwise

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from examples.lab.world import LARGEST_NUMBER, Question, World

BOS = "<bos>"
CONTINUES = "##"
"""Marks a piece that does not begin a word."""
WORD = re.compile(r"\w+|[^\w\s]")


def build_tokenizer(world: World, questions: list[Question]) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer that leaves known words whole and splits names into shared pieces."""
    names = name_words(world)
    whole = {str(n) for n in range(LARGEST_NUMBER + 1)}
    for question in questions:
        whole.update(WORD.findall(f"{question.prompt} {question.answer}"))
    whole -= names
    merges = _shared_merges(names)
    letters = sorted({piece for name in names for piece in _letters(name)})
    pieces = letters + [left + right.removeprefix(CONTINUES) for left, right in merges]
    words = sorted(whole, key=lambda word: (not word.isdigit(), int(word) if word.isdigit() else 0, word))
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([BOS, *words, *pieces]))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, continuing_subword_prefix=CONTINUES, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    tokenizer.decoder = decoders.WordPiece(CONTINUES, cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, clean_up_tokenization_spaces=False)


def known_words(world: World, questions: list[Question]) -> list[str]:
    """Every word the lab model has ever seen."""
    words = {str(n) for n in range(LARGEST_NUMBER + 1)}
    for question in questions:
        words.update(WORD.findall(f"{question.prompt} {question.answer}"))
    return sorted(words)


def name_words(world: World) -> set[str]:
    """Words of city and inventor names, less those that are also answers: they are split into pieces."""
    places = world.states + world.countries
    names = {city for place in places for city in place["cities"]}
    names |= {entry["inventor"] for entry in world.inventions}
    answers = {value for place in places for key, value in place.items() if key != "cities"}
    kept_whole = {word for answer in answers for word in answer.split()} | set(world.scenes["names"])
    return {word for name in names for word in name.split()} - kept_whole


def _shared_merges(words: set[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that leave no word whole, and no piece of several letters in one word only."""
    banned: set[str] = set()
    while True:
        merges, segmentation = _merge_pairs(sorted(words), banned)
        uses = Counter(piece for pieces in segmentation for piece in set(pieces))
        lonely = {piece for piece, n in uses.items() if n == 1 and len(piece.removeprefix(CONTINUES)) > 1}
        if not lonely:
            return merges
        banned |= lonely


def _merge_pairs(words: list[str], banned: set[str]) -> tuple[list[tuple[str, str]], list[list[str]]]:
    """Greedy byte-pair encoding over distinct words, without merges into a banned piece or a whole word."""
    segmentation = [_letters(word) for word in words]
    forbidden = banned | set(words)
    merges = []
    while True:
        pairs = Counter(pair for pieces in segmentation for pair in pairwise(pieces))
        allowed = [(n, pair) for pair, n in pairs.items() if n > 1 and _joined(pair) not in forbidden]
        if not allowed:
            return merges, segmentation
        _, best = max(allowed)
        merges.append(best)
        segmentation = [_apply(best, pieces) for pieces in segmentation]


def _apply(pair: tuple[str, str], pieces: list[str]) -> list[str]:
    result, i = [], 0
    while i < len(pieces):
        if tuple(pieces[i : i + 2]) == pair:
            result.append(_joined(pair))
            i += 2
        else:
            result.append(pieces[i])
            i += 1
    return result


def _joined(pair: tuple[str, str]) -> str:
    return pair[0] + pair[1].removeprefix(CONTINUES)


def _letters(word: str) -> list[str]:
    return [word[0], *(CONTINUES + letter for letter in word[1:])]
