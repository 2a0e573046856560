"""Show-o's sampler and the lengths of its texts: noise, masked codes per step, what is truncated or refused."""

import math

import pytest
import torch

from reca.models.common import inference
from reca.models.show_o import prompt, sampling
from tests.models.contract import shared


def test_codes_are_drawn_by_their_probabilities():
    noise, wanted = sampling.SamplerNoise(torch.tensor([3, 4])), torch.tensor([0.1, 0.0, 0.6, 0.3])
    drawn = noise.codes(0, wanted.expand(2, 5000, 4))
    assert drawn.shape == (2, 5000) and not torch.equal(drawn[0], drawn[1])
    for row in drawn:
        torch.testing.assert_close(row.bincount(minlength=4) / 5000, wanted, rtol=0, atol=0.03)
    assert not torch.equal(drawn, noise.codes(1, wanted.expand(2, 5000, 4)))


def test_noise_on_the_certainty_is_gumbel():
    """The probability of at most x is exp(-exp(-x))."""
    drawn = sampling.SamplerNoise(torch.tensor([3])).gumbel(0, 10000)[0]
    for x in (-1.0, 0.0, 1.0, 3.0):
        assert (drawn <= x).float().mean() == pytest.approx(math.exp(-math.exp(-x)), abs=0.02)


@pytest.mark.parametrize("steps", [5, 40])
def test_the_codes_that_are_masked_follow_the_cosine(steps, monkeypatch):
    """At least one more is kept in each step, as in the release, and one is masked until the end."""
    model, seen = shared("show_o"), []
    n, v = model.image_tokens, model.vocabulary
    logits = torch.randn(2, n, v.codes, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(model, "code_logits", lambda _, __, codes: (seen.append((codes == v.codes).sum(1)), logits)[1])
    noise = sampling.SamplerNoise(torch.tensor([3, 4]))
    sampling.sample_codes(model, [[], []], noise, steps=steps, guidance=0.0)
    wanted = [n]
    for step in range(1, steps):
        wanted.append(max(1, min(wanted[-1] - 1, math.floor(n * math.cos(math.pi / 2 * step / steps)))))
    assert torch.stack(seen).tolist() == [[count] * 2 for count in wanted]


def test_a_prompt_that_is_truncated_still_ends(caplog, monkeypatch):
    """And is named from the first token on that is not read."""
    monkeypatch.setattr(inference, "_WARNED", set())
    model = shared("show_o")
    v, most = model.vocabulary, model.config.max_prompt_tokens
    assert prompt.add_bos_eos([7, 8, 9], v, 5) == [v.bos, 7, 8, 9, v.eos]
    assert prompt.add_bos_eos([7, 8, 9], v, 4) == [v.bos, 7, 8, v.eos]
    for tokens, said in ((most - 2, False), (most - 1, True)):
        text = " ".join(["square"] * tokens)
        assert len(model.tokens(text)) == tokens
        model.generate([text], [0], steps=1)
        assert ("its end is truncated" in caplog.text) == said


@pytest.mark.parametrize("build, key", [(prompt.reca_clip, "max_reca_tokens"), (prompt.reca_vq, "max_text_tokens")])
def test_a_template_has_as_many_tokens_as_the_message_says(build, key):
    v, budget = shared("show_o").vocabulary, 12
    with pytest.raises(ValueError, match=rf"a template has 20 tokens; model.{key}=12 leaves room for \d") as error:
        build([7] * 20, v, budget, 4, 9)
    room = int(str(error.value).split()[-1])
    build([7] * room, v, budget, 4, 9)
    with pytest.raises(ValueError, match=f"a template has {room + 1} tokens"):
        build([7] * (room + 1), v, budget, 4, 9)
