"""The labels of the lab's features tell a prompt's story, and describe what they say they do."""

from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
import torch

from examples.lab import measure
from examples.lab.situations import KINDS, tags_of
from examples.lab.swaps import pad
from examples.lab.transcoder import inventory_questions
from examples.lab.world import Question, questions, read_world
from tracer import ReplacementModel, lab, trace
from tracer.story import routes, told_targets
from transcoders.features import collect_firing


@pytest.fixture(scope="module")
def replacement() -> ReplacementModel:
    return ReplacementModel.load(lab.folder() / "model", lab.folder() / "transcoder", name="lab")


@pytest.fixture(scope="module")
def world() -> measure.Lab:
    facts = read_world()
    return measure.Lab(facts, questions(facts), *measure.load_model(str(lab.folder() / "model")))


def test_the_story_of_the_two_hops_names_the_state_at_its_city_and_the_relation_at_the_end(replacement):
    names = lab.labels(lab.features())
    graph = trace("the capital of the state containing Dallas is", replacement, labels=names).graph
    told = [route.steps for route in routes(graph, told_targets(graph)[0], 6)]
    assert ("Dallas", "[Texas] at Dallas", "Austin") in told
    assert ("capital", "[capital of a state] at is", "Austin") in told
    assert ("capital", "[capital of a state] at is", "[capital] at is", "Austin") in told


def test_what_holds_at_each_token_of_a_question(world):
    by_prompt = {q.prompt: q for q in world.questions}
    told = [[name for _, name in tags] for tags in tags_of(by_prompt["the capital of Texas is"], world.tokenizer)]
    assert told[0] == []
    assert told[2:] == [
        ['"capital"', 'after "the"'],
        ['"of"', 'after "capital"'],
        ["Texas", '"Texas"', 'after "of"'],
        ["about Texas", "state fact", "say Austin", "capital", "capital of a state", '"is"', 'after "Texas"'],
    ]
    [*_, total] = tags_of(by_prompt["calc: 36+59="], world.tokenizer)
    assert [name for kind, name in total if kind.startswith("sum")] == [
        "sum ends in 5", "sum 80–99", "sum 90–109", "sum 90–99", "sum = 95"
    ]  # fmt: skip
    assert ("text", "in a sum") in total


def test_every_kind_of_situation_has_its_place_in_the_order_of_preference(world):
    samples = {q.family: q for q in world.questions}.values()
    kinds = {kind for question in samples for tags in tags_of(question, world.tokenizer) for kind, _ in tags}
    assert kinds == set(KINDS)


def test_what_a_feature_promotes_names_it_only_where_that_stands_out():
    rows = [row for row in lab.features().to_pylist() if row["label_precision"] is None and row["max_activation"] > 0]
    named = {source: [row for row in rows if row["label_source"] == source] for source in ("promotes", None)}
    assert {source: len(some) for source, some in named.items()} == {"promotes": 90, None: 542}
    for source, some in named.items():
        for row in some:
            best, worst = row["top_logits"][0], row["bottom_logits"][0]
            assert (best["value"] >= -1.5 * worst["value"]) == (source == "promotes")
            assert row["label"] == (f"→ {best['token']}, {row['top_logits'][1]['token']}" if source else None)


class Site(NamedTuple):
    """A token of a question."""

    asked: Question
    words: tuple[str, ...]
    """The tokens up to this one."""
    is_last: bool
    ends_subject: bool


DESCRIBED = {
    (0, 10): ('capital / "capital"', lambda at: at.words[-1] == "capital" or (at.is_last and asks_for_capital(at))),
    (0, 536): ("with Mary", lambda at: "Mary" in at.words),
    (0, 573): ("capital of a state", lambda at: at.is_last and asks_for_capital(at) and "state" in at.asked.family),
    (1, 94): ("Texas", lambda at: at.ends_subject and at.asked.bridge == "Texas"),
    (2, 961): ("Texas", lambda at: at.ends_subject and at.asked.bridge == "Texas"),
    (2, 599): ("strongest: Germany", lambda at: at.ends_subject and at.asked.bridge == "Germany"),
    (3, 535): ("most tokens", lambda at: True),
}
"""Features that fire at two kinds of places, seldom, where a relation is asked, at a place's cities, at one's most
strongly, and nearly everywhere."""


def asks_for_capital(site: Site) -> bool:
    return site.asked.relation == "capital"


@pytest.mark.slow
def test_precision_and_recall_of_labels_are_those_of_a_plain_count_over_all_tokens(world, replacement):
    asked = inventory_questions(world)
    sites = [site for question in asked for site in tokens_of(question, world.tokenizer)]
    of_family = Counter(site.asked.family for site in sites)
    weight = np.array([1 / of_family[site.asked.family] for site in sites])
    tokens, lengths = pad(world.tokenizer, [q.prompt for q in asked])
    place = torch.arange(tokens.shape[1])
    keep = (place < lengths[:, None]) & (place > 0)
    firing = collect_firing(world.model, replacement.transcoder, tokens, keep)
    rows = {(row["layer"], row["feature"]): row for row in lab.features().to_pylist()}
    for (layer, feature), (label, fits) in DESCRIBED.items():
        activation = firing.activation[layer][[feature]].toarray()[0]
        is_strong = label.startswith("strongest: ")
        activation = np.where(activation >= activation.max() / 2, activation, 0) if is_strong else activation
        activation = activation * weight
        holds = np.array([fits(site) for site in sites])
        row = rows[layer, feature]
        assert (row["label"], row["label_source"]) == (label, "fires strongly on" if is_strong else "fires on")
        assert row["label_precision"] == pytest.approx(activation[holds].sum() / activation.sum(), abs=1e-4)
        assert row["label_recall"] == pytest.approx(
            weight[holds & (activation > 0)].sum() / weight[holds].sum(), abs=1e-4
        )


def tokens_of(question: Question, tokenizer) -> list[Site]:
    words = tokenizer.tokenize(question.prompt)
    before, subject, _ = question.prompt.partition(question.subject or question.prompt)
    end = len(tokenizer.tokenize(before + subject))
    return [Site(question, tuple(words[:n]), n == len(words), n == end) for n in range(1, len(words) + 1)]
