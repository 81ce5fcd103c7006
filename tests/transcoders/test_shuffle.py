"""The shuffling buffer: every token is served once, in an order that chance decides and a seed repeats."""

import torch

from transcoders.corpus import Packed, tokens_corpus
from transcoders.shuffle import ShuffleBuffer

PASS = 240
"""Tokens of the text, each with a number of its own: document i holds 6·i … 6·i + 5."""
SIZE, BATCH = 64, 16


def numbered_buffer(seed=0):
    packed = Packed(
        tokens_corpus([str(i) for i in range(PASS // 6)], "numbers"),
        lambda text: list(range(6 * int(text), 6 * int(text) + 6)), context=8, first_token=None,
    )  # fmt: skip
    return ShuffleBuffer(packed, activations_of, SIZE, 3, seed, torch.device("cpu"))


def activations_of(tokens):
    """Two layers of width 1: the token's number is read, twice and thrice that number is written."""
    read = tokens.flatten().float()[None, :, None].expand(2, -1, -1)
    position = torch.arange(tokens.shape[1]).expand_as(tokens).flatten()
    return read, read * torch.tensor([2.0, 3.0])[:, None, None], position


def served(buffer, batches):
    """The tokens' numbers, batch by batch."""
    return [buffer.next(BATCH).inputs[0, :, 0].int().tolist() for _ in range(batches)]


def still_held(buffer):
    """The numbers of the tokens that wait in the buffer or are read already, as its state tells them."""
    plain, tensors = buffer.state()
    waiting = tensors["origin"][tensors["order"][plain["served"] :]].tolist()
    number, first = plain["rest"]
    rest = tensors[f"forward.{number}"].flatten()[first:].tolist()
    return [int(tensors[f"forward.{number}"].flatten()[index]) for number, index in waiting] + rest


def test_every_token_of_the_text_is_served_once_before_any_is_served_again():
    buffer = numbered_buffer()
    seen = []
    while not seen or len(seen) + len(still_held(buffer)) < PASS:
        seen += served(buffer, 1)[0]
    assert len(seen) > PASS / 2
    assert sorted(seen + still_held(buffer)) == list(range(PASS))


def test_over_many_passes_no_token_is_left_out_or_served_more_often_than_others():
    buffer = numbered_buffer()
    seen = [number for batch in served(buffer, 20 * PASS // BATCH) for number in batch]
    made = torch.tensor(seen + still_held(buffer))
    count = torch.bincount(made, minlength=PASS)
    assert sorted(set(count.tolist())) in ([20], [20, 21])
    assert torch.bincount(torch.tensor(seen), minlength=PASS).min() >= 17


def test_what_a_token_reads_and_writes_and_its_position_stay_together():
    buffer = numbered_buffer()
    for _ in range(10):  # places are filled from the middle of a forward pass too
        batch = buffer.next(BATCH)
        number = batch.inputs[0, :, 0]
        assert batch.inputs[1, :, 0].tolist() == number.tolist()
        assert batch.outputs[:, :, 0].tolist() == [(2 * number).tolist(), (3 * number).tolist()]
        assert batch.position.tolist() == (number.int() % 8).tolist()


def test_the_order_is_random_and_the_same_for_the_same_seed():
    first = served(numbered_buffer(), 30)
    assert first[0] != sorted(first[0])
    assert max(first[0]) > SIZE / 2  # from all over the buffer, not from its beginning
    assert served(numbered_buffer(), 30) == first
    assert served(numbered_buffer(seed=1), 30) != first


def test_a_restored_buffer_serves_what_would_have_come():
    buffer = numbered_buffer()
    for batches in (1, 2, 4, 17):  # in the middle of a buffer, where it is to be filled again, and after a wrap
        served(buffer, batches)
        plain, tensors = buffer.state()
        again = numbered_buffer(seed=5)
        again.restore(plain, {name: tensor.clone() for name, tensor in tensors.items()})
        expected = served(buffer, 40)
        assert served(again, 40) == expected
