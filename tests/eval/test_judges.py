"""Judges: an endpoint that misbehaves, models of tiny sizes in transformers, and answers that were recorded."""

import json
import logging
import math
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

import reca
from reca.eval.errors import EvaluationError
from reca.eval.judges import endpoint
from reca.eval.judges.base import Judge, JudgeError
from reca.eval.judges.endpoint import EndpointJudge
from reca.eval.suites import open_suite

SECRET = "sk-very-secret"


class Server:
    """An endpoint. `plan`: what it does with every request, in order; then it answers `reply`."""

    def __init__(self):
        self.plan, self.reply, self.seen, self.models = [], "Score: 1", [], ["tiny-vlm"]
        self.logprobs = None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                self.answer(200, {"data": [{"id": name} for name in outer.models]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                outer.seen.append((body, dict(self.headers)))
                status, content = outer.plan.pop(0) if outer.plan else (200, None)
                if status == "hang":
                    outer.release.wait(5)
                    return
                if content is None:
                    reply = outer.reply(body) if callable(outer.reply) else outer.reply
                    content = {
                        "choices": [
                            {"message": {"content": reply}, "finish_reason": "stop", "logprobs": outer.logprobs}
                        ],
                        "usage": {"prompt_tokens": 100, "completion_tokens": 5},
                    }
                self.answer(status, content)

            def answer(self, status, content):
                data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(data)))
                if status == 429:
                    self.send_header("retry-after", "7")
                self.end_headers()
                self.wfile.write(data)

        self.release = threading.Event()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server(monkeypatch):
    found = Server()
    found.waits = []
    monkeypatch.setenv(endpoint.KEY, SECRET)
    monkeypatch.setattr(endpoint.time, "sleep", found.waits.append)
    yield found
    found.release.set()
    found.http.shutdown()
    found.http.server_close()


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.png"
    Image.new("RGB", (8, 6), "red").save(path)
    return path


def wise(tmp_path, count=6):
    """Prompts of WISE with images for them."""
    rows = [{"prompt_id": i, "Prompt": f"prompt {i}", "Explanation": "e", "Category": "c"} for i in range(1, count + 1)]
    (tmp_path / "wise.json").write_text(json.dumps(rows))
    images = tmp_path / "images"
    images.mkdir()
    for i in range(1, count + 1):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(images / f"{i}.png")
    return {"suite": "wise", "source": "show_o_tiny", "data": tmp_path / "wise.json", "images": images,
            "out": tmp_path / "out"}  # fmt: skip


# ---- the endpoint ----


def test_a_request(server, image):
    judge = EndpointJudge(server.url, price_in=1.0, price_out=10.0)
    assert judge.reply("what?", [image, Image.new("RGB", (2, 2))]) == "Score: 1"
    ((body, headers),) = server.seen
    first, second, text = body["messages"][0]["content"]
    assert text == {"type": "text", "text": "what?"} and body["model"] == "tiny-vlm" and body["temperature"] == 0
    assert all(part["image_url"]["url"].startswith("data:image/png;base64,") for part in (first, second))
    assert headers["Authorization"] == f"Bearer {SECRET}"
    assert judge.cost() == "judge tiny-vlm: 1 requests, 100 tokens in, 5 out, $0.00"
    options = {"url": server.url, "max_tokens": judge.max_tokens}
    told = {"name": "endpoint:tiny-vlm", "version": "1", "dtype": None, "exact": False, "options": options}
    assert judge.describe() == told


def test_failures_are_tried_again(server, image):
    judge = EndpointJudge(server.url)
    server.plan = [(429, "slow down"), (503, "starting"), (200, "<html>")]
    assert judge.reply("what?", [image]) == "Score: 1"
    assert len(server.seen) == 4
    assert [round(wait) for wait in server.waits] == pytest.approx([7, 2, 4], rel=0.3)


def test_what_a_model_thinks_is_no_part_of_its_answer(server, image):
    judge = EndpointJudge(server.url)
    for server.reply in ("<think>Maybe\nScore: 1</think>\n\nScore: 0", "hm, Score: 1\n</think>Score: 0\n", "Score: 0"):
        assert judge.reply("what?", [image]).strip() == "Score: 0"
    server.reply = "<think>Score: 1</think>\n"
    with pytest.raises(JudgeError, match="the judge's answer is empty"):
        judge.reply("what?", [image])


def test_a_model_that_takes_no_max_tokens_and_no_temperature(server, image, caplog):
    """As OpenAI's since o1: the parameter is refused by name, every time."""
    judge = EndpointJudge(server.url, tries=1)
    limit = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    value = "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) is supported."
    server.plan = [(400, {"error": {"message": message}}) for message in (limit, value)]
    assert [judge.reply("what?", [image]) for _ in range(2)] == ["Score: 1"] * 2
    assert ["max_tokens" in body for body, _ in server.seen] == [True, False, False, False]
    assert ["temperature" in body for body, _ in server.seen] == [True, True, False, False]
    assert server.seen[-1][0]["max_completion_tokens"] == judge.max_tokens
    assert caplog.text.count("tiny-vlm rejects temperature 0") == 1
    server.plan = [(400, {"error": {"message": limit}})]
    with pytest.raises(JudgeError, match="HTTP 400"):
        judge.reply("what?", [image])


def test_what_no_try_mends_ends_it(server, image, tmp_path):
    judge = EndpointJudge(server.url, tries=3)
    server.plan = [(401, f"wrong key {SECRET}")]
    with pytest.raises(EvaluationError, match="HTTP 401: wrong key \\[key\\]; the key is read from RECA_JUDGE_KEY"):
        judge.reply("what?", [image])
    assert len(server.seen) == 1
    server.plan = [(404, "Not Found")]
    with pytest.raises(EvaluationError, match="HTTP 404: Not Found; check .* its URL, .*: most end in /v1"):
        judge.reply("what?", [image])
    server.plan = [(500, f"{SECRET} fault")] * 3
    with pytest.raises(JudgeError, match="failed 3 times; the last error: HTTP 500: \\[key\\] fault"):
        judge.reply("what?", [image])
    for content, message in (
        ({"choices": []}, "no chat completion"),
        (
            {"choices": [{"message": {"content": None}, "finish_reason": "length"}]},
            "is empty \\(finish_reason 'length'",
        ),
    ):
        server.plan = [(200, content)]
        with pytest.raises(JudgeError, match=message):
            judge.reply("what?", [image])


@pytest.mark.parametrize(
    "content",
    [{"choices": [3]}, {"choices": "x"}, {"choices": [{"message": "x"}]}, {"choices": [{"message": {"content": [1]}}]},
     {"choices": [{"message": {"content": "x"}}], "usage": 3}, {}, [1], "[" * 100_000,
     {"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": 1e999}}],
)  # fmt: skip
def test_an_answer_of_another_form_fails_one_image(server, image, content):
    judge = EndpointJudge(server.url, tries=1)
    server.plan = [(200, content)]
    with pytest.raises(JudgeError):
        judge.reply("what?", [image])


@pytest.mark.parametrize(
    "logprobs",
    [{"content": [{"token": "Yes", "logprob": 800.0}]}, {"content": [{"token": 3, "logprob": -1.0}]}, {"content": [3]},
     {"content": [{"token": "Yes", "logprob": None}]}, {"content": {"a": 1}}, {"content": [{"token": "a"}]}],
)  # fmt: skip
def test_logprobs_of_another_form_fail_one_image(server, image, logprobs):
    server.logprobs = logprobs
    with pytest.raises(JudgeError, match="logprobs cannot be read"):
        EndpointJudge(server.url).first_token_probability("q", [image], ["Yes"])


@pytest.mark.parametrize("found", [{}, {"data": 3}, {"data": ["x"]}, {"data": [{"id": None}]}])
def test_a_list_of_models_of_another_form(server, monkeypatch, found):
    monkeypatch.setattr(EndpointJudge, "_request", lambda *_: found)
    with pytest.raises(EvaluationError, match="serves these models: None|none; select one by"):
        EndpointJudge(server.url)


def test_a_judge_that_does_not_answer_in_time(server, image):
    judge = EndpointJudge(server.url, timeout=0.2, tries=2)
    server.plan = [("hang", None)] * 2
    with pytest.raises(JudgeError, match="failed 2 times; the last error: no answer within 0.2 s"):
        judge.reply("what?", [image])


@pytest.mark.parametrize(
    ("judge", "options", "message"),
    [
        ("endpoint:localhost:8000", {}, "expected a URL such as http://localhost:8000/v1"),
        ("endpoint:http://me:word@host/v1", {}, "without a key in it"),
        ("endpoint:http://host/v1?key=x", {}, "the key is read from RECA_JUDGE_KEY"),
        ("endpoint:http://host/v1/chat/completions/", {}, "8000/v1, to which /chat/completions is appended"),
        ("endpoint:http://host/v1/models", {}, "8000/v1, to which /chat/completions is appended"),
        ("endpoint:http://host/v1", {"workers": 0}, "judge option workers=0: expected 1 to 1000"),
        ("endpoint:http://host/v1", {"timeout": -1}, "judge option timeout=-1: expected 0.001 to 86400"),
        ("endpoint:http://host/v1", {"timeout": math.inf}, "judge option timeout=inf: expected a number"),
        ("endpoint:http://host/v1", {"price_in": math.nan}, "judge option price_in=nan: expected a number"),
        ("local:x", {"max_new_tokens": 0}, "judge option max_new_tokens=0: expected at least 1"),
        ("local:x", {"dtype": "int8"}, "judge option dtype=int8: expected bfloat16, float16 or float32"),
        ("recorded:none.jsonl", {}, "none.jsonl does not exist; expected records.jsonl"),
        ("mask2former:none.pth", {}, "none.pth does not exist. Use OpenMMLab's mask2former"),
        ("owlv2:x", {"threshold": 7}, "judge option threshold=7: expected 0 to 1"),
    ],
)
def test_what_no_judge_can_be_made_with_is_told_before_anything_is_drawn(painter, judge, options, message):
    suite = "geneval" if judge.startswith(("owlv2", "mask2former")) else "t2i_compbench"
    with pytest.raises(ValueError, match=message) as caught:
        reca.evaluate(suite, painter, judge=judge, judge_options=options, limit=1)
    assert "word" not in str(caught.value) and "key=x" not in str(caught.value)
    assert not list(painter.rglob("*.png"))


def test_several_models_and_no_server(server):
    server.models = ["a", "b"]
    with pytest.raises(EvaluationError, match="models: a, b; select one by judge_options={.model.: .NAME.}"):
        EndpointJudge(server.url)
    assert EndpointJudge(server.url, model="b").name == "endpoint:b"
    with pytest.raises(EvaluationError, match="failed 2 times; the last error: ConnectionRefusedError"):
        EndpointJudge("http://127.0.0.1:9/v1", tries=2)


def test_requests_per_minute(server, image, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(endpoint.time, "monotonic", lambda: now[0])
    judge = EndpointJudge(server.url, requests_per_minute=30, model="m")
    for _ in range(3):
        judge.reply("what?", [image])
    assert server.waits == [0, 2, 4]


def test_first_tokens(server, image):
    chances = {"Yes": 0.5, "yes": 0.2, " y": 0.1, "No": 0.15}
    top = [{"token": token, "logprob": math.log(p)} for token, p in chances.items()]
    server.logprobs = {"content": [{"token": "Yes", "logprob": math.log(0.5), "top_logprobs": top}]}
    judge = EndpointJudge(server.url)
    assert judge.first_token_probability("q", [image], ["Yes", "yes", " yes", " Yes"]) == pytest.approx(0.8)
    server.logprobs = None
    with pytest.raises(EvaluationError, match="returned no logprobs for"):
        judge.first_token_probability("q", [image], ["Yes"])


def test_a_suite_judged_by_an_endpoint(server, tmp_path, caplog):
    arguments = wise(tmp_path) | {"judge": f"endpoint:{server.url}"}
    server.reply = lambda body: "Score: 0" if "prompt 3" in body["messages"][0]["content"][-1]["text"] else "Score: 1"
    with caplog.at_level(logging.DEBUG):
        found = reca.evaluate(**arguments, judge_options={"workers": 3})
    assert found["overall"]["value"] == pytest.approx(5 / 6) and found["protocol"] == "WISE_Verified"
    assert "judge tiny-vlm: 6 requests, 600 tokens in, 30 out" in caplog.text
    written = "".join(path.read_text() for path in (tmp_path / "out").glob("*.*"))
    assert SECRET not in caplog.text and SECRET not in written
    # Nothing is asked twice, and another judge is another record.
    assert reca.evaluate(**arguments) == found and len(server.seen) == 6
    server.models = ["other"]
    assert reca.evaluate(**arguments)["judge"]["name"] == "endpoint:other" and len(server.seen) == 12


def test_nonsense_is_asked_again_and_then_told(server, tmp_path):
    arguments = wise(tmp_path) | {"judge": f"endpoint:{server.url}", "judge_options": {"workers": 1}}
    server.plan = [(200, {"choices": [{"message": {"content": "lovely"}}]})] * 3
    found = reca.evaluate(**arguments)
    # Image 1 got two such answers, image 2 one and then a mark.
    assert len(server.seen) == 8 and found["counts"]["failed"] == 1
    assert "contains no mark: 'lovely'" in found["failed"][0]["error"]
    server.reply = "no mark at all"
    (tmp_path / "out/records.jsonl").unlink()
    with pytest.raises(EvaluationError, match="failed on 5 images in a row; .*no mark: 'no mark at all'. All records"):
        reca.evaluate(**arguments)
    server.reply = "Score: 1"
    assert reca.evaluate(**arguments)["counts"]["failed"] == 0


@pytest.mark.parametrize("status", [400, 413, 422])
def test_an_image_that_is_refused_fails_alone(server, tmp_path, status):
    """Hosted judges refuse single images by their contents, each time they are asked."""
    arguments = wise(tmp_path) | {"judge": f"endpoint:{server.url}", "judge_options": {"workers": 1}}
    server.plan = [(200, None), (status, "content_filter")]
    found = reca.evaluate(**arguments)
    assert (found["counts"]["images"], found["counts"]["failed"], len(server.seen)) == (5, 1, 6)
    assert f"rejected the request with HTTP {status}: content_filter" in found["failed"][0]["error"]
    server.plan = [(status, "no such parameter")] * 9
    (tmp_path / "out/records.jsonl").unlink()
    with pytest.raises(EvaluationError, match="failed on 5 images in a row; the last error: .*no such parameter"):
        reca.evaluate(**arguments)


def test_an_interruption_waits_for_no_answer(tmp_path):
    """One that does not come takes ten minutes with all its tries."""
    code = """if True:
        import time
        from reca.eval.judge import _in_threads
        from reca.eval.records import Record

        def ask(key):
            if key[1] == 2:
                raise KeyboardInterrupt
            time.sleep(60 * key[1])
            return Record(*key, None, {})

        for record in _in_threads(ask, [("a", 0), ("b", 1), ("c", 2)], 2):
            print(record.item)
    """
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=40)
    assert ended.stdout == "a\n" and "KeyboardInterrupt" in ended.stderr


# ---- recorded answers ----


def test_recorded_answers(server, tmp_path):
    arguments = wise(tmp_path)
    reca.evaluate(**arguments, judge=f"endpoint:{server.url}")
    records = (tmp_path / "out/records.jsonl").rename(tmp_path / "kept.jsonl")
    first = reca.evaluate(**arguments, judge=f"recorded:{records}")
    assert first["judge"]["name"] == "endpoint:tiny-vlm" and first["overall"]["value"] == 1
    assert reca.evaluate(**arguments, records=records, steps=["score"])["overall"] == first["overall"]
    Image.new("RGB", (4, 4), "blue").save(arguments["images"] / "2.png")
    (tmp_path / "out/records.jsonl").unlink()
    found = reca.evaluate(**arguments, judge=f"recorded:{records}")
    assert found["counts"]["failed"] == 1 and "recorded for a different image 0 of item" in found["failed"][0]["error"]
    (tmp_path / "other.jsonl").write_text('{"some": "thing"}\n')
    for path, message in (("other.jsonl", "contains no answers about the items of wise"), ("none", "does not exist")):
        with pytest.raises(EvaluationError, match=message):
            reca.evaluate(**arguments, judge=f"recorded:{tmp_path / path}")


# ---- models in transformers, of tiny sizes and random ----


def tiny_tokenizer(words, **special):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", **special)


def test_a_local_model(tmp_path, image):
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    from reca.eval.judges.local_vlm import LocalVlmJudge

    words = ["<pad>", "<unk>", "<s>", "</s>", "<image>", *"is this red ? Yes yes no USER ASSISTANT : Score 1 0".split()]
    tokenizer = tiny_tokenizer(words, bos_token="<s>", eos_token="</s>", additional_special_tokens=["<image>"])
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                              image_size=28, patch_size=14)  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, bos_token_id=2, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=4, image_seq_length=4)
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "vlm")
    template = (
        "{% for m in messages %}USER : {% for c in m.content %}{% if c.type == 'image' %}<image> {% else %}"
        "{{ c.text }} {% endif %}{% endfor %}{% endfor %}ASSISTANT :"
    )
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}), tokenizer,
        patch_size=14, vision_feature_select_strategy="default", chat_template=template, num_additional_image_tokens=1,
    ).save_pretrained(tmp_path / "vlm")  # fmt: skip
    judge = LocalVlmJudge(str(tmp_path / "vlm"), "cpu", dtype="float32", max_new_tokens=4)
    reply = judge.reply("is this red ?", [image])
    assert isinstance(reply, str) and reply == judge.reply("is this red ?", [image])
    one = judge.first_token_probability("is this red ?", [image], ["Yes"])
    both = judge.first_token_probability("is this red ?", [image], ["Yes", "Yes"])
    assert 0 < one < 1 and both == pytest.approx(2 * one)  # a token that comes twice counts twice
    every = judge.first_token_probability("is this red ?", [image], words[5:])
    assert one < every < 1
    with pytest.raises(EvaluationError, match="the judge .*nowhere cannot be loaded"):
        LocalVlmJudge(str(tmp_path / "nowhere"), "cpu")


@pytest.fixture
def clip(tmp_path):
    """A tiny CLIP under the names that transformers reads; its images are resized to 224 px as CLIP's are."""
    from transformers import CLIPConfig, CLIPModel

    from reca.eval.judges import colors

    words = ["<unk>", "<pad>", "<s>", "</s>"]
    words += [
        word for name in ("cow", "bench") for text in colors.texts(name) for word in text.replace("-", " - ").split()
    ]
    tokenizer = tiny_tokenizer(words, bos_token="<s>", eos_token="</s>")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 40, "max_position_embeddings": 16, "bos_token_id": 2, "eos_token_id": 3}
    vision = {**sizes, "image_size": 224, "patch_size": 56}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def test_models_below_the_home_folder(tmp_path, clip, monkeypatch):
    from reca.eval import judges
    from reca.eval.judges import colors

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "d.pth").touch()
    for spec, suite in (("local:~/m", "wise"), ("owlv2:~/m", "geneval"), ("mask2former:~/d.pth", "geneval")):
        assert judges.check_judge(spec, {}, open_suite(suite))[1] == spec.partition(":")[2].replace("~", str(tmp_path))
    assert colors.load_clip("~/clip", "cpu")
    with pytest.raises(EvaluationError, match=r"CLIP, ~/none, cannot be loaded: .*judge_options={'clip': 'FOLDER'}"):
        colors.load_clip("~/none", "cpu")


def test_colours_are_told_by_the_features_of_transformers_own_clip(clip, monkeypatch):
    """Two objects in an image that is not square, one with a mask: pixels, features and the mean of three prompts."""
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

    from reca.eval.judges import colors

    monkeypatch.setattr("transformers.CLIPTokenizerFast", AutoTokenizer)  # the tiny one has whole words
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    mask = np.zeros((50, 70), dtype=bool)
    mask[12:30, 20:35] = True
    masked = np.where(mask[..., None], pixels, np.uint8(0x99))
    parts = [Image.fromarray(masked[10:30, 20:60]), Image.fromarray(pixels[5:45, 0:10])]
    model = CLIPModel.from_pretrained(clip)
    tokens = AutoTokenizer.from_pretrained(clip)(colors.texts("cow"), padding=True, return_tensors="pt")
    with torch.no_grad():
        texts = model.get_text_features(**tokens).pooler_output
        images = model.get_image_features(**CLIPImageProcessorPil()(parts, return_tensors="pt")).pooler_output
    unit = torch.nn.functional.normalize
    columns = unit(unit(texts).unflatten(0, (10, 3)).mean(1)).T
    seen, classify = [], colors.classify
    monkeypatch.setattr(colors, "classify", lambda *given: seen.append(given) or classify(*given))
    boxes = [[19.6, 10.2, 60.4, 30.0], [0.0, 5.0, 10.0, 45.0]]
    found = colors.load_clip(str(clip), "cpu")(Image.fromarray(pixels), "cow", boxes, [mask, None])
    for ours, wanted in zip(seen[0], (images, columns), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)
    assert found == [colors.COLORS[i] for i in (unit(images) @ columns).argmax(1).tolist()]


def test_genevals_own_judge(tmp_path, clip, monkeypatch):
    """From a checkpoint file to records and a score; the tiny detector of the golden data stands in for swin-s."""
    from reca.eval.judges import mask2former
    from tests.golden.eval.test_geneval import EVAL_DATA, tiny_sizes

    tiny = EVAL_DATA / "geneval/mask2former_tiny"
    sizes, build = tiny_sizes(tiny / "tiny.json"), mask2former.configuration
    monkeypatch.setattr(mask2former, "configuration", lambda: build(**sizes))
    monkeypatch.setattr("reca.eval.judges.detectors.RECORDED_SCORE", 0.0)
    rows = [{"tag": "colors", "include": [{"class": "person", "count": 1, "color": "red"}], "prompt": "a red person"},
            {"tag": "single_object", "include": [{"class": "bicycle", "count": 1}], "prompt": "a bicycle"}]  # fmt: skip
    data = tmp_path / "evaluation_metadata.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number, name in enumerate(("e2e_0.png", "e2e_1.png")):
        folder = tmp_path / f"images/{number:05d}/samples"
        folder.mkdir(parents=True)
        (folder / "0000.png").write_bytes((tiny / name).read_bytes())
    arguments = {"suite": "geneval", "source": "show_o_tiny", "data": data, "images": tmp_path / "images",
                 "out": tmp_path / "out", "judge_options": {"clip": str(clip)}}  # fmt: skip
    weights = tiny / "tiny_mmdet_weights.safetensors"
    # Words of the texts that the tiny tokenizer does not know are <unk>; colours are still told apart.
    found = reca.evaluate(**arguments, judge=f"mask2former:{weights}")
    assert found["judge"] == {"name": f"mask2former:{weights.name}+clip", "version": "mmdet 2.28.2 in transformers, 1",
                              "dtype": "float32", "exact": True}  # fmt: skip
    assert found["counts"]["images"] == 2 and set(found["tags"]) == {"colors", "single_object"}
    lines = [json.loads(line) for line in (tmp_path / "out/records.jsonl").read_text().splitlines()]
    wanted = json.loads((tiny / "tiny.json").read_text())["end_to_end"][0]["detections"]
    boxes = lines[0]["answer"]["person"]
    assert sorted(box["box"] for box in boxes) == sorted(d["box"] for d in wanted if d["label"] == 0)
    best = max(boxes, key=lambda box: box["score"])
    if best["score"] > 0.3:
        assert best["color"]
    for path, message in ((tmp_path / "none.pth", "does not exist. Use OpenMMLab's mask2former_swin-s"),
                          (data, "cannot be read"), (clip / "model.safetensors", "for mmdet.s Mask2F")):  # fmt: skip
        with pytest.raises(EvaluationError, match=message):
            reca.evaluate(**arguments, judge=f"mask2former:{path}", steps=["judge"])


def test_colors_are_asked_of_the_objects_that_the_rule_looks_at(tmp_path):
    from reca.eval.judges.detectors import DetectorJudge

    class Stub(DetectorJudge):
        def find(self, pixels):
            return [("cow", [0, 0, 2, 2], score, None) for score in (0.4, 0.95, 0.2, 0.01, 0.6)]

        def colors(self, image, name, boxes, masks):
            assert len(boxes) == len(masks)
            return [f"color {i}" for i in range(len(boxes))]

    path = tmp_path / "x.png"
    Image.new("RGB", (4, 4)).save(path)
    found = Stub().detect(path, {"cow": 2, "dog": 1}, 0.3)["cow"]
    assert [box.get("color") for box in found] == [None, "color 0", None, "color 1"]  # 0.01 is not recorded


def test_an_approximate_detector(tmp_path, clip, image):
    """OWLv2 of a tiny size: boxes inside of the image, and a label that says what the judge is."""
    from transformers import Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessor, Owlv2Processor

    from reca.eval.judges.detectors import Owlv2Judge
    from reca.eval.suites.geneval_rules import CLASS_NAMES

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = ["<unk>", "<pad>", "<s>", "</s>", *"a photo of".split(), *" ".join(CLASS_NAMES).split()]
    config = Owlv2Config(text_config={**sizes, "vocab_size": 120, "max_position_embeddings": 16},
                         vision_config={**sizes, "image_size": 32, "patch_size": 8}, projection_dim=16)  # fmt: skip
    torch.manual_seed(0)
    Owlv2ForObjectDetection(config).save_pretrained(tmp_path / "owl")
    processor = Owlv2ImageProcessor(size={"height": 32, "width": 32})
    tokenizer = tiny_tokenizer(words, bos_token="<s>", eos_token="</s>", model_max_length=16)
    Owlv2Processor(processor, tokenizer).save_pretrained(tmp_path / "owl")
    judge = Owlv2Judge(str(tmp_path / "owl"), "cpu", clip=str(clip), threshold=0.1)
    found = judge.detect(image, {}, 0.3)
    # As transformers itself finds them.
    names = list(CLASS_NAMES)
    inputs = judge.processor(images=Image.open(image), text=judge.texts(names), return_tensors="pt")
    with torch.no_grad():
        outputs = judge.model(**inputs)
    (wanted,) = judge.processor.post_process_grounded_object_detection(outputs, threshold=0.1, target_sizes=[(6, 8)])
    ours = sorted((round(b["score"], 4), *(round(s, 2) for s in b["box"])) for boxes in found.values() for b in boxes)
    theirs = zip(wanted["scores"].tolist(), wanted["boxes"].tolist(), strict=True)
    assert ours == sorted((round(score, 4), *(round(side, 2) for side in box)) for score, box in theirs)
    assert judge.describe()["exact"] is False and judge.name.startswith("owlv2:")
    assert found and set(found) <= set(CLASS_NAMES)
    assert all(len(box["box"]) == 4 and 0 < box["score"] <= 1 for boxes in found.values() for box in boxes)


def test_grounding_dino(tmp_path, clip, image):
    """A tiny one: a class's score is the mean over its own words, and boxes are those of transformers."""
    from transformers import (
        BertConfig,
        BertTokenizerFast,
        GroundingDinoImageProcessor,
        GroundingDinoProcessor,
        MMGroundingDinoConfig,
        MMGroundingDinoForObjectDetection,
        SwinConfig,
    )

    from reca.eval.judges.detectors import GroundingDinoJudge
    from reca.eval.suites.geneval_rules import CLASS_NAMES

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *" ".join(CLASS_NAMES).split()]
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(dict.fromkeys(words))})
    swin = SwinConfig(image_size=64, patch_size=4, embed_dim=16, depths=[1] * 4, num_heads=[1] * 4, window_size=4,
                      out_features=["stage2", "stage3", "stage4"])  # fmt: skip
    bert = BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                      intermediate_size=16)  # fmt: skip
    config = MMGroundingDinoConfig(
        backbone_config=swin, text_config=bert, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=32,
        decoder_ffn_dim=32, encoder_attention_heads=4, decoder_attention_heads=4, num_queries=20,
    )  # fmt: skip
    torch.manual_seed(0)
    MMGroundingDinoForObjectDetection(config).save_pretrained(tmp_path / "dino")
    size = {"shortest_edge": 64, "longest_edge": 96}
    GroundingDinoProcessor(GroundingDinoImageProcessor(size=size), tokenizer).save_pretrained(tmp_path / "dino")
    judge = GroundingDinoJudge(str(tmp_path / "dino"), "cpu", clip=str(clip), threshold=0.0)
    inputs = judge.processor(images=Image.open(image), text=judge.texts(CLASS_NAMES[9:12]), return_tensors="pt")
    assert judge.processor.tokenizer.decode(inputs["input_ids"][0]).startswith("[CLS] traffic light. fire hydrant.")
    chances = torch.arange(1.0, 11.0)[None]  # of [CLS] traffic light . fire hydrant . stop sign .
    assert judge.scores(chances, inputs["input_ids"]).tolist() == [[2.5, 5.5, 8.5]]
    found = judge.find(np.asarray(Image.open(image)))
    assert len(found) == 4 * 20 and {name for name, *_ in found} <= set(CLASS_NAMES)
    first = judge.processor(images=Image.open(image), text=judge.texts(CLASS_NAMES[:20]), return_tensors="pt")
    with torch.no_grad():
        outputs = judge.model(**first)
    (wanted,) = judge.processor.post_process_grounded_object_detection(
        outputs, first["input_ids"], threshold=-1.0, target_sizes=[(6, 8)]
    )
    assert torch.allclose(torch.tensor([box for _, box, _, _ in found[:20]]), wanted["boxes"], atol=1e-4)


def test_a_model_that_published_numbers_come_from_is_exact(monkeypatch):
    from reca.eval import judges

    class Named(Judge):
        def __init__(self, source, device):
            self.source = source

    monkeypatch.setattr(judges, "_class", lambda _: Named)
    for suite, source, exact in (
        ("geneval2", "Qwen/Qwen3-VL-8B-Instruct", True),
        ("geneval2", "Qwen/Qwen3-VL-4B-Instruct", False),
        ("wise", "Qwen/Qwen3-VL-8B-Instruct", False),
    ):
        assert judges.open_judge(f"local:{source}", {}, open_suite(suite), [], "cpu").exact is exact
