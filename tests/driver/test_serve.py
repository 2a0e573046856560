"""The page of `reca serve`: its requests called directly, over HTTP, and in a browser."""

import builtins
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from reca import api
from reca.cli import main
from reca.commands.serve import (
    MAX_TEXT,
    MAX_UPLOAD,
    Requests,
    Side,
    check_address,
    import_gradio,
    make_page,
    open_sides,
    read_sampling,
    served,
)
from reca.models import umm_package
from tests.driver.browser import CHROMIUM, Browser

STEP = "steps=2"


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return api.load("bagel_tiny", device="cpu")


@pytest.fixture(scope="module")
def requests(tiny):
    return Requests([Side("base", tiny), Side("trained", tiny)])


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "red.png"
    Image.new("RGB", (40, 24), "red").save(path)
    return str(path)


def test_both_sides_draw_from_equal_seeds(requests, tiny):
    before, after = (np.asarray(image) for image in requests.generate("a red circle", 3, STEP))
    (drawn,) = tiny.generate(["a red circle"], [3], steps=2)
    assert np.array_equal(before, after) and np.array_equal(before, drawn.permute(1, 2, 0).numpy())


def test_edits_and_answers(requests, image):
    assert len(requests.edit(image, "draw it blue", 0, STEP)) == 2
    before, after = requests.answer(image, "what is this?")
    assert before == after


def test_sampling_options_are_read_and_checked(tiny):
    assert read_sampling(" steps=3,\nheight=32  width=32 ", tiny.generate) == {"steps": 3, "height": 32, "width": 32}
    assert read_sampling("  ", tiny.generate) == read_sampling(None, tiny.generate) == {}
    for text, words in (("stepz=3", "did you mean steps"), ("steps=0", "at least 1"), ("steps", "has no '='")):
        with pytest.raises(ValueError, match=words):
            read_sampling(text, tiny.generate)


@pytest.mark.parametrize(
    ("umm", "text", "words"),
    [
        ("show_o", "steps=501", "steps=501 would take 10.02 times as long as the defaults .steps=50.; the limit"),
        ("show_o", "steps=1000000000", "2e.07 times as long"),
        ("harmon", "steps=640 diffusion_steps=101", "steps=640 diffusion_steps=101 would take 10.1 times"),
        ("open_uni", "height=2080", "height=2080: the limit of this page is 2048 pixels"),
    ],
)
def test_a_request_may_not_keep_the_others_waiting(umm, text, words):
    method = umm_package(umm).Adapter.generate
    with pytest.raises(ValueError, match=words):
        read_sampling(text, method)
    assert read_sampling("steps=20", method) == {"steps": 20}
    assert read_sampling("steps=1280, diffusion_steps=50", umm_package("harmon").Adapter.generate)


@pytest.mark.parametrize(
    ("prompt", "seed", "words"),
    [
        ("  ", 0, "is empty"),
        (None, 0, "is empty"),
        ("a" * (MAX_TEXT + 1), 0, "the limit is"),
        ("a", -1, "is outside"),
        ("a", None, "not an integer"),
    ],
)
def test_mistakes_are_said(requests, prompt, seed, words):
    with pytest.raises(ValueError, match=words):
        requests.generate(prompt, seed)


def test_bad_images_are_said_without_a_path_of_the_server(requests, tmp_path):
    with pytest.raises(ValueError, match="choose a file"):
        requests.answer(None, "what?")
    (broken := tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nrest")
    with pytest.raises(ValueError, match="broken.png is not a readable image") as said:
        requests.answer(str(broken), "what?")
    assert str(tmp_path) not in str(said.value)
    with (large := tmp_path / "large.png").open("wb") as file:
        file.truncate(MAX_UPLOAD + 1)
    with pytest.raises(ValueError, match="the limit is"):
        requests.answer(str(large), "what?")


def test_a_run_beside_its_base(tmp_path, caplog):
    small = ["objective.reca.batch_size=2", "objective.reca.micro_batch=2", "objective.i2t.weight=0"]
    run = str(tmp_path / "run")
    assert main(["train", "show_o_tiny", "train.steps=1", "optim.lr=0.1", *small, f"run_dir={run}"]) == 0
    sides = open_sides(run, [], "base", False, "cpu")
    assert f"base of {run} names no weights" in caplog.text
    assert [side.label for side in sides] == [f"base of {run}", f"{run}, step 1"]
    before, after = (dict(side.model.named_parameters()) for side in sides)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert Requests(sides).abilities == {"generate", "answer"}


def test_a_checkpoint_is_served_like_a_run(tmp_path):
    run = str(tmp_path / "run")
    keys = {"run_dir": run, "train.steps": 2, "checkpoint.every": 1, "objective.i2t.weight": 0, "data.workers": 0}
    api.train("show_o_tiny", keys | {"objective.reca.batch_size": 2, "log.tensorboard": False})
    first, last = f"{run}/checkpoints/000001", f"{run}, step 2"
    expected = {
        (first, run): [last, f"{first}, step 1"],
        (run, first): [f"{first}, step 1", last],
        (first, "base"): [f"base of {first}", f"{first}, step 1"],
        ("show_o_tiny", first): [f"{first}, step 1", "show_o_tiny"],
        (first, None): [f"{first}, step 1"],
    }
    for (source, against), labels in expected.items():
        sides = open_sides(source, [], against, False, "cpu")
        shown = make_page(Requests(sides), "reca").config["components"]
        assert [part["props"]["label"] for part in shown if part["type"] == "image"] == labels
        pictures = [image.tobytes() for image in Requests(sides).generate("a red square", 0, "steps=1")]
        assert len(set(pictures)) == len(labels)


def test_an_evaluation_cannot_be_served(tmp_path):
    (tmp_path / "records.jsonl").write_text("")
    with pytest.raises(ValueError, match="is an evaluation folder"):
        open_sides("show_o_tiny", [], str(tmp_path), False, "cpu")


def test_gradio_is_asked_for(monkeypatch, capsys):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name == "gradio":
            raise ImportError("No module named 'gradio'")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["serve", "show_o_tiny"]) == 3
    assert "pip install 'reca[serve]'" in capsys.readouterr().err


def test_an_old_gradio_is_named(monkeypatch, capsys):
    """One before 6.27 has no alternative texts of images."""
    oldest = re.search(r'"gradio>=([\d.]+),', (Path(__file__).parents[2] / "pyproject.toml").read_text())[1]
    for version in ("5.50.0", "6.26.0"):
        monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace(__version__=version))
        assert main(["serve", "show_o_tiny"]) == 3
        said = f"reca serve needs gradio {oldest} or later, found {version}: pip install 'reca[serve]'"
        assert said in capsys.readouterr().err
    for version in (f"{oldest}.0", "7.0.0.dev1"):
        monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace(__version__=version))
        assert import_gradio().__version__ == version


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_a_port_in_use_is_said():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        with pytest.raises(ValueError, match="set another --port"):
            check_address("127.0.0.1", one.getsockname()[1])


def test_an_address_of_ipv6(requests):
    pytest.importorskip("gradio", reason="gradio is not installed")
    try:
        check_address("::1", port := free_port())
    except ValueError:
        pytest.skip("this machine has no IPv6")
    with served(make_page(requests, "reca: tiny"), "::1", port) as address:
        assert address == f"http://[::1]:{port}/" and urllib.request.urlopen(address).status == 200


def test_whoever_can_reach_the_page_is_said(caplog):
    check_address("127.0.0.1", free_port())
    assert not caplog.records
    check_address("0.0.0.0", port := free_port())
    assert f"anyone who can reach 0.0.0.0:{port} can use this model" in caplog.text
    for port in (0, 2**16):
        with pytest.raises(ValueError, match="between 1 and 65535"):
            check_address("127.0.0.1", port)


def test_a_server_is_stopped_while_it_draws(tmp_path):
    """What it was given and has drawn is gone then."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    from gradio_client import Client

    command = [sys.executable, "-m", "reca", "serve", "open_uni_tiny", "--port", str(free_port())]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, env=os.environ | {"TMPDIR": str(tmp_path)}) as server:
        try:
            address = re.search(r"http://\S+/", server.stdout.readline())[0]
            client = Client(address, verbose=False, analytics_enabled=False)
            client.predict("a", 0, "steps=1", api_name="/generate")
            assert list(tmp_path.glob("reca_serve_*/**/*.png"))
            job = client.submit("a", 0, "steps=200 height=200 width=200", api_name="/generate")
            while job.status().code.name != "PROCESSING":
                assert not job.done()
                time.sleep(0.1)
            time.sleep(1)
            server.terminate()  # a shell's background jobs ignore SIGINT
            assert server.wait(60) == 130 and server.stderr.read().endswith("reca: stopped\n")
            assert not list(tmp_path.rglob("*.png")) and not list(tmp_path.glob("reca_serve_*"))
        finally:
            server.kill()


@pytest.fixture(scope="module")
def address(requests):
    pytest.importorskip("gradio", reason="gradio is not installed")
    with served(make_page(requests, "reca: <tiny>"), "127.0.0.1", free_port()) as address:
        yield address


def test_requests_over_http(address, requests, image, tmp_path):
    from gradio_client import Client, handle_file

    client = Client(address, verbose=False, analytics_enabled=False, download_files=str(tmp_path / "got"))
    drawn = client.predict("a red circle", 3, STEP, api_name="/generate")
    assert len(drawn) == 2 and Image.open(drawn[0]).mode == "RGB"
    (small,) = requests.sides[0].model.generate(["a red circle"], [3], steps=2)
    shown = np.asarray(Image.open(drawn[0]))
    assert shown.shape == (260, 260, 3) and np.array_equal(shown[::13, ::13], small.permute(1, 2, 0).numpy())
    assert len(client.predict(handle_file(image), "what is this?", api_name="/answer")) == 2
    (broken := tmp_path / "broken.png").write_bytes(b"no image")
    for given, words in (
        ((handle_file(str(broken)), "what?"), "not a readable image"),
        ((None, "what?"), "choose a file"),
        ((handle_file(image), None), "the text is empty"),
    ):
        with pytest.raises(Exception, match=words):
            client.predict(*given, api_name="/answer")


class Stub(Requests):
    """Requests that say how they met."""

    def __init__(self):
        self.sides, self.abilities = [Side("stub", None)], {"generate", "answer"}
        self.drawing, self.answering, self.met = threading.Event(), threading.Event(), False

    def generate(self, prompt, seed, sampling=""):
        self.drawing.set()
        self.met = self.answering.wait(0.5)
        return [Image.new("RGB", (4, 4))]

    def answer(self, path, question):
        self.answering.set()
        raise RuntimeError("something of the server")


def test_a_model_serves_one_request_at_a_time_and_no_traceback():
    pytest.importorskip("gradio", reason="gradio is not installed")
    from gradio_client import Client

    with served(make_page(stub := Stub(), "stub"), "127.0.0.1", free_port()) as address:
        client = Client(address, verbose=False, analytics_enabled=False)
        job = client.submit("a", 0, "", api_name="/generate")
        assert stub.drawing.wait(60)
        with pytest.raises(Exception, match="see the log of the server") as said:
            client.predict(None, "what?", api_name="/answer")
        assert "something" not in str(said.value) and job.result() and not stub.met


def test_no_button_sends_an_image_away(address):
    with urllib.request.urlopen(f"{address}config") as answer:
        components = json.load(answer)["components"]
    images = [one["props"]["buttons"] for one in components if one["type"] == "image"]
    assert images == [["download", "fullscreen"]] * 4  # generate and edit, two models


def test_uploads_are_bounded(address):
    form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n%b\r\n--x--\r\n'
    data = form % bytes(MAX_UPLOAD + 1)
    ask = urllib.request.Request(
        f"{address}gradio_api/upload", data, {"Content-Type": "multipart/form-data; boundary=x"}
    )
    with pytest.raises(urllib.error.HTTPError) as said:
        urllib.request.urlopen(ask)
    assert said.value.code == 413


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on PATH")
def test_the_page_in_a_browser(address, tmp_path):
    """A prompt, a click, and two images of a size that can be seen; a mistake, and a message that holds all of it."""
    browser = Browser(tmp_path / "browser")
    try:
        browser.call("Page.navigate", url=address)
        browser.wait_for("!!document.querySelector('textarea') && !!document.querySelector('button.primary')")
        tabs = browser.value("[...document.querySelectorAll('[role=tab]')].map(tab => tab.textContent.trim())")
        assert tabs == ["Generate", "Edit", "Answer"]
        links = browser.value("[...document.querySelectorAll('[src], [href]')].map(x => x.src || x.href)")
        assert links and all(link.startswith((address, "data:", "blob:")) for link in links)
        browser.click("textarea")
        browser.write("a red circle")
        browser.wait_for("document.querySelector('textarea').value == 'a red circle'")
        browser.click("button.primary")
        images = "[...document.querySelectorAll('img')].filter(x => x.naturalWidth).map(x => [x.alt, x.width >= 200])"
        browser.wait_for(f"({images}).length == 2")
        assert browser.value(images) == [["by base", True], ["by trained", True]]
        assert browser.value("document.querySelector('h1').textContent.trim()") == "reca: <tiny>"
        browser.click("[placeholder^='key=value']")
        browser.write("<b>=3")
        browser.click("button.primary")
        browser.wait_for("document.body.textContent.includes(\"there is no sampling option '<b>'\")", 30)
    finally:
        browser.close()
