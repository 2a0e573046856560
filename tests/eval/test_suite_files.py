"""`reca get suite` against a stand-in of GitHub: the list, the files, and every way in which it can fail."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from reca import catalog, cli
from reca.eval import suite_files
from reca.eval.suites import SUITES, open_suite

COMMIT = "3c228f1" + "0" * 33
TABLE = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language\n"
    + "".join(f'one,x,x,{i},0,e,w,"entity - whole (cat)",Is it a cat?\n' for i in (1, 2))
)


class GitHub(BaseHTTPRequestHandler):
    """files: path -> content. faults: path, or commits or trees -> status, or content in place of the right one."""

    files: ClassVar[dict] = {}
    faults: ClassVar[dict] = {}
    asked: ClassVar[list] = []

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = self.path.split("?")[0]
        self.asked.append(path)
        if path.startswith("/api"):
            fault, answer = self.faults.get(path.split("/")[-2]), self.listing(path)
        else:
            name = path.split(COMMIT + "/")[1]
            fault, answer = self.faults.get(name), self.files[name]
        status = fault if isinstance(fault, int) else 200
        body = fault if isinstance(fault, bytes) else answer
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def listing(self, path):
        if "/commits/" in path:
            return json.dumps({"sha": COMMIT}).encode()
        tree = [
            {"path": name, "type": "blob", "size": len(content), "sha": suite_files.git_hash(content)}
            for name, content in self.files.items()
        ]
        return json.dumps({"tree": [{"path": "dpg_bench", "type": "tree", "sha": "0"}, *tree]}).encode()


@pytest.fixture
def github(monkeypatch, tmp_path):
    """The repository of DPG-Bench, with one prompt."""
    files = {
        "README.md": b"hello",
        "dpg_bench/dpg_bench.csv": TABLE.encode(),
        "dpg_bench/prompts/one.txt": b"a cat",
    }
    handler = type("Handler", (GitHub,), {"files": files, "faults": {}, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(suite_files, "API", f"{address}/api")
    monkeypatch.setattr(suite_files, "FILES", f"{address}/files")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.chdir(tmp_path)
    yield handler
    server.shutdown()
    server.server_close()


def get(*arguments):
    return cli.main(["get", "suite", *arguments])


def test_files_arrive_where_the_suite_reads_them(github, tmp_path, capsys):
    assert get("dpg") == 0
    out = capsys.readouterr().out
    assert f"TencentQQGYLab/ELLA at {COMMIT[:12]}: " in out and "in 2 files, licence: Apache-2.0" in out
    assert out.splitlines()[-1] == "--data benchmarks/dpg/dpg_bench" and not list(tmp_path.rglob("README.md"))
    assert [item.prompt for item in open_suite("dpg", tmp_path / "benchmarks/dpg/dpg_bench").items()] == ["a cat"]
    github.asked.clear()
    (tmp_path / "benchmarks/dpg/dpg_bench/prompts/one.txt").write_bytes(b"a dog")  # not what the repository has
    assert get("dpg") == 0 and "5 bytes to fetch" in capsys.readouterr().out
    assert [path for path in github.asked if "/files/" in path] == [
        f"/files/TencentQQGYLab/ELLA/{COMMIT}/dpg_bench/prompts/one.txt"
    ]


def test_the_list_alone(github, tmp_path, capsys):
    assert get("dpg", "--to", str(tmp_path / "to"), "--dry-run") == 0
    assert f"--data {tmp_path}/to/dpg/dpg_bench" in capsys.readouterr().out and not (tmp_path / "to").exists()


@pytest.mark.parametrize(
    ("where", "fault", "said"),
    [
        ("commits", 404, "cannot be fetched (HTTP 404)"),
        ("commits", 403, "GitHub allows 60 requests an hour"),
        ("commits", b"[1]", "did not answer in the format of GitHub's API"),
        ("trees", b'{"sha": "1"}', "did not answer in the format of GitHub's API"),
        ("trees", b'{"tree": []}', "has no dpg_bench/dpg_bench.csv or dpg_bench/prompts/*.txt"),
        ("dpg_bench/prompts/one.txt", 500, "cannot be fetched (HTTP 500)"),
        ("dpg_bench/prompts/one.txt", b"another", "the download has another git hash"),
    ],
)
def test_what_goes_wrong_is_said(github, tmp_path, capsys, where, fault, said):
    github.faults[where] = fault
    assert get("dpg") == 4
    message = capsys.readouterr().err
    assert said in message and "Manual download: `git clone https://github.com/TencentQQGYLab/ELLA`" in message
    github.faults.clear()
    assert get("dpg") == 0  # goes on


def test_a_file_that_git_lfs_keeps_elsewhere(github, capsys):
    github.files["dpg_bench/prompts/one.txt"] = b"version https://git-lfs.github.com/spec/v1\n"
    assert get("dpg") == 4 and "the download has another git hash" in capsys.readouterr().err


def test_no_network_and_no_such_suite(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(suite_files, "API", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert get("wise") == 4 and "cannot be fetched (" in capsys.readouterr().err
    assert get("geneval") == 3
    assert "there are no files to download for 'geneval'; there are for geneval_long, " in capsys.readouterr().err


def test_every_suite_with_files_on_github_says_how_to_get_them():
    assert set(catalog.SUITES) < set(SUITES)
    for name in catalog.SUITES:
        assert f"`reca get suite {name}`" in (SUITES[name].data_help or "")
