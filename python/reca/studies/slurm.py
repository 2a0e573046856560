"""A study as SLURM job arrays: one array task for every task of the study, with one GPU or core each."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from reca.io.folders import write_atomically
from reca.studies.task import Task
from reca.studies.work import done

SCRIPT = """#!/bin/bash
# One task of a study: sbatch --array=0-N task.sbatch LIST, where line $SLURM_ARRAY_TASK_ID of LIST is the task's name.
# Submitted by submit.sh, which may be run again: interrupted tasks resume, finished ones return at once.
# `reca` must be on the PATH of every node, and this folder on a shared file system.
#SBATCH --job-name={name}
#SBATCH --ntasks=1
#SBATCH --cpus-per-task={cpus}
{gpus}#SBATCH --time=24:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --output={here}/%x_%A_%a.out
cd {cwd}
export OMP_NUM_THREADS={threads}
mapfile -t tasks < "$1"
exec srun {command} --task "${{tasks[$SLURM_ARRAY_TASK_ID]}}"
"""


def write(tasks: Sequence[Task], command: Sequence[str], out: Path, gpus: bool, name: str) -> Path:
    """Write task.sbatch, a list of task names per level, and submit.sh, which submits the levels in order.

    command: the arguments of this `reca study`, without --slurm. Returns the path of submit.sh.
    """
    out.mkdir(parents=True, exist_ok=True)
    here = out.resolve()
    script = SCRIPT.format(
        name=f"reca-{name}", cpus=8 if gpus else 1, gpus="#SBATCH --gpus-per-task=1\n" if gpus else "",
        threads=8 if gpus else 1, here=shlex.quote(str(here)), cwd=shlex.quote(str(Path.cwd())),
        command=shlex.join(command),
    )  # fmt: skip
    write_atomically(out / "task.sbatch", script)
    lines = [
        "#!/bin/bash",
        "# Submits the unfinished tasks of the study. Each array waits for the previous one. A task that depends on a",
        "# failed one ends with an error; all others and the report still run.",
        "set -eu",
        "before=",
    ]
    for number, names in enumerate(levels(tasks)):
        listed = here / f"tasks{number}.txt"
        write_atomically(listed, "".join(f"{one}\n" for one in names))
        lines.append(
            f"before=$(sbatch --parsable ${{before:+--dependency=afterany:$before}} --array=0-{len(names) - 1} "
            f"{shlex.quote(str(here / 'task.sbatch'))} {shlex.quote(str(listed))})"
        )
    report = f"cd {shlex.quote(str(Path.cwd()))} && {shlex.join(command)} --report"
    lines.append(f"sbatch ${{before:+--dependency=afterany:$before}} --ntasks=1 --wrap {shlex.quote(report)}")
    write_atomically(out / "submit.sh", "\n".join(lines) + "\n")
    (out / "submit.sh").chmod(0o755)
    return out / "submit.sh"


def levels(tasks: Sequence[Task]) -> list[list[str]]:
    """Group the names of unfinished tasks so that every task follows the groups of its dependencies."""
    depth: dict[str, int] = {}
    groups: list[list[str]] = []
    for task in tasks:
        depth[task.name] = max((depth[name] + 1 for name in task.after), default=0)
    for task in tasks:
        if done(task) is None:
            groups += [[] for _ in range(depth[task.name] + 1 - len(groups))]
            groups[depth[task.name]].append(task.name)
    return [group for group in groups if group]
