"""SLURM job arrays of a study: one script for each number of ranks, one array task for each missing cell."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from moe_dist.benchmarks.subruns import read_summary
from moe_dist.studies.runner import StudyCell


def array_jobs(cells: Sequence[StudyCell], folder: Path, python: str = sys.executable) -> dict[str, str]:
    """Return file name -> text of the sbatch scripts that run the cells missing in `folder`.

    Tasks of one array run one at a time (`%1`), so that cells do not disturb each other; ranks use a rendezvous file in
    `folder`, which all nodes must share, with Python and the configuration. Resources beyond the number of tasks
    (partition, GPUs, time) are given on sbatch's command line, which wins over the file.
    """
    missing = [cell for cell in cells if not cell.refusal and read_summary(cell.result_file(folder)) is None]
    by_ranks: dict[int, list[StudyCell]] = {}
    for cell in missing:
        by_ranks.setdefault(cell.ranks, []).append(cell)
    return {
        f"study-{ranks}.sbatch": array_job(
            "train", ranks, {c.name: c.train_words(folder) for c in held}, folder, python
        )
        for ranks, held in by_ranks.items()
    }


def array_job(
    command: str, ranks: int, tasks: Mapping[str, Sequence[str]], folder: Path, python: str = sys.executable
) -> str:
    """Return the text of an sbatch script that runs `moe-dist <command> WORDS` for each task on so many ranks."""
    home = folder.absolute()
    cases = "\n".join(
        f"{index}) words=({shlex.join(words)}) ;;  # {name}" for index, (name, words) in enumerate(tasks.items())
    )
    return f"""#!/bin/bash
#SBATCH --job-name=moe-dist-study-{ranks}
#SBATCH --ntasks={ranks}
#SBATCH --array=0-{len(tasks) - 1}%1
#SBATCH --chdir={shlex.quote(str(Path.cwd()))}
#SBATCH --output={shlex.quote(str(home))}/slurm-%A_%a.out
set -eu
case "$SLURM_ARRAY_TASK_ID" in
{cases}
*) echo "no cell $SLURM_ARRAY_TASK_ID" >&2; exit 2 ;;
esac
rendezvous=$(mktemp -d {shlex.quote(str(home))}/rendezvous-XXXXXX)
trap 'rm -rf "$rendezvous"' EXIT
export MOE_DIST_INIT_METHOD="file://$rendezvous/ranks"
srun --kill-on-bad-exit=1 {shlex.quote(python)} -m moe_dist {command} "${{words[@]}}"
"""
