"""AdamW, or Muon on hidden matrices, over fp32 masters of whatever the model is held in."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qvl.data.deal import deal
from qvl.parallel.data_parallel import World, from_owners
from qvl.train.parameters import Rates, groups


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-4
    rates: Rates = field(default_factory=Rates)
    weight_decay: float = 0.1
    """On matrices and tables; norms and biases have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    muon_momentum: float = 0.95

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.weight_decay < 0:
            raise ValueError(
                f"lr is {self.lr} and weight_decay {self.weight_decay}; expected lr > 0, weight_decay >= 0."
            )


class Optimizer:
    """Holds an fp32 copy of each trainable parameter, gathers gradients there in fp32, and writes the parameters back after a step.

    Where the model itself is fp32 the copies are the parameters, so nothing is held twice. Replicas share out Muon's matrices: each rank
    orthogonalises its own and passes them on, for that is the costly part of a step.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, world: World) -> None:
        self.config, self.world = config, world
        self.parameters: dict[str, nn.Parameter] = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if half := next((n for n, p in self.parameters.items() if p.dtype == torch.float16), None):
            raise ValueError(
                f"{half} is float16, whose gradients underflow to zero without loss scaling; train in bfloat16 or float32."
            )
        self.masters: dict[str, Tensor] = {
            name: p if p.dtype == torch.float32 else p.detach().float() for name, p in self.parameters.items()
        }
        adam: list[dict[str, Any]] = []
        muon: list[dict[str, Any]] = []
        for group in groups(model):
            rate = config.lr * config.rates.of(group.part)
            if group.is_matrix and config.name == "muon":
                muon.append(
                    {"names": group.names, "params": [self.masters[n] for n in group.names], "lr": rate, "rate": rate}
                )
                continue
            # Norms and biases apart, so that weight decay leaves them alone.
            for is_vector in (False, True):
                names = tuple(n for n in group.names if (self.masters[n].ndim < 2) == is_vector)
                if names:
                    decay = 0.0 if is_vector else config.weight_decay
                    masters = [self.masters[n] for n in names]
                    adam.append({"names": names, "params": masters, "lr": rate, "rate": rate, "weight_decay": decay})
        self.inner: list[torch.optim.Optimizer] = []
        if adam:
            # One pass over memory instead of a dozen.
            self.inner.append(torch.optim.AdamW(adam, lr=config.lr, betas=config.betas, eps=config.eps, fused=True))
        self.owners: dict[str, int] = {}
        if muon and world.has_replicas:
            self.owners = shared_out({n: self.masters[n] for group in muon for n in group["names"]}, world.size)
        if muon:
            # match_rms_adamw scales an update to AdamW's size, so that one learning rate serves both (arXiv 2502.16982).
            self.inner.append(
                torch.optim.Muon(
                    muon,
                    lr=config.lr,
                    weight_decay=config.weight_decay,
                    momentum=config.muon_momentum,
                    adjust_lr_fn="match_rms_adamw",
                )
            )

    def gather(self) -> None:
        """Add the model's gradients to the masters', and clear them. Call after each backward."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is parameter or parameter.grad is None:
                continue
            grad = parameter.grad.float()
            master.grad = grad if master.grad is None else master.grad.add_(grad)
            parameter.grad = None

    def gradients(self) -> list[Tensor]:
        return [m.grad for m in self.masters.values() if m.grad is not None]

    def step(self, factor: float) -> None:
        """One update at `factor` times the configured rates.

        A parameter that no sample of the step reached has a gradient of zero, not none: momentum and decay then move it as they do on
        sharded ranks, where it always has one, so that N ranks stay equal to one.
        """
        for master in self.masters.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        for name, owner in self.owners.items():
            if owner != self.world.rank:
                self.masters[name].grad = None  # the optimizer passes over it
        for optimizer in self.inner:
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * factor
            optimizer.step()
        self._hand_round()
        self.write_back()
        self.clear()

    @torch.no_grad()
    def _hand_round(self) -> None:
        if self.owners:
            mine = [self.masters[name] for name in self.owners]
            for master, new in zip(mine, from_owners(mine, [*self.owners.values()], self.world), strict=True):
                master.copy_(new)

    @torch.no_grad()
    def write_back(self) -> None:
        """Masters into the model's dtype."""
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])

    def clear(self) -> None:
        """Drop gradients."""
        for name, master in self.masters.items():
            master.grad = None
            self.parameters[name].grad = None

    def state(self) -> dict[str, Tensor]:
        """Every tensor a resume needs, as `kind/parameter`: masters, and each optimizer's moments and counters. All ranks call it."""
        out = {f"master/{n}": m.detach() for n, m in self.masters.items() if m is not self.parameters[n]}
        for optimizer, name, master in self._slots():
            for kind, value in optimizer.state.get(master, {}).items():
                out[f"{kind}/{name}"] = value if isinstance(value, Tensor) else torch.tensor(value)
        if self.owners:
            kinds = [f"momentum_buffer/{name}" for name in self.owners]
            held = [
                out.get(kind, torch.zeros_like(self.masters[n])) for kind, n in zip(kinds, self.owners, strict=True)
            ]
            out |= dict(zip(kinds, from_owners(held, [*self.owners.values()], self.world), strict=True))
        return out

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """From `state` of a run with the same trainable parameters. Its tensors are asked for one at a time, and copied."""
        by_name: dict[str, set[str]] = {}
        for key in state:
            kind, name = key.split("/", 1)
            by_name.setdefault(name, set()).add(kind)
        if unknown := sorted(set(by_name) - set(self.masters)):
            raise ValueError(
                f"the checkpoint holds optimizer state of {unknown[0]}, which is not trained here; resume the same recipe."
            )
        for optimizer, name, master in self._slots():
            found = by_name.get(name, set())
            if (master is not self.parameters[name]) != ("master" in found):
                raise ValueError(
                    f"the checkpoint and this run differ in the fp32 master of {name}: one of them freezes it, or holds another dtype; "
                    "resume the same recipe."
                )
            if "master" in found:
                master.copy_(state[f"master/{name}"])
            found = found - {"master"}
            kinds = (
                {"momentum_buffer"} if isinstance(optimizer, torch.optim.Muon) else {"step", "exp_avg", "exp_avg_sq"}
            )
            if found and found != kinds:
                raise ValueError(
                    f"the checkpoint holds {', '.join(sorted(found))} for {name}, this run's optimizer wants {', '.join(sorted(kinds))}; "
                    "resume with the same optimizer."
                )
            if found:
                # The fused AdamW wants its counter where the parameter is.
                optimizer.state[master] = {
                    kind: state[f"{kind}/{name}"].to(master.device, copy=True) for kind in sorted(found)
                }
        self.write_back()

    def _slots(self) -> Iterator[tuple[torch.optim.Optimizer, str, Tensor]]:
        for optimizer in self.inner:
            for group in optimizer.param_groups:
                for name, master in zip(group["names"], group["params"], strict=True):
                    yield optimizer, name, master


def shared_out(matrices: Mapping[str, Tensor], ranks: int) -> dict[str, int]:
    """Name -> the rank that orthogonalises it."""
    names = sorted(matrices)
    hands = deal([matrices[name].numel() * min(matrices[name].shape) for name in names], ranks)
    return {names[i]: rank for rank, hand in enumerate(hands) for i in hand}
