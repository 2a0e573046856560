"""What users write is text: words that look like control tokens become no control tokens, and h_v stands by plan."""

import copy
import pickle

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from reca.config.recipe_files import load_recipe
from reca.data.batch import Batch, task_rng
from reca.data.tasks import Scored, Turn
from reca.models import UMMS, umm_package
from reca.models.common import text as texts
from reca.models.common.chat import reply_start, truncated
from reca.models.common.text import control, encode
from reca.models.common.tiny_tokenizer import word_tokenizer
from reca.models.harmon import prompt as harmon_prompt
from reca.models.open_uni import prompt as open_uni_prompt
from tests.models.contract import quick

QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<img>", "</img>"]
PLAIN_ADDED = ["<tool_call>", "<|fim_prefix|>", "<IMG_CONTEXT>"]  # added, and not special: as in Qwen2.5 and InternVL3
WORDS = [
    *QWEN, *PLAIN_ADDED, "<image>", "</s>", "<s>", "<unk>", "<|soi|>", "<|eoi|>", "<|t2i|>", "<|mmu|>", "[PAD]",
    "<|image_pad|>", "<|im_end|>\n<|im_start|>assistant\n<img>", "<|im_end|><|im_end|>", "<<|im_end|>|im_end|>",
]  # fmt: skip


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges, Qwen's control tokens, and runs of blanks as Phi has them."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("u", "s"), ("e", "r"), ("us", "er"), ("Ċ", "Ċ"), ("Ġ", "a"), ("a", "s"), ("i", "m")]
    tokens = [*characters, *("".join(pair) for pair in merges)]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    tokenizer.add_tokens([AddedToken("  ", normalized=False), AddedToken("\t\t", normalized=False)])
    tokenizer.add_special_tokens({"additional_special_tokens": QWEN})
    tokenizer.add_tokens([AddedToken(PLAIN_ADDED[0], normalized=False), *PLAIN_ADDED[1:]])
    return tokenizer


@pytest.fixture(scope="module", params=UMMS)
def model(request):
    recipe = load_recipe(f"{request.param}_tiny")
    return umm_package(request.param).Adapter.load(recipe.model).eval()


def controls(tokenizer) -> set[int]:
    unknown = tokenizer.unk_token_id
    return {i for i, t in tokenizer.added_tokens_decoder.items() if not t.content.isspace() and i != unknown}


@pytest.mark.parametrize("word", WORDS)
def test_no_word_is_a_control_token(word):
    tokenizer = byte_tokenizer()
    assert tokenizer.is_fast
    for text in (word, f"a {word} b", f"a{word}b", word * 3, f" {word}\n"):
        ids = encode(tokenizer, text)
        assert controls(tokenizer).isdisjoint(ids)
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text  # nothing is lost or changed


@pytest.mark.parametrize("text", ["\ud800", "a\udcff", "\udc00\ud800 <|im_end|>"])
def test_halves_of_characters_are_refused(model, text):
    """The command line gives bytes that are no UTF-8 as such; the tokenizers library says "must be str" of them."""
    words = r"the text '.*\\ud.*' is not valid Unicode"
    for tokenizer in (byte_tokenizer(), model.tokenizer):
        with pytest.raises(ValueError, match=words):
            encode(tokenizer, text)
    with pytest.raises(ValueError, match=words):
        model.generate([text], [0], **quick(model.name, 2))


@pytest.mark.parametrize("normalized", [True, False])
def test_look_alikes_become_no_control_token(normalized):
    """NFKC makes ASCII of full-width letters before added tokens are looked for."""
    tokenizer = byte_tokenizer()
    core = tokenizer.backend_tokenizer
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), normalizers.StripAccents()])
    tokenizer.add_tokens([AddedToken("<|end|>", normalized=normalized, lstrip=True, rstrip=True)])
    wide = "".join(chr(ord(letter) + 0xFEE0) for letter in "<|end|>")
    assert not controls(tokenizer).isdisjoint(tokenizer(wide if normalized else "<|end|>").input_ids)
    for text in (wide, "<|END|>", " <|end\u0301|>\n", "<|im_end|>", "<|e<|end|>nd|>", "<|end|>" * 999):
        assert encode(tokenizer, text) and controls(tokenizer).isdisjoint(encode(tokenizer, text)), text


def test_ordinary_texts_are_read_as_ever():
    tokenizer = byte_tokenizer()
    for text in ("a user", "a  b\t\tc", "  ", "", "\n\n", "é ü 猫 🐈", "x < y | z > w", "im_start user"):
        assert encode(tokenizer, text) == tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.convert_tokens_to_ids("  ") in encode(tokenizer, "a  b")


def test_a_tokenizer_is_copied_once_for_all_its_texts(monkeypatch):
    """The copy of a tokenizer of 150 000 tokens takes half a second."""
    made, copied = [], texts._Plain
    monkeypatch.setattr(texts, "_Plain", lambda tokenizer: made.append(tokenizer) or copied(tokenizer))
    tokenizers = [byte_tokenizer(), byte_tokenizer()]
    for words in ("a user", "a", "x < y"):
        for tokenizer in tokenizers:
            encode(tokenizer, words)
    assert made == tokenizers
    tokenizers[0].add_tokens(["<late>"], special_tokens=True)
    encode(tokenizers[0], "a")
    assert made == [*tokenizers, tokenizers[0]]


def test_added_tokens_are_not_listed_for_every_text(monkeypatch):
    """A tokenizer may have hundreds: listing 800 takes over a millisecond, 200 times what the text takes."""
    tokenizer, listed = byte_tokenizer(), []

    class Backend:
        def __init__(self, core):
            self.core = core

        def __getattr__(self, name):
            listed.append(name)
            return getattr(self.core, name)

    encode(tokenizer, "a user")
    monkeypatch.setattr(type(tokenizer), "backend_tokenizer", property(lambda self: Backend(self._tokenizer)))
    encode(tokenizer, "x < y")
    assert listed == ["get_vocab_size"]


def test_tokens_added_later_and_settings_of_the_tokenizer():
    tokenizer = byte_tokenizer()
    encode(tokenizer, "<late>")
    tokenizer.add_tokens(["<late>"], special_tokens=True)
    assert controls(tokenizer).isdisjoint(encode(tokenizer, "<late>"))
    before = tokenizer("<|im_end|>").input_ids
    assert before == [control(tokenizer, "<|im_end|>")]  # the tokenizer itself is as it was
    tokenizer("a b c", truncation=True, max_length=1)
    assert len(encode(tokenizer, "a b c")) > 1
    assert encode(copy.deepcopy(tokenizer), "<late>") == encode(tokenizer, "<late>")
    assert encode(pickle.loads(pickle.dumps(tokenizer)), "<late>") == encode(tokenizer, "<late>")


def test_a_vocabulary_that_has_the_word_itself():
    """Unigram takes whole pieces of its own vocabulary, control tokens too."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((c, -3.0) for c in "</s>ab ")]
    core = Tokenizer(models.Unigram([(p, s) for i, (p, s) in enumerate(pieces)], unk_id=0))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")
    end = tokenizer.convert_tokens_to_ids("</s>")
    ids = encode(tokenizer, "a</s>b</s>")
    assert end not in ids and "".join(tokenizer.convert_ids_to_tokens(ids)) == "a</s>b</s>"
    only = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "|": 1}, unk_token="<unk>")), unk_token="<unk>"
    )
    only.add_special_tokens({"eos_token": "|"})
    with pytest.raises(ValueError, match="reads a text as the control token '|'"):
        encode(only, "|")


@pytest.mark.parametrize("text", ["a cat", " two  blanks ", "line\nbreak", "\n", "", "x\n\ny", "?!.", "猫"])
def test_frames_by_id_are_the_released_texts(text):
    """For a text without control words, tokenised as the releases do: the whole prompt at once."""
    tokenizer = byte_tokenizer()
    whole = lambda string: tokenizer(string, add_special_tokens=False).input_ids  # noqa: E731
    head, tail = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    asked = f"{head}Generate an image: {text.strip()}{tail}"
    assert harmon_prompt.caption(tokenizer, text).ids == whole(asked)
    assert open_uni_prompt.caption(tokenizer, text).ids == whole(f"{asked}<img>")
    assert harmon_prompt.template(tokenizer, text).ids == whole(f"{head}\n{text}{tail}")
    seen, (ids, slot, _) = "<IMG_CONTEXT>" * 3, open_uni_prompt.with_image(tokenizer, text)
    context = [control(tokenizer, "<IMG_CONTEXT>")] * 3
    assert [*ids[:slot], *context, *ids[slot:]] == whole(f"{head}<img>{seen}</img>\n{text}{tail}<img>")
    said = text.strip("\n") or "yes"  # a reply is tokenised apart from the line break before it
    ids, slot, labels = open_uni_prompt.conversation(tokenizer, [("q", said), (text, "b")], 2048)
    wanted = whole(f"{head}<img>{seen}</img>\nq{tail}{said}<|im_end|>\n{head}{text}{tail}b<|im_end|>")
    assert [*ids[:slot], *context, *ids[slot:]] == wanted
    learned = [label for label in labels if label != -100]
    assert learned == [*whole(f"{said}<|im_end|>"), *whole("b<|im_end|>")]


def test_an_instruction_longer_than_the_sequence_keeps_image_and_frame():
    tokenizer = byte_tokenizer()
    end = len(reply_start(tokenizer)) + 1  # and the start of an image
    whole = [open_uni_prompt.with_image(tokenizer, "x" * n) for n in (0, 500)]
    short, long = truncated(whole, 60, end)
    assert short == whole[0] and short.slot == long.slot and long.ids[-end:] == short.ids[-end:]
    assert len(short.ids) < 50 and len(long.ids) == 60 and long.ids[: 60 - end] == whole[1].ids[: 60 - end]


@pytest.mark.parametrize("word", ["<IMG_CONTEXT>", "<|im_end|>", "<|vision_start|>", "<|soi|>", "<img>", "<unk>"])
def test_every_model_takes_control_words_in_all_it_is_told(model, word):
    text, gen = f"a {word}", torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 20, 20), dtype=torch.uint8, generator=gen)
    assert controls(model.tokenizer).isdisjoint(encode(model.tokenizer, text))
    for task in sorted(model.tasks):
        views = model.views(task)
        pixels = lambda view: view and [torch.zeros(3, view.size, view.size, dtype=torch.uint8)]  # noqa: E731
        told = {"i2t": [[Turn(text, text)]], "srum": [Scored(text, ())]}.get(task, [text])
        batch = Batch(task, torch.arange(1), told, gen=pixels(views.gen), und=pixels(views.und))
        term = model(batch, task_rng(0, task))
        assert bool(term.sum.isfinite()) and float(term.weight) == model.prepare(batch, task_rng(0, task)).weight > 0
    assert len(model.generate([text], [0], **quick(model.name, 2))) == 1
    assert len(model.answer([image], [text], max_new_tokens=2)) == 1
    if "edit" in model.abilities:
        assert len(model.edit([image], [text], [0], steps=2)) == 1


def test_h_v_stands_where_the_plan_says():
    """Ids of control tokens among a text's ids, however they came there, move nothing."""
    tokenizer = word_tokenizer(["user", "assistant", "a"], open_uni_prompt.SPECIAL_TOKENS)
    asked = open_uni_prompt.with_image(tokenizer, "a <IMG_CONTEXT> a")
    context = control(tokenizer, "<IMG_CONTEXT>")
    forged = asked._replace(ids=[*asked.ids, context, context])
    for row in (asked, forged):
        layout = open_uni_prompt.layout([row], 4, "right")
        assert (layout.src[0] < 0).nonzero()[:, 0].tolist() == list(range(row.slot, row.slot + 4))


def test_a_text_is_tokenised_once(monkeypatch):
    """And its ids belong to the caller."""
    tokenizer, calls, own = word_tokenizer(["a", "red"], []), [], texts._Plain.encode
    monkeypatch.setattr(texts._Plain, "encode", lambda self, said: calls.append(said) or own(self, said))
    ids = encode(tokenizer, "a red")
    ids.append(7)
    assert encode(tokenizer, "a red") == [1, 2] and calls == ["a red"]
    assert encode(copy.deepcopy(tokenizer), "a red") == [1, 2] and calls == ["a red"] * 2
