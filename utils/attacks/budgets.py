"""What the attacks are called and what they may do: radii and steps, by dataset and norm."""

from dataclasses import dataclass
from typing import NamedTuple

from utils.lfr import Ball

GRADIENT_ATTACKS = ("FGSM", "PGD", "MPGD")
MINIMUM_NORM_ATTACKS = ("JSMA", "DDNL2", "point-wise")
LIBRARY_ATTACKS = ("AutoAttack", "Square")
ATTACKS = (*GRADIENT_ATTACKS, *MINIMUM_NORM_ATTACKS, *LIBRARY_ATTACKS)

MPGD_DECAY = 0.1  # the original's; Dong et al. use 1.0
JSMA_THETA, JSMA_GAMMA = 1.0, 0.4  # the original's
DDN_STEPS = 20  # the original's
SQUARE_QUERIES = 5000  # AutoAttack's


class Defaults(NamedTuple):
    """The gradient attacks in one norm; lengths in units of pixel intensity."""

    epsilon: float
    step_size: float  # at this epsilon
    pgd_steps: int
    mpgd_steps: int


class Family(NamedTuple):
    """The defaults of datasets that are attacked alike."""

    l_inf: Defaults
    l_2: Defaults
    l0_radius: int  # changed values (pixels x channels) at which JSMA and point-wise are stated
    l2_radius: float  # L2 distance at which DDNL2 is stated
    pointwise_starts: int  # noise images from which point-wise starts


# GREY's two radii are those of Schott et al. 2018.
GREY = Family(Defaults(0.3, 0.01, 40, 40), Defaults(1.5, 0.1, 40, 40), 12, 1.5, 10)
SVHN = Family(Defaults(0.031, 0.007, 20, 20), Defaults(0.5, 0.1, 20, 20), 24, 0.5, 3)
COLOUR = Family(Defaults(0.031, 0.007, 10, 20), Defaults(0.5, 0.125, 10, 20), 24, 0.5, 3)


def family(dataset: str, in_channels: int) -> Family:
    """The defaults for a dataset's name; other names go by whether their images are grey."""
    if dataset.lower().startswith("svhn"):
        return SVHN
    return GREY if in_channels == 1 else COLOUR


@dataclass(frozen=True)
class Budget:
    """What a gradient attack may do; both lengths in units of pixel intensity."""

    norm: str
    epsilon: float
    num_steps: int
    step_size: float
    restarts: int = 1  # random starts per image
    random_start: bool = True  # start anywhere in the ball, else at the image, and once
    decay: float | None = None  # momentum

    def __str__(self) -> str:
        starts = f", {self.restarts} starts" if self.restarts > 1 else ""
        return f"{self.norm} {self.epsilon:.4g}, {self.num_steps} x {self.step_size:.4g}{starts}"

    @property
    def ball(self) -> Ball:
        return Ball(self.norm, self.epsilon)


class Settings(NamedTuple):
    """What the attacks may do; None stands for the defaults of the dataset and of each attack."""

    norm: str = "l_inf"
    epsilon: float | None = None
    num_steps: int | None = None
    step_size: float | None = None
    restarts: int = 1
    seed: int = 0


USUAL = Settings()


def gradient_budget(name: str, defaults: Family, settings: Settings = USUAL) -> Budget:
    """The budget of FGSM, PGD or MPGD; what is None comes from ``defaults``.

    A step size that is not given grows with epsilon. FGSM (one step of epsilon) and MPGD begin at
    the image itself, so they have no restarts.
    """
    norm, epsilon, num_steps, step_size, restarts, _ = settings
    own: Defaults = getattr(defaults, norm)
    radius = own.epsilon if epsilon is None else epsilon
    if name == "FGSM":
        return Budget(norm, radius, 1, radius, random_start=False)
    usual = {"PGD": own.pgd_steps, "MPGD": own.mpgd_steps}[name]
    steps = usual if num_steps is None else num_steps
    size = own.step_size * radius / own.epsilon if step_size is None else step_size
    if name == "MPGD":
        return Budget(norm, radius, steps, size, random_start=False, decay=MPGD_DECAY)
    return Budget(norm, radius, steps, size, restarts)


def percent(part: int | float, whole: int) -> float | None:
    """``part`` of ``whole`` in percent, None of nothing."""
    return 100.0 * part / whole if whole else None
