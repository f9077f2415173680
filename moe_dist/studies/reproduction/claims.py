"""Claims of the paper beside the measured figures, against both baselines: the classic and the strong one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean

from moe_dist.studies.reproduction.figures import KindRow, row_of
from moe_dist.studies.reproduction.scales import BASELINES, DENSE


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        figure: name of the figure.
        against: rows of the baselines.
        compare: (ours, theirs) -> the number that the claim is about.
        reached: number -> whether the claim holds.
        form: format of the number.
        same: name of a figure that must be equal for the two to be comparable; None: they always are.
    """

    text: str
    figure: str
    against: tuple[str, ...]
    compare: Callable[[float, float], float]
    reached: Callable[[float], bool]
    form: str
    same: str | None = None


def _less(ours: float, theirs: float) -> float:
    return ours - theirs


def _change(ours: float, theirs: float) -> float:
    return ours / theirs - 1


CLAIMS = (
    Claim("validation loss not above, nats", "loss", BASELINES, _less, lambda x: x <= 0, "+.4f"),
    Claim("GLUE average not below, points", "glue", BASELINES, _less, lambda x: x >= 0, "+.2f"),
    Claim("parameters of the model -80 %", "parameters", BASELINES, _change, lambda x: x <= -0.8, "+.1%"),
    Claim("parameters of experts -80 %", "expert_parameters", BASELINES, _change, lambda x: x <= -0.8, "+.1%"),
    Claim("throughput +10 % to +20 %", "tokens_per_second", BASELINES, _change, lambda x: x >= 0.1, "+.1%"),
    Claim("bytes of all-to-alls lower", "bytes_per_token_layer", BASELINES, _change, lambda x: x < 0, "+.1%"),
    Claim(
        "cv2 of experts' loads more than 3 times lower, at as many copies of a token",
        "load_cv2",
        BASELINES,
        lambda ours, theirs: theirs / ours,
        lambda x: x > 3,
        ".2f",
        same="copies",
    ),
    Claim(
        "weights, gradients and training state in memory like a dense model's of the same active width",
        "training_bytes",
        (DENSE,),
        lambda ours, theirs: ours / theirs,
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
    """Return all claims for which `kind` and the baseline have comparable figures of the same seeds."""
    ours, found = row_of(table, kind), []
    for claim in CLAIMS:
        for baseline in claim.against:
            theirs = row_of(table, baseline)
            if ours is None or theirs is None:
                continue
            if claim.same and ours.middle(claim.same) != theirs.middle(claim.same):
                continue
            mine, base = ours.values.get(claim.figure, {}), theirs.values.get(claim.figure, {})
            pairs = [(mine[seed], base[seed]) for seed in sorted(mine) if seed in base]
            values = tuple(claim.compare(a, b) for a, b in pairs if a and b)
            if values:
                found.append(ClaimVerdict(claim, kind, baseline, values))
    return found
