"""Kill training at random moments and start it again, many times: `python -m tests.faults.kills --kills 200`.

A chain is one run folder: the same command is started, killed, started, killed, and in the end left to finish. Signals
go to one rank or to all, after a random time or as soon as a checkpoint is being written. Printed is a table: what was
lost, whether the result has the bits of an uninterrupted run, what is left over, and which exit codes were wrong.

The ranks are forks of this process, so that everything is imported once; as torchrun does, it ends the other ranks
when one has died: SIGTERM, and SIGKILL after a grace period.
"""

import argparse
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import load_file

from reca import checkpoint, exits
from reca.cli import main as reca
from reca.io import jsonl
from reca.models import umm_package
from reca.runs.status import Status
from reca.trainer import Trainer  # noqa: F401  # imported here once, and not by every fork
from tests.driver.forks import fork_ranks

STEPS, EVERY = 24, 5  # of a run, and between its checkpoints
MOST_LOST = 2 * EVERY  # steps: the next checkpoint waits until the one before is written
GRACE = 10.0  # seconds from SIGTERM to SIGKILL, for the ranks that are left
ENDLESS = 120.0  # seconds after which a start has hung


@dataclass(frozen=True)
class Kill:
    ranks: int
    signal: signal.Signals
    whom: str  # one or all
    when: str  # any time, or while saving

    def __str__(self) -> str:
        return f"{self.ranks} rank{'s' * (self.ranks > 1)}, {self.signal.name} to {self.whom}, {self.when}"


KILLS = [
    Kill(ranks, number, whom, when)
    for ranks, number, whom, when in product(
        (1, 2), (signal.SIGTERM, signal.SIGKILL), ("one", "all"), ("any time", "while saving")
    )
    if not (ranks == 1 and whom == "one")
]


@dataclass
class Tally:
    """What came of one form of kill."""

    kills: int = 0
    missed: int = 0  # the run had ended before the signal came; not counted among the kills
    lost: list[int] = field(default_factory=list)  # steps to make again
    wrong: list[str] = field(default_factory=list)  # exit codes, states, hangs


@dataclass
class Chains:
    """What came of whole runs."""

    count: int = 0
    other_bits: int = 0
    left_over: list[str] = field(default_factory=list)


def command(run_dir: Path) -> list[str]:
    return [
        "train", "show_o_tiny", "data.images=reca.toy_datasets.shapes:unlabeled?seed=0", "objective.i2t.weight=0",
        "data.workers=0",
        "objective.reca.batch_size=4", "objective.reca.micro_batch=2", f"train.steps={STEPS}", "train.threads=1",
        f"checkpoint.every={EVERY}", "log.every=1", "log.tensorboard=false", f"run_dir={run_dir}",
        "parallel.timeout_minutes=1",
    ]  # fmt: skip


def start(run_dir: Path, ranks: int) -> list[int]:
    """Fork the ranks of one start; their process ids."""

    def work(rank: int) -> int:
        for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
            target = os.open(run_dir.with_suffix(f".{name}"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(target, stream.fileno())
        return reca(command(run_dir))

    return fork_ranks(ranks, work)


def wait(children: list[int], timeout: float) -> dict[int, int]:
    """Exit codes of the children that end in time, negative for signals, by process id."""
    codes, end = {}, time.monotonic() + timeout
    while len(codes) < len(children) and time.monotonic() < end:
        for child in children:
            if child not in codes and (ended := os.waitpid(child, os.WNOHANG))[0]:
                codes[child] = os.waitstatus_to_exitcode(ended[1])
        time.sleep(0.002)
    return codes


def finish(children: list[int], struck: bool) -> list[int | None]:
    """Wait for every rank, ending those that are left when one has died. None: it hung until it was killed."""
    codes = wait(children, ENDLESS) if not struck else {}
    end = time.monotonic() + ENDLESS
    while len(codes) < len(children) and time.monotonic() < end:
        codes |= wait([c for c in children if c not in codes], 0.01)
        if any(codes.values()):
            for child in children:
                if child not in codes:
                    os.kill(child, signal.SIGTERM)
            codes |= wait([c for c in children if c not in codes], GRACE)
            break
    hung = [c for c in children if c not in codes]
    for child in hung:
        os.kill(child, signal.SIGKILL)
    wait(hung, 5)
    return [codes.get(child) for child in children]


def strike(kill: Kill, children: list[int], run_dir: Path, dice: random.Random, usual: float) -> bool:
    """Send the signal when its moment has come; False if the run ended before."""
    end = time.monotonic() + usual * dice.random()
    skip = dice.randrange(3) if kill.when == "while saving" else 0
    seen: set[str] = set()
    while True:
        if any(os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) for child in children):
            return False
        if kill.when == "while saving":
            seen |= {path.name for path in (run_dir / "checkpoints").glob("*.partial")}
            if len(seen) > skip:
                time.sleep(0.03 * dice.random())
                break
        elif time.monotonic() > end:
            break
        time.sleep(0.0005)
    for child in children if kill.whom == "all" else [dice.choice(children)]:
        os.kill(child, kill.signal)
    return True


def right(kill: Kill, codes: list[int | None], before: Status | None, after: Status | None) -> str | None:
    """What is wrong with the way a killed start ended, in words."""
    began = before.step if before else 0
    if kill.signal == signal.SIGKILL:
        if -signal.SIGKILL not in codes:
            return f"codes {codes}"
        # Before its first word a start leaves the status of the one before; a rank that is ended in the set-up, because
        # another was killed, has nothing to save and says so.
        if after == before or after.state == "failed" or (exits.INTERRUPTED in codes and after.step == began):
            return None
        return f"state {after.state} after SIGKILL"
    if None in codes:
        return f"hung: codes {codes}"
    if -signal.SIGTERM in codes:  # handlers were not set up yet: nothing has begun, and nothing is lost
        return None
    # A rank that is ended before its first step leaves the others without it: they fail, and the status stays.
    if kill.ranks > 1 and set(codes) == {exits.INTERRUPTED, exits.BUG} and after and after.step == began:
        codes = [exits.INTERRUPTED]
    if set(codes) not in ({exits.INTERRUPTED}, {exits.DONE}):
        return f"codes {codes}"
    wanted = "finished" if set(codes) == {exits.DONE} else "interrupted"
    if after is None or after.state != wanted:
        return f"state {after and after.state} with codes {codes}"
    return None


def status(run_dir: Path) -> Status | None:
    try:
        return Status.read(run_dir)
    except ValueError:
        return None


def done(run_dir: Path) -> int:
    """Steps that were made, saved or not."""
    return max((line["step"] for line in jsonl.read(run_dir / "log.jsonl") if "loss" in line), default=0)


def saved(run_dir: Path) -> int:
    newest = checkpoint.latest(run_dir)
    return 0 if newest is None else int(newest.name)


def bits(run_dir: Path) -> dict[str, bytes]:
    """The last checkpoint's tensors. Files differ, as safetensors writes its metadata in any order."""
    found = {}
    for path in checkpoint.latest(run_dir).rglob("*.safetensors"):
        found |= {f"{path.name}/{name}": tensor.numpy().tobytes() for name, tensor in load_file(path).items()}
    return found


def contents(run_dir: Path) -> set[str]:
    """All files but warnings; those of checkpoints without their numbers, as a run that was interrupted has others."""
    names = {path.relative_to(run_dir).as_posix() for path in run_dir.rglob("*") if path.name != "rank_1.log"}
    return {re.sub(r"^checkpoints/\d{6}", "checkpoints/N", name) for name in names}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--chain", type=int, default=5, help="kills of one run before it may finish")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    umm_package("show_o")
    dice, began = random.Random(options.seed), time.monotonic()
    root = Path(tempfile.mkdtemp(prefix="reca_kills_"))
    wanted, kept, usual = {}, {}, {}
    for ranks in (1, 2):
        run_dir, start_time = root / f"whole{ranks}", time.monotonic()
        codes = finish(start(run_dir, ranks), struck=False)
        assert codes == [0] * ranks, (codes, run_dir.with_suffix(".err").read_text())
        usual[ranks] = time.monotonic() - start_time
        wanted[ranks], kept[ranks] = bits(run_dir), contents(run_dir)

    tallies = {kill: Tally() for kill in KILLS}
    chains = Chains()
    while sum(t.kills for t in tallies.values()) < options.kills:
        ranks = 1 + chains.count % 2
        run_dir = root / f"chain{chains.count}"
        forms = [kill for kill in KILLS if kill.ranks == ranks]
        for _ in range(options.chain):
            kill = min(dice.sample(forms, len(forms)), key=lambda k: tallies[k].kills)
            tally, before = tallies[kill], status(run_dir)
            children = start(run_dir, ranks)
            struck = strike(kill, children, run_dir, dice, usual[ranks])
            codes = finish(children, struck)
            if not struck or codes == [0] * ranks:  # it had ended, or was just ending
                tally.missed += 1
                break
            tally.kills += 1
            tally.lost.append(done(run_dir) - saved(run_dir))
            if fault := right(kill, codes, before, status(run_dir)):
                tally.wrong.append(f"{run_dir.name}: {fault}")
        codes = finish(start(run_dir, ranks), struck=False)
        if codes != [0] * ranks:
            tallies[kill].wrong.append(f"{run_dir.name}: did not finish: codes {codes}")
            chains.count += 1
            continue
        chains.other_bits += bits(run_dir) != wanted[ranks]
        chains.left_over += sorted(f"{run_dir.name}/{name}" for name in contents(run_dir) - kept[ranks])
        if not chains.left_over and not chains.other_bits:
            shutil.rmtree(run_dir)
        chains.count += 1
    return report(tallies, chains, root, time.monotonic() - began)


def report(tallies: dict[Kill, Tally], chains: Chains, root: Path, seconds: float) -> int:
    print(f"{'':<44}{'kills':>6}{'lost, most':>12}{'mean':>7}{'wrong':>7}")
    for kill, tally in tallies.items():
        lost = tally.lost or [0]
        print(f"{kill!s:<44}{tally.kills:>6}{max(lost):>12}{sum(lost) / len(lost):>7.1f}{len(tally.wrong):>7}")
    every = [n for tally in tallies.values() for n in tally.lost]
    wrong = [fault for tally in tallies.values() for fault in tally.wrong]
    print(f"{'all':<44}{len(every):>6}{max(every):>12}{sum(every) / len(every):>7.1f}{len(wrong):>7}")
    print(
        f"{chains.count} runs of {STEPS} steps, a checkpoint every {EVERY}: {chains.other_bits} with other bits "
        f"than an uninterrupted run, {len(chains.left_over)} files left over; {seconds:.0f} s"
    )
    for fault in [*wrong, *chains.left_over]:
        print(f"  {fault}")
    bad = bool(wrong or chains.left_over or chains.other_bits or max(every) > MOST_LOST)
    print("kept in" if bad else "removed", root)
    if not bad:
        shutil.rmtree(root)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
