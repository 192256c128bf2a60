"""The architectures that are timed: whose they are, our network, the plain one, and how many parameters it has."""

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import python_models as models
from bench import plain, plain_searched, record

Extras = tuple[Tensor, ...]


@dataclass(frozen=True)
class Sizes:
    """What is measured by default.

    B rows, K inputs, widths N and D, T tasks; E experts of MMoE, m own ones a task and s shared; J sub-networks, or
    blocks of a level; P domains; S subspaces; R modules of soft ordering. M = T*m + s.
    """

    B: int = 4096
    K: int = 256
    N: int = 256
    D: int = 128
    T: int = 4
    E: int = 8
    m: int = 2
    s: int = 1
    J: int = 4
    P: int = 4
    S: int = 2
    R: int = 3

    @property
    def legend(self) -> str:
        """What the letters of the formulas mean, and their values."""
        letters = " ".join(inspect.cleandoc(type(self).__doc__).split("\n\n")[1].split())
        return f"{letters} Measured: {', '.join(f'{name}={size}' for name, size in asdict(self).items())}."


TINY = Sizes(B=24, K=7, N=6, D=4, T=3, E=5, J=2, P=3, R=2)


@dataclass(frozen=True)
class Architecture:
    """What is measured: ours, its rival, and the number of parameters that the paper gives it.

    Attributes:
        paper: where its equations are.
        make: our network.
        rival: makes the plain network with the numbers of ours.
        parameters: a formula of the sizes.
        extras: what the networks take beside x.
        run: one call of ours; None calls it with x and the extras.
    """

    paper: str
    make: Callable[[Sizes], nn.Module]
    rival: Callable[[nn.Module], nn.Module]
    parameters: str
    extras: Callable[[Sizes], Extras] = lambda z: ()
    run: Callable[..., Tensor] | None = None

    def count(self, sizes: Sizes) -> int:
        """The formula's number."""
        return eval(self.parameters, {"__builtins__": {}}, asdict(sizes) | {"M": sizes.T * sizes.m + sizes.s})


def halves(z: Sizes) -> list[list[list[int]]]:
    """A tree: one block for all tasks, then one for each half of them."""
    tasks = list(range(z.T))
    return [[tasks], [tasks[: z.T // 2], tasks[z.T // 2 :]]]


def domains(z: Sizes) -> Extras:
    """Rows of all domains, mixed."""
    return (torch.randperm(z.B, generator=torch.Generator().manual_seed(2)) % z.P,)


def labels(z: Sizes) -> Extras:
    """Clicks, and conversions of some of them."""
    click, conversion = (torch.rand(2, z.B, generator=torch.Generator().manual_seed(2)) < 0.5).float()
    return click, click * conversion


def esmm(network: models.ESMM, x: Tensor, click: Tensor, conversion: Tensor) -> Tensor:
    """Our loss."""
    return network.loss(network(x), click, conversion)


MLP = "(K+1)*N + (N+1)*D"
ARCHITECTURES = {
    "SharedBottom": Architecture(
        "Caruana 1997", lambda z: models.SharedBottom(z.K, z.T, [z.N, z.D]), plain.SharedBottom, MLP
    ),
    "MMoE": Architecture(
        "Ma et al., KDD 2018", lambda z: models.MMoE(z.K, z.T, z.E, [[z.N, z.D]]), plain.mmoe, f"E*({MLP}) + T*E*(K+1)"
    ),
    "CGC": Architecture(
        "Tang et al., RecSys 2020",
        lambda z: models.CGC(z.K, z.T, z.m, z.s, [z.N, z.D]),
        plain.Units,
        f"M*({MLP}) + T*(m+s)*(K+1)",
    ),
    "PLE": Architecture(
        "Tang et al., RecSys 2020",
        lambda z: models.PLE(z.K, z.T, z.m, z.s, [[z.N], [z.D]]),
        plain.Units,
        f"M*({MLP}) + T*(m+s)*(K+1 + N+1) + M*(K+1)",
    ),
    "AdaTT-sp": Architecture(
        "Li et al., KDD 2023",
        lambda z: models.AdaTT(z.K, z.T, z.m, 0, [[z.N], [z.D]]),
        plain.Units,
        f"T*m*({MLP}) + T*T*m*(K+1 + N+1) + 2*T*m",
    ),
    "AdaTT": Architecture(
        "Li et al., KDD 2023",
        lambda z: models.AdaTT(z.K, z.T, z.m, z.s, [[z.N], [z.D]]),
        plain.Units,
        f"M*({MLP}) + M*((T+1)*(K+1) + T*(N+1)) + M + T*m",
    ),
    "SNRTrans": Architecture(
        "Ma et al., AAAI 2019",
        lambda z: models.SNRTrans(z.K, z.T, z.J, [[z.N], [z.D]]),
        plain_searched.SNR,
        "J*(K+1)*N + J*(J*N+1)*D + T*(J*D+1)*D + J*J + T*J",
    ),
    "SNRAver": Architecture(
        "Ma et al., AAAI 2019",
        lambda z: models.SNRAver(z.K, z.T, z.J, [[z.N], [z.D]]),
        plain_searched.SNR,
        f"J*({MLP}) + J*J + T*J",
    ),
    "STAR": Architecture(
        "Sheng et al., CIKM 2021",
        lambda z: models.STAR(z.K, z.P, [z.N, z.D]),
        plain.STAR,
        f"(P+1)*({MLP} + D+1 + 2*K) + P*8 + (8+1)*16 + 16+1",
        extras=domains,
    ),
    "CrossStitch": Architecture(
        "Misra et al., CVPR 2016",
        lambda z: models.CrossStitch(z.K, z.T, [[z.N], [z.D]]),
        plain.Stitched,
        f"T*({MLP}) + 2*T*T",
    ),
    "Sluice": Architecture(
        "Ruder et al., AAAI 2019",
        lambda z: models.Sluice(z.K, z.T, [[z.D], [z.D]], z.S),
        plain.Stitched,
        "T*((K+1)*D + (D+1)*D) + 2*(T*S)**2 + 2*T",
    ),
    "MTAN": Architecture(
        "Liu et al., CVPR 2019",
        lambda z: models.MTAN(z.K, z.T, [z.N, z.D]),
        plain.MTAN,
        "(K+1 + N+1)*N + (N+1 + D+1)*D + (N+3)*D + 2*T*(N+3)*N + T*(2*D+3 + D+3)*D",
    ),
    "ESMM": Architecture(
        "Ma et al., SIGIR 2018",
        lambda z: models.ESMM(z.K, [z.N, z.D]),
        plain.ESMM,
        f"2*({MLP} + D+1)",
        extras=labels,
        run=esmm,
    ),
    "MRN": Architecture(
        "Long et al., NeurIPS 2017",
        lambda z: models.MRN(z.K, z.T, [z.N], [z.D]),
        plain.Tasks,
        "(K+1)*N + T*((N+1)*D + D+1)",
    ),
    "UberNet": Architecture(
        "Kokkinos, CVPR 2017",
        lambda z: models.UberNet(z.K, z.T, [z.N, z.D]),
        plain.UberNet,
        f"{MLP} + T*(N+1 + D+1 + 2+1)",
    ),
    "BranchedMTL": Architecture(
        "Vandenhende et al., BMVC 2020",
        lambda z: models.BranchedMTL(z.K, z.T, [[z.N], [z.D]], halves(z)),
        plain_searched.Branched,
        "(K+1)*N + 2*(N+1)*D",
    ),
    "LearnedBranching": Architecture(
        "Guo et al., ICML 2020",
        lambda z: models.LearnedBranching(z.K, z.T, z.J, [[z.N], [z.D]]),
        plain_searched.LearnedBranching,
        f"J*({MLP}) + J*J + T*J",
    ),
    "SoftOrdering": Architecture(
        "Meyerson and Miikkulainen, ICLR 2018",
        lambda z: models.SoftOrdering(z.K, z.T, z.D, z.R),
        plain_searched.SoftOrdering,
        "T*(K+1)*D + R*(D+1)*D + R*T*R",
    ),
    "AdaShare": Architecture(
        "Sun et al., NeurIPS 2020",
        lambda z: models.AdaShare(z.K, z.T, [[z.D], [z.D]]),
        plain_searched.AdaShare,
        "(K+1)*D + K*D + (D+1)*D + 2*T*2",
    ),
    "SoftSharing": Architecture(
        "Duong et al., ACL 2015", lambda z: models.SoftSharing(z.K, z.T, [z.N, z.D]), plain.Tasks, f"T*({MLP})"
    ),
}
# Those that facebookresearch/AdaTT has, CGC as a PLE of one level.
ADATT_REPOSITORY = ("SharedBottom", "MMoE", "CGC", "PLE", "AdaTT-sp", "AdaTT", "CrossStitch")


def about(name: str) -> dict[str, Any]:
    """What is written about an architecture: {paper, file, lines, test, formula}; paths from the root."""
    path = Path(inspect.getsourcefile(type(ARCHITECTURES[name].make(TINY)))).relative_to(record.ROOT)
    lines = len((record.ROOT / path).read_text().splitlines())
    found = {"paper": ARCHITECTURES[name].paper, "file": path.as_posix(), "lines": lines}
    return found | {"test": f"tests/{path.parent}/test_{path.name}", "formula": ARCHITECTURES[name].parameters}
