"""`reca get` against a stand-in of the hub: the list, the files, and every way in which it can fail."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest
from huggingface_hub import constants

from reca import catalog
from reca.cli import main
from reca.config.recipe_files import load_recipe, recipe_names
from reca.hub import downloads, files
from reca.models import UMMS
from reca.models.common.hub import fetch, hub_name
from tests.driver import hub_server
from tests.driver.hub_server import COMMIT, TOKEN, Hub, Repository, digest, point_to, serve

LARGE = bytes(range(256)) * 40
CLIP = "models/openai/clip-vit-large-patch14-336"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The repositories of show_o_512, of a dataset, and of a single file in a folder."""
    hub = Hub(
        {
            "models/showlab/show-o-w-clip-vit-512x512": Repository(
                {"config.json": b"{}", "pytorch_model.safetensors": LARGE, "README.md": b"hello"}, "apache-2.0"
            ),
            "models/showlab/magvitv2": Repository({"pytorch_model.safetensors": LARGE[:2000], "config.json": b"{ }"}),
            CLIP: Repository({"config.json": b"{}", "pytorch_model.bin": LARGE[:3000], "tf_model.h5": LARGE}),
            "models/microsoft/phi-1_5": Repository({"tokenizer.json": b"{}", "model.safetensors": LARGE}, "mit"),
            "models/owner/parts": Repository({"deep/one.pth": LARGE, "deep/two.pth": LARGE}),
            "datasets/jackyhate/text-to-image-2M": Repository(
                {"data_1024_10K/data_000000.tar": LARGE, "data_512_2M/data_000000.tar": LARGE}
            ),
        }
    )
    server, address = serve(hub)
    point_to(monkeypatch, address, tmp_path / "cache")
    monkeypatch.setattr(files, "RESUMED", 1000)  # the files here are smaller than any of the hub's
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 256)  # what of a cut connection has not filled one is lost
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the tries of the library
    yield hub
    server.shutdown()
    server.server_close()


def get(*arguments: str) -> int:
    return main(["get", *arguments])


def show_o(to) -> list[str]:
    return ["weights", "show_o_512", "--to", str(to)]


# the list


def test_the_list_has_sizes_terms_and_places_and_fetches_nothing(hub, tmp_path, capsys):
    assert get(*show_o(tmp_path / "w"), "--dry-run") == 0
    out = capsys.readouterr().out
    assert (
        "showlab/show-o-w-clip-vit-512x512  model.weights\n    10.00 KiB in 2 files; licence: apache-2.0; not gated"
        in out
    )
    assert "openai/clip-vit-large-patch14-336  model.clip_weights\n    2.93 KiB in 2 files; licence: unknown" in out
    assert "microsoft/phi-1_5  model.tokenizer\n    2 bytes in 1 file; licence: mit" in out
    assert f"into {tmp_path / 'w'}, which has" in out
    assert hub.sent == 0 and not (tmp_path / "w").exists()


def test_the_list_of_a_hub_that_cannot_be_reached_is_what_is_known(monkeypatch, tmp_path, capsys):
    point_to(monkeypatch, "http://127.0.0.1:9", tmp_path)
    assert get("weights", "bagel_7b", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "about 27.52 GiB; licence: Apache-2.0; unknown whether gated\n    the hub cannot be reached" in out
    assert "to fetch: an unknown amount" in out


def test_a_model_is_all_its_recipes():
    repositories = {download.repository for download in downloads.weights_of("show_o")}
    assert {"showlab/show-o-w-clip-vit", "showlab/show-o-w-clip-vit-512x512", "microsoft/phi-1_5"} <= repositories
    assert len(downloads.weights_of("show_o")) == len(repositories)


def test_overrides_name_other_files(tmp_path):
    overlay = "model.overlay=sanaka87/BAGEL-RecA/model_bf16.safetensors"
    found = {one.repository: one.file for one in downloads.weights_of("bagel_7b", [overlay])}
    assert found == {"ByteDance-Seed/BAGEL-7B-MoT": "", "sanaka87/BAGEL-RecA": "model_bf16.safetensors"}
    local = downloads.weights_of("show_o_512", [f"model.weights={tmp_path}"])
    assert "model.weights" not in {key for one in local for key, _ in one.settings}


@pytest.mark.parametrize("recipe", [name for name in recipe_names() if not name.endswith("_tiny")])
def test_every_published_recipe_names_its_files(recipe):
    """One entry of the list for each key of the recipe that names the hub."""
    model = load_recipe(recipe).model
    named = {
        f"model.{key}"
        for key in ("weights", "overlay", "codec_weights", "clip_weights", "tokenizer", "mllm", "dit")
        if getattr(model, key, None)
    }
    assert {key for one in downloads.weights_of(recipe) for key, _ in one.settings} == named


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["weights", "show_o_tiny"], "show_o_tiny names no files of the hub"),
        (["weights", "show_o_51"], "no recipe 'show_o_51'"),
        (["data", "llava"], "'llava' is not one of midjourney-v6-llava"),
        (["data", "llava"], "; did you mean llava-665k?"),
        (["weights", "bagle"], "; did you mean bagel?"),
        (["suite", "genevl2"], "; did you mean geneval2?"),
        (["data", "a/b/c"], "is not one of"),
    ],
)
def test_names_that_are_none(arguments, sentence, capsys):
    assert get(*arguments) == 3
    assert sentence in capsys.readouterr().err


def test_facts_belong_to_names_of_recipes():
    """A size or licence of a repository that nothing names would be one that nobody checks."""
    named = {one.repository for umm in UMMS for one in downloads.weights_of(umm)}
    assert {"/".join(name.split("/")[:2]) for name in catalog.WEIGHTS} - named <= {
        "showlab/show-o",
        "showlab/show-o-512x512",
    }
    assert all(hub_name(one.repository, "data") == (one.repository, "") for one in catalog.DATASETS.values())


# the files


def test_weights_into_a_folder_with_the_keys_to_set(hub, tmp_path, capsys):
    assert get(*show_o(tmp_path)) == 0
    assert (tmp_path / "show-o-w-clip-vit-512x512/pytorch_model.safetensors").read_bytes() == LARGE
    assert (tmp_path / "clip-vit-large-patch14-336/pytorch_model.bin").read_bytes() == LARGE[:3000]
    assert not (tmp_path / "clip-vit-large-patch14-336/tf_model.h5").exists()
    assert not (tmp_path / "show-o-w-clip-vit-512x512/README.md").exists()
    out = capsys.readouterr().out
    for key, name in (("weights", "show-o-w-clip-vit-512x512"), ("codec_weights", "magvitv2")):
        assert f"model.{key}={tmp_path / name}\n" in out
    sent = hub.sent
    assert get(*show_o(tmp_path)) == 0
    assert hub.sent == sent, "nothing is fetched twice"
    assert "to fetch: 0 bytes" in capsys.readouterr().out


def test_weights_in_the_cache_are_what_recipes_find(hub, tmp_path, capsys):
    assert get("weights", "show_o_512") == 0
    assert "recipes find weights in the cache without further settings" in capsys.readouterr().out
    sent = hub.sent
    folder = fetch("showlab/show-o-w-clip-vit-512x512", ["*.json", "*.safetensors", "*.bin"])
    assert (folder / "pytorch_model.safetensors").read_bytes() == LARGE and hub.sent == sent
    assert folder.is_relative_to(tmp_path / "cache")


def test_one_file_of_a_repository(hub, tmp_path):
    assert get("weights", "owner/parts/deep/one.pth", "--to", str(tmp_path)) == 0
    assert (tmp_path / "parts/deep/one.pth").read_bytes() == LARGE
    assert not (tmp_path / "parts/deep/two.pth").exists()


def test_data_with_the_key_to_set(hub, tmp_path, capsys):
    assert get("data", "text-to-image-2m", "--to", str(tmp_path)) == 0
    tar = tmp_path / "text-to-image-2M/data_1024_10K/data_000000.tar"
    assert tar.read_bytes() == LARGE and not (tmp_path / "text-to-image-2M/data_512_2M").exists()
    assert f"data.images={tar.parent}/*.tar\n" in capsys.readouterr().out


def test_llava_says_where_its_images_are(hub, tmp_path, capsys):
    hub.repositories["datasets/liuhaotian/LLaVA-Instruct-150K"] = Repository({"llava_v1_5_mix665k.json": b"[]"})
    assert get("data", "llava-665k", "--to", str(tmp_path)) == 0
    out = capsys.readouterr().out
    assert f"data.conversations={tmp_path}/LLaVA-Instruct-150K/llava_v1_5_mix665k.json" in out
    assert all(one.folder in out and one.url in out for one in catalog.LLAVA_IMAGES)


# interruptions


@pytest.mark.parametrize("to_cache", [False, True], ids=["folder", "cache"])
def test_a_cut_connection_is_taken_up_where_it_was_cut(hub, tmp_path, to_cache, capsys):
    hub.cuts = 2
    arguments = ["weights", "owner/parts/deep/one.pth"]
    assert get(*arguments, *([] if to_cache else ["--to", str(tmp_path)])) == 0
    place = tmp_path / "parts" if not to_cache else tmp_path / "cache/models--owner--parts/snapshots" / COMMIT
    assert f"owner/parts is in {place}\n" in capsys.readouterr().out and (place / "deep/one.pth").is_file()
    ranges = [part for method, _, part in hub.asked if method == "GET" and part]
    assert ranges == [f"bytes={len(LARGE) // 2}-", f"bytes={len(LARGE) * 3 // 4}-"]
    assert hub.sent == len(LARGE)


@pytest.mark.parametrize("to_cache", [False, True], ids=["folder", "cache"])
def test_the_next_command_goes_on_with_what_an_ended_one_left(hub, tmp_path, monkeypatch, to_cache, capsys):
    arguments = ["weights", "owner/parts/deep/one.pth", *([] if to_cache else ["--to", str(tmp_path)])]

    def ends(*_, **__):
        raise KeyboardInterrupt

    hub.cuts = 1
    with monkeypatch.context() as patch:
        patch.setattr("time.sleep", ends)  # the process is ended while the library waits for its second try
        assert get(*arguments) == 130
    capsys.readouterr()
    hub.asked.clear()
    assert get(*arguments) == 0
    assert f"of which {len(LARGE) / 2048:.2f} KiB are downloaded" in capsys.readouterr().out
    assert [part for _, _, part in hub.asked if part] == [f"bytes={len(LARGE) // 2}-"]
    assert hub.sent == len(LARGE)
    folder = tmp_path / ("cache" if to_cache else "parts")
    assert not list(folder.rglob("*.incomplete"))
    assert next(folder.rglob("one.pth")).read_bytes() == LARGE


def test_an_address_that_ends_while_a_file_comes_is_asked_for_again(hub, tmp_path):
    hub.cuts, hub.expired = 1, 1
    assert get("weights", "owner/parts/deep/one.pth", "--to", str(tmp_path)) == 0
    assert (tmp_path / "parts/deep/one.pth").read_bytes() == LARGE and hub.sent == len(LARGE)


def test_keys_that_name_one_repository_are_one_download_of_the_files_of_both():
    overrides = [f"model.{key}=owner/whole" for key in ("weights", "clip_weights", "tokenizer")]
    (one,) = [one for one in downloads.weights_of("show_o_512", overrides) if one.repository == "owner/whole"]
    assert {key for key, _ in one.settings} == {"model.weights", "model.clip_weights", "model.tokenizer"}
    assert one.patterns and {"*.json", "*.txt", "*.safetensors"} <= set(one.patterns)  # of tokenizers, and of weights


@pytest.mark.parametrize("name", catalog.DATASETS)
def test_every_dataset_of_the_catalog_is_a_download(name):
    (one,) = downloads.data_of(name)
    known = catalog.DATASETS[name]
    assert (one.repository, one.patterns, one.kind) == (known.repository, known.files and list(known.files), "dataset")


@pytest.mark.parametrize("apart", [False, True], ids=["one host", "storage"])
def test_the_token_goes_to_the_hub_and_not_to_the_storage_of_files(hub, tmp_path, monkeypatch, apart):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    own, other = (f"{name}:{constants.ENDPOINT.rpartition(':')[2]}" for name in ("127.0.0.1", "localhost"))
    hub.storage = f"http://{other}" if apart else ""
    assert get("weights", "owner/parts/deep/one.pth", "--to", str(tmp_path)) == 0
    assert (tmp_path / "parts/deep/one.pth").read_bytes() == LARGE
    assert set(hub.tokens) == {(own, f"Bearer {TOKEN}")} | ({(other, None)} if apart else set())


def test_a_hub_that_goes_on_refusing_is_not_asked_forever(hub, tmp_path, capsys):
    hub.cuts, hub.expired = 1, 100
    assert get("weights", "owner/parts/deep/one.pth", "--to", str(tmp_path)) == 4
    assert "the hub answered with status 403; try again later. Partial downloads are kept" in capsys.readouterr().err
    assert (tmp_path / "parts/deep/one.pth.incomplete").stat().st_size == len(LARGE) // 2


def test_a_part_of_another_file_is_noticed(hub, tmp_path, capsys):
    part = tmp_path / "parts/deep/one.pth.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"\0" * 100)
    arguments = ["weights", "owner/parts/deep/one.pth", "--to", str(tmp_path)]
    assert get(*arguments) == 4
    assert "has another SHA-256" in capsys.readouterr().err
    assert get(*arguments) == 0
    assert (tmp_path / "parts/deep/one.pth").read_bytes() == LARGE


def test_a_part_that_another_process_is_fetching_is_left_to_it(hub, tmp_path, capsys):
    part = tmp_path / "parts/deep/one.pth.incomplete"
    part.parent.mkdir(parents=True)
    arguments = ["weights", "owner/parts/deep/one.pth", "--to", str(tmp_path)]
    with part.open("wb") as other:
        other.write(LARGE[:100])
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        assert get(*arguments) == 4
        assert "one.pth.incomplete is being fetched by another process" in capsys.readouterr().err
        assert part.read_bytes() == LARGE[:100] and hub.sent == 0
    assert get(*arguments) == 0 and hub.sent == len(LARGE) - 100


def test_a_file_system_without_locks_is_no_other_process(hub, tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")  # as of Lustre without -o flock

    monkeypatch.setattr(fcntl, "flock", flock)
    assert get("weights", "owner/parts/deep/one.pth", "--to", str(tmp_path)) == 0
    assert (tmp_path / "parts/deep/one.pth").read_bytes() == LARGE


def test_a_large_file_without_a_sha256_is_left_to_the_library(hub, tmp_path, monkeypatch):
    """As a mirror may list it: git's hash names no contents that could be checked here."""
    monkeypatch.setattr(hub_server, "LARGE", len(LARGE) + 1)
    assert get("weights", "owner/parts/deep/one.pth", "--to", str(tmp_path)) == 0
    assert (tmp_path / "parts/deep/one.pth").read_bytes() == LARGE


# refusals


def test_too_little_disk_fetches_nothing(hub, tmp_path, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 2**20))
    assert get(*show_o(tmp_path / "w")) == 4
    error = capsys.readouterr().err
    assert f"{tmp_path / 'w'} has 1.00 MiB free" in error and "or give another folder (--to)" in error
    assert hub.sent == 0 and not (tmp_path / "w").exists()


@pytest.mark.parametrize("to_cache", [False, True], ids=["folder", "cache"])
def test_a_full_disk_with_everything_on_it_is_no_obstacle(hub, tmp_path, monkeypatch, to_cache, capsys):
    """Nor is a cache that may only be read, as one that an administrator has filled."""
    arguments = ["weights", "owner/parts/deep/one.pth", *([] if to_cache else ["--to", str(tmp_path)])]
    assert get(*arguments) == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "total used free")(0, 0, 0))
    if to_cache:
        monkeypatch.setattr(downloads, "ensure_writable", lambda *_: pytest.fail("nothing is written"))
    assert get(*arguments) == 0 and "to fetch: 0 bytes" in capsys.readouterr().out


def test_a_file_in_place_of_the_folder_is_named_before_anything_is_fetched(hub, tmp_path, capsys):
    (tmp_path / "w").touch()
    assert get(*show_o(tmp_path / "w")) == 4
    assert f"--to {tmp_path / 'w'} is not a folder" in capsys.readouterr().err and hub.sent == 0


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_repository_says_what_to_do_before_anything_is_fetched(hub, tmp_path, capsys, status):
    hub.repositories[CLIP] = Repository(
        {"config.json": b"{}", "pytorch_model.bin": LARGE}, gated="manual", refuses=status
    )
    assert get(*show_o(tmp_path)) == 4
    captured = capsys.readouterr()
    assert "accept its terms on huggingface.co/openai/clip-vit-large-patch14-336, then `hf auth login`" in captured.out
    assert "requires its terms to be accepted" in captured.err and "Traceback" not in captured.err
    assert hub.sent == 0
    assert get(*show_o(tmp_path), "--dry-run") == 0
    assert "10.00 KiB in 2 files; licence: unknown; gated" in capsys.readouterr().out


def test_a_gated_repository_of_somebody_who_may(hub, tmp_path):
    hub.repositories[CLIP].gated = "auto"
    assert get(*show_o(tmp_path)) == 0
    assert f"api/{CLIP}/auth-check" in hub.paths()


@pytest.mark.parametrize("name", ["owner/none", "owner/parts/none.pth"])
def test_what_the_hub_does_not_have(hub, name, capsys):
    assert get("weights", name) == 4
    error = capsys.readouterr().err
    assert "has no such repository" in error or "has no none.pth" in error


def test_offline(hub, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert get(*show_o(tmp_path)) == 4
    error = capsys.readouterr().err
    assert "the hub is disabled (HF_HUB_OFFLINE)" in error and len(error.splitlines()) == 1


def test_no_connection(monkeypatch, tmp_path, capsys):
    point_to(monkeypatch, "http://127.0.0.1:9", tmp_path)
    assert get("data", "llava-665k") == 4
    assert "the hub cannot be reached" in capsys.readouterr().err


def test_as_a_command_with_the_variables_of_the_hub(hub, tmp_path):
    """In a process of its own: HF_ENDPOINT and HF_HUB_CACHE are read by the library itself."""
    variables = {"HF_ENDPOINT": constants.ENDPOINT, "HF_HUB_CACHE": str(tmp_path / "mine")}
    done = subprocess.run(
        [sys.executable, "-m", "reca", "get", "data", "jackyhate/text-to-image-2M"],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    blobs = tmp_path / "mine/datasets--jackyhate--text-to-image-2M/blobs"
    assert digest(LARGE) in {path.name for path in blobs.iterdir()}
