"""Reproduction on a SLURM cluster: predicted cost, and job arrays."""

from collections.abc import Callable

from rich.console import Console

from moe_dist.errors import ConfigError
from moe_dist.simulator.hardware import Fabric, device_named
from moe_dist.studies.reproduction import estimate
from moe_dist.studies.reproduction import evaluations as evaluate
from moe_dist.studies.reproduction.cells import main_cells
from moe_dist.studies.reproduction.run import ReproductionPlan, best_rates, known_grid
from moe_dist.studies.runner import known
from moe_dist.studies.scaling.slurm import array_job, array_jobs

MOST_NODES_IN_A_POD = 32


def show_cost(plan: ReproductionPlan, gpu: str, nodes: int, console: Console) -> None:
    """Predict the cost of one training of each kind, and of all.

    Raises:
        ConfigError: the GPU is unknown, or the ranks cannot be divided over the nodes.
    """
    per_node = _ranks_per_node(plan, nodes)
    fabric = Fabric(device_named(gpu), nodes, per_node, per_node, min(nodes, MOST_NODES_IN_A_POD), 1.0)
    found = estimate.costs(main_cells(plan.setting, plan.kinds, 1, {}), fabric)
    estimate.render(found, plan.seeds, f"{nodes} node(s) of {per_node} {gpu}", console)


def write_arrays(plan: ReproductionPlan, nodes: int, say: Callable[[str], None], gpus: bool = False) -> None:
    """Write the missing parts as sbatch scripts, the next ones to submit: the grid, then trainings, then evaluations.

    A training that is started again resumes from its newest checkpoint.

    Args:
        gpus: the printed commands ask for one GPU per rank.

    Raises:
        ConfigError: the ranks cannot be divided over the nodes.
    """
    per_node = _ranks_per_node(plan, nodes)
    plan.folder.mkdir(parents=True, exist_ok=True)
    grid = [cell for cell in plan.grid_cells if known(cell, plan.folder) is None]
    cells = [] if grid else main_cells(plan.setting, plan.kinds, plan.seeds, best_rates(known_grid(plan)))
    scripts = {f"grid-{name}": text for name, text in array_jobs(grid, plan.folder).items()}
    scripts.update({f"train-{name}": text for name, text in array_jobs(cells, plan.folder).items()})
    words = plan.words
    trained = [cell for cell in cells if (outcome := known(cell, plan.folder)) and outcome.summary]
    waiting = {
        cell.name: evaluate.command_words(cell, plan.folder, words)
        for cell in trained
        if words and evaluate.known(cell, plan.folder, words) is None
    }
    if waiting:
        scripts["evaluate.sbatch"] = array_job("eval", plan.setting.scale.ranks, waiting, plan.folder)
    size = f"--nodes={nodes} --ntasks-per-node={per_node}{f' --gpus-per-node={per_node}' if gpus else ''}"
    for name, text in scripts.items():
        (plan.folder / name).write_text(text, encoding="utf-8")
        say(f"sbatch {size} {plan.folder / name}")
    if scripts:
        say(
            "Submit these with your own --account, --partition and --time; then run this command "
            "again for the next parts and the results."
        )


def _ranks_per_node(plan: ReproductionPlan, nodes: int) -> int:
    per_node, left = divmod(plan.setting.scale.ranks, nodes)
    if left:
        raise ConfigError(
            f"--nodes {nodes} does not divide the {plan.setting.scale.ranks} ranks of --scale {plan.setting.scale.name}"
        )
    return per_node
