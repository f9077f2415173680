"""Claims of the paper beside the measured figures, against both baselines: the classic and the strong one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean

from moe_dist.studies.reproduction.figures import KindRow, row_of
from moe_dist.studies.reproduction.scales import CLASSIC, STRONG

DENSE = "dense"


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        figure: name of the figure.
        against: rows of the baselines.
        compare: (ours, theirs) -> the number that the claim is about.
        reached: number -> whether the claim holds.
        form: format of the number.
    """

    text: str
    figure: str
    against: tuple[str, ...]
    compare: Callable[[float, float], float]
    reached: Callable[[float], bool]
    form: str


BASELINES = (CLASSIC, STRONG)
CLAIMS = (
    Claim("validation loss not above, nats", "loss", BASELINES, lambda a, b: a - b, lambda x: x <= 0, "+.4f"),
    Claim("GLUE average not below, points", "glue", BASELINES, lambda a, b: a - b, lambda x: x >= 0, "+.2f"),
    Claim(
        "experts' parameters -80 %", "expert_parameters", BASELINES, lambda a, b: a / b - 1, lambda x: x <= -0.8, "+.1%"
    ),
    Claim(
        "throughput +10 % to +20 %", "tokens_per_second", BASELINES, lambda a, b: a / b - 1, lambda x: x >= 0.1, "+.1%"
    ),
    Claim(
        "load variance more than 3 times lower", "load_variance", BASELINES, lambda a, b: b / a, lambda x: x > 3, ".2f"
    ),
    Claim(
        "peak resident memory, libraries included, like a dense model's",
        "peak_rss_bytes",
        (DENSE,),
        lambda a, b: a / b,
        lambda x: x <= 1.1,
        ".2f",
    ),
)


@dataclass(frozen=True)
class ClaimVerdict:
    """Result of a claim for one kind against one baseline.

    Attributes:
        values: one number for each seed that both have, in order.
    """

    claim: Claim
    kind: str
    baseline: str
    values: tuple[float, ...]

    @property
    def reached(self) -> bool:
        """True if the claim holds for the mean over seeds."""
        return self.claim.reached(mean(self.values))

    def __str__(self) -> str:
        form = self.claim.form
        shown = f"{mean(self.values):{form}}"
        if len(self.values) > 1:
            shown += f" ({min(self.values):{form}} to {max(self.values):{form}})"
        return f"{shown}: {self._word}"

    @property
    def _word(self) -> str:
        """Return yes or no, with a remark if single seeds disagree with the mean."""
        if not self.reached:
            return "not reached"
        return "reached" if all(map(self.claim.reached, self.values)) else "reached on average, not in every seed"


def verdicts(table: Sequence[KindRow], kind: str) -> list[ClaimVerdict]:
    """Return all claims for which `kind` and the baseline have figures of the same seeds."""
    ours, found = row_of(table, kind), []
    for claim in CLAIMS:
        for baseline in claim.against:
            theirs = row_of(table, baseline)
            if ours is None or theirs is None:
                continue
            mine, base = ours.values.get(claim.figure, {}), theirs.values.get(claim.figure, {})
            pairs = [(mine[seed], base[seed]) for seed in sorted(mine) if seed in base]
            values = tuple(claim.compare(a, b) for a, b in pairs if a and b)
            if values:
                found.append(ClaimVerdict(claim, kind, baseline, values))
    return found
