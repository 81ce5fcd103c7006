"""What features write, whichever way it is summed up."""

import pytest
import torch

from transcoders import TranscoderConfig, TranscoderError
from transcoders.model import CrossLayerTranscoder


@pytest.mark.parametrize("k", [1, 3, 40])
def test_writes_are_the_activations_times_the_decoder(k):
    generator = torch.Generator().manual_seed(k)
    transcoder = CrossLayerTranscoder(TranscoderConfig(3, 8, 50, "topk", k=k)).double()
    transcoder.initialise(generator)
    for decoder in transcoder.W_dec:
        torch.nn.init.normal_(decoder, generator=generator)
    inputs = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64)
    activations = transcoder.encode_layer(1, inputs)
    written = transcoder.writes(1, activations)
    assert len(written) == 2
    for offset, write in enumerate(written):
        expected = torch.einsum("bpf,fd->bpd", activations, transcoder.W_dec[1][:, offset])
        torch.testing.assert_close(write, expected)
    [ours] = torch.autograd.grad(sum(w.square().sum() for w in written), [transcoder.W_dec[1]], retain_graph=True)
    plain = activations.detach() @ transcoder.W_dec[1].flatten(1)
    [expected] = torch.autograd.grad(plain.square().sum(), [transcoder.W_dec[1]])
    torch.testing.assert_close(ours, expected)


def test_nothing_active_writes_nothing():
    transcoder = CrossLayerTranscoder(TranscoderConfig(2, 4, 20, "relu"))
    torch.nn.init.normal_(transcoder.W_dec[0])
    assert not torch.cat(transcoder.writes(0, torch.zeros(3, 20))).any()


def test_more_active_features_than_there_are_is_refused():
    assert TranscoderConfig(2, 4, 20, "topk", k=20).k == 20
    with pytest.raises(TranscoderError, match=r"k is 21 of 20 features a layer; expected fewer active than there are"):
        TranscoderConfig(2, 4, 20, "topk", k=21)
