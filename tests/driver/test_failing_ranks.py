"""Two ranks of which one fails: the other neither waits for ever nor takes the run for done."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, str(ROOT / "tests/driver/launch_failing.py"), str(tmp_path_factory.mktemp("ranks"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("case", "codes", "state", "exit_code", "checkpoints"),
    [
        ("bare", [0, 0], "finished", 0, ["000002", "000004"]),
        ("beside", [0, 0], "finished", 0, ["000002", "000004"]),
        ("full_beside", [0, 0], "finished", 0, ["000004"]),
        ("killed_beside", [-9, -9], "failed", 75, ["000002"]),
        ("full_once", [0, 0], "finished", 0, ["000004"]),
        ("full_at_the_end", [6, 6], "failed", 6, ["000002"]),
        ("killed_at_the_end", [1, -9], "failed", 1, ["000002"]),
        ("no_preflight.check", [4, 4], "failed", 4, []),
        ("no_preflight.open_run_sources", [4, 4], "failed", 4, []),
        ("no_RunFolder.reject_lost_checkpoints", [4, 4], "failed", 4, []),
        ("no_hang.clean", [4, 4], "failed", 4, []),
        ("no_listing.list_complete", [4, 4], "failed", 4, []),
        ("no_trainer.choose_trained", [4, 4], "failed", 4, []),
        ("no_parallelize.checkpoint_activations", [4, 4], "failed", 4, []),
        ("no_parallelize.fully_shard", [4, 4], "failed", 4, []),
        ("no_trainer.make_optimizer", [4, 4], "failed", 4, []),
        ("no_RunFolder.accept", [4, 4], "failed", 4, []),
        ("no_trainer.SkippedSteps", [4, 4], "failed", 4, []),
        ("no_trainer.EMA", [4, 4], "failed", 4, []),
        ("no_trainer.open_loader", [4, 4], "failed", 4, []),
        ("no_trainer.Diagnostics", [4, 4], "failed", 4, []),
        ("no_stacks", [4, 4], "failed", 4, []),
        ("no_trainer.save_recipe", [4, 4], "failed", 4, []),
        ("no_trainer.RunLog", [4, 4], "failed", 4, []),
        ("no_RunReport.begin", [4, 4], "failed", 4, []),
        ("no_trainer.profiler_of", [4, 4], "failed", 4, []),
        ("no_Loader.close", [4, 4], "failed", 4, ["000002", "000004"]),
        ("no_RunLog.close", [4, 4], "failed", 4, ["000002", "000004"]),
        ("uncached_ShowO.load", [4, 4], "none", None, []),
        ("uncached_DeferredWeights.read_only", [4, 4], "none", None, []),
        ("uncached_precompute.check_parent", [4, 4], "none", None, []),
        ("uncached_precompute.features_identity", [4, 4], "none", None, []),
        ("uncached_precompute.open_loader", [4, 4], "none", None, []),
        ("uncached_precompute.fill", [4, 4], "none", None, []),
        ("uncached_Loader.close", [4, 4], "none", None, []),
        ("out_of_memory", [4, 4], "failed", 4, []),
        ("out_of_memory_for_random_weights", [4, 4], "failed", 4, []),
        ("no_state", [4, 4], "finished", 0, ["000002", "000004"]),
        ("no_recipe_of_the_parent", [4, 4], "failed", 4, []),
        ("rows_of_zeros", [3, 3], "failed", 3, []),
        ("damaged", [0, 0], "finished", 0, ["000002", "000004"]),
        ("interrupted", [75, 75], "interrupted", 75, ["000002", "000003"]),
        ("killed_reading", [1, -9], "failed", 1, ["000002", "000004"]),
        ("interrupted_reading", [75, 75], "interrupted", 75, ["000002", "000004"]),
        ("one_cannot_read", [4, 4], "failed", 4, ["000002", "000004"]),
        ("gone_while_read", [3, 3], "failed", 3, ["000002", "000004"]),
        ("one_breaks", [1, 4], "failed", 4, ["000002"]),
        ("moved", [4, 4], "none", None, []),
        ("another_recipe", [3, 3], "failed", 3, []),
        ("other_samples", [4, 4], "failed", 4, []),
        ("another_folder", [4, 4], "none", None, []),
        ("no_folder", [4, 4], "none", None, []),
        ("full_in_evaluation", [0, 0], "finished", 0, ["000002", "000004"]),
        ("full_in_evaluation_of_shards", [1, 3], "failed", 3, ["000002"]),
    ],
)
def test_both_ranks_end_as_one_run(outcomes, case, codes, state, exit_code, checkpoints):
    assert outcomes[case][:3] == [codes, state, exit_code]
    assert outcomes[case][4] == checkpoints


def test_the_rank_that_failed_is_in_the_status(outcomes):
    said = r"rank 1 on .* other samples of data.images than rank 0 \(23 and 24\)"
    assert re.search(said, outcomes["other_samples"][3])
    told = outcomes["another_recipe"][3]
    assert "rank 1 on" in told and "different recipe than rank 0 (optim.lr 0.1 -> 0.2)" in told
    for case in ("killed_at_the_end", "killed_reading"):
        assert outcomes[case][3].startswith("rank 0: another rank ended without reporting an error (")
        assert "same command resumes" in outcomes[case][3] and "gloo" not in outcomes[case][3]
    assert outcomes["one_breaks"][3] == "rank 1: [Errno 28] No space left on device"
