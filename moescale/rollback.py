"""What a run does about a loss spike, or a step that is not finite: it stops, skips the update or goes back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from moescale.audit import Audit
from moescale.checkpoint.store import find_damage, latest_checkpoint, put_aside, read_state, up_to
from moescale.checkpoint.together import Failed, Ranks
from moescale.config import Config, ConfigError, TrainingError
from moescale.data.batches import Batches, Position
from moescale.parallel.mesh import Mesh
from moescale.saving import Saver
from moescale.spec.model import describe
from moescale.spikes import Spikes, around, is_finite


@dataclass(frozen=True)
class Decision:
    """What follows from the last steps.

    back_to: the checkpoint to go back to, if any. notes: what happened. around: whether the batches that were seen
    since are left out.
    """

    back_to: Path | None = None
    notes: tuple[str, ...] = ()
    around: bool = True


class Rollbacks:
    """Decides after each stretch of steps how a run goes on, the same on every rank.

    state: as a checkpoint says it. spoilt: names the weights whose gradients on this rank were not finite first.
    saver: writes the checkpoints, of which one under way is waited for before the run goes back. report: is told, in a
    sentence, of checkpoints that are damaged.
    """

    def __init__(
        self, config: Config, mesh: Mesh, run_dir: Path, state: Mapping[str, Any], *, spoilt: Callable[[], list[str]],
        saver: Saver, report: Callable[[str], None],
    ) -> None:
        self.config, self.mesh, self.run_dir, self.spoilt, self.saver = config, mesh, run_dir, spoilt, saver
        self._report = report
        self.spikes = Spikes(config.spikes, state)
        self.skips = config.spikes.on_not_finite == "skip"  # whether the engine leaves updates out
        self._skipped_in_a_row = 0

    @property
    def goes_back(self) -> bool:
        """Whether the run may go back at all."""
        return self.spikes.looks or self.config.spikes.on_not_finite == "back"

    @property
    def count(self) -> int:
        """How often the run went back so far."""
        return self.spikes.known.rollbacks

    @property
    def state(self) -> dict[str, Any]:
        """What belongs to a checkpoint."""
        return {"losses": astuple(self.spikes.known)} if self.goes_back else {}

    def decide(self, first: int, steps: Sequence[tuple[float, float]]) -> Decision:
        """Look at the steps after step `first`. steps: the loss and the gradient's norm of each

        Raises TrainingError where the run ends. All ranks must call.
        """
        *finite, saved = self._hold_everywhere([*map(is_finite, steps), self.saver.spoilt is None])
        if not saved:
            self.saver.finish()  # of which this rank may not have heard yet
            return self.decide_save()
        if self.skips:
            notes = self._skip(first, steps, finite)
            end = len(steps)
        else:
            notes = ()
            end = finite.index(False) if False in finite else len(steps)
        places = [place for place in range(end) if finite[place]]
        losses = [steps[place][0] for place in places]
        spike = self._find_spike(losses)
        if spike is not None:
            at = first + places[spike] + 1
            what = f"loss spike: {losses[spike]:.3f} at step {at}"
            back_to = self._checkpoint_before(at, what)
            if back_to is not None:
                return Decision(back_to, (*notes, what))
            notes = (*notes, f"{what}, and {self._nowhere}, so that training goes on")
            self.spikes.take(losses[spike:])
        if end < len(steps):
            answer = self._answer(first + end + 1, self._blame(*steps[end]))
            return replace(answer, notes=(*notes, *answer.notes))
        return Decision(notes=notes)

    def decide_save(self) -> Decision:
        """Look whether weights or moments were to be saved that are no finite numbers, where all ranks know the same.

        Raises TrainingError where the run ends: an update that was done cannot be left out.
        """
        error = self.saver.spoilt
        if error is None:
            return Decision()
        what = f"{error.name} holds values that are no finite numbers, and nothing was saved"
        if self.skips:
            self._end(error.step, f"{what}; spikes.not_finite=skip cannot leave out an update that was done: write "
                      "spikes.not_finite=back")
        return self._answer(error.step, what, f"not finite: {error.name}, which was to be saved, at step {error.step}")

    def decide_held_out(self, step: int, losses: Mapping[str, float]) -> Decision:
        """Look at the losses on held-out text, which are the same on all ranks. Raises TrainingError."""
        if is_finite(losses.values()):
            return Decision()
        return self._answer(step, ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in losses.items()))

    def decide_audit(self, step: int, audit: Audit) -> Decision:
        """Compare the copies of weights and moments that ranks hold. Raises TrainingError; all ranks must call.

        Where they differ, no checkpoint since the last audit can be trusted, and whose copy was saved is not known.
        """
        sound = audit.sound
        what = audit.compare_copies(step)
        if what is None:
            return Decision()
        cause = f"audit of step {step}: {what}"
        if self.config.spikes.on_not_finite == "back":
            back_to = self._checkpoint_before(step, cause, highest=sound)
            if back_to is not None:
                return Decision(back_to, (cause,), around=False)
        raise TrainingError(f"{cause}; weights were last found sound after step {sound}: remove the checkpoints of "
                            f"later steps in {self.run_dir}/checkpoints and start again, without that host if it "
                            "happens again")

    def reorder(self, order: Callable[[Position], Batches], start: Position, step: int, left: Batches) -> Batches:
        """Order the data of a run that has gone back, around the batches that it has seen since.

        order: orders the text from a position. start: as the checkpoint has it. left: as they came to the steps done
        when the run went back, `step`.
        """
        return order(around(order(start), step, left, self.config.spikes.skip))

    def gone_back(self, checkpoint: Path) -> None:
        """Know what was known at this checkpoint."""
        self.spikes.gone_back(read_state(checkpoint))

    def _hold_everywhere(self, facts: Sequence[bool]) -> list[bool]:
        """Say of each fact whether it holds on all ranks, of which one may be damaged."""
        hold = torch.tensor(facts, dtype=torch.uint8, device=self.mesh.device)
        if self.mesh.world_group is not None:
            dist.all_reduce(hold, dist.ReduceOp.MIN, group=self.mesh.world_group)
        return [bool(each) for each in hold.tolist()]

    def _skip(
        self, first: int, steps: Sequence[tuple[float, float]], finite: Sequence[bool]
    ) -> tuple[str, ...]:
        """Count the updates that the engine has left out, and say so. Raises TrainingError for too many in a row."""
        notes = []
        for place, (step, good) in enumerate(zip(steps, finite, strict=True)):
            self._skipped_in_a_row = 0 if good else self._skipped_in_a_row + 1
            if self._skipped_in_a_row > self.config.spikes.most:
                self._end(first + place + 1, f"{self._blame(*step)}, after the updates of spikes.most="
                          f"{self.config.spikes.most} steps in a row were left out")
            if not good:
                notes.append(f"not finite: {self._blame(*step)} at step {first + place + 1}; its update is left out")
        return tuple(notes)

    def _find_spike(self, losses: Sequence[float]) -> int | None:
        """Give the place of the first spike, as rank 0 sees it: a damaged rank may see other losses."""
        if not self.spikes.looks:
            return None
        place = self.spikes.find(losses)
        told = torch.tensor(-1 if place is None else place, device=self.mesh.device)
        if self.mesh.world_group is not None:
            dist.broadcast(told, 0, group=self.mesh.world_group)
        return None if int(told) < 0 else int(told)

    def _answer(self, step: int, what: str, cause: str | None = None) -> Decision:
        """Go back from a step that is not finite, or end the run. cause: what is told then. Raises TrainingError."""
        if self.config.spikes.on_not_finite != "back":
            self._end(step, what)
        cause = cause or f"not finite: {what} at step {step}"
        back_to = self._checkpoint_before(step, cause)
        if back_to is None:
            self._end(step, f"{what}, and {self._nowhere}")
        return Decision(back_to, (cause,))

    def _checkpoint_before(self, step: int, what: str, highest: int | None = None) -> Path | None:
        """Find the last undamaged checkpoint to go back to, and put those aside that are found to be damaged.

        highest: its step at most; None is spikes.back before. What is newer stays: where none is found, it is the best
        there is. Raises TrainingError where the run went back too often, and ConfigError where one cannot be read.
        """
        most = self.config.spikes.most
        if self.count >= most:
            self._end(step, f"{what}, after the run went back spikes.most={most} times")
        self.saver.finish()
        highest = step - self.config.spikes.back if highest is None else highest
        ranks, damage = Ranks(self.mesh.world_group), dict[Path, str]()
        try:
            seen = ranks.together(lambda: up_to(self.run_dir, highest, self.config.checkpoint.every))
            names = ranks.gather([folder.name for folder in seen])[0]  # those that the first rank sees
            for folder in (self.run_dir / "checkpoints" / name for name in names):
                found = ranks.together(partial(find_damage, folder, ranks.rank, ranks.size))
                problem = next((each for each in ranks.gather(found) if each is not None), None)
                if problem is None:
                    self._put_aside(damage, f"the run goes back to {folder.name}")
                    return folder
                damage[folder] = problem
        except Failed as error:
            raise ConfigError(str(error)) from None
        self._put_aside(damage, "no checkpoint before it is whole")
        return None

    def _put_aside(self, damage: Mapping[Path, str], then: str) -> None:
        """Let rank 0 rename damaged checkpoints, and say so. then: what follows"""
        if self.mesh.rank == 0:
            for folder, problem in damage.items():
                self._report(f"{folder.name} is damaged: {problem}; {put_aside(folder)}, and {then}")

    @property
    def _nowhere(self) -> str:
        return f"no whole checkpoint lies spikes.back={self.config.spikes.back} steps before to go back to"

    def _blame(self, loss: float, grad_norm: float) -> str:
        """Say what is not finite, as a rank has it that sees it, and whose gradient of those backward came to first."""
        names = self.spoilt()
        mine = (loss, grad_norm, [] if is_finite((loss, grad_norm)) else names)
        told = Ranks(self.mesh.world_group).gather(mine)
        loss, grad_norm, _ = next((each for each in told if not is_finite(each[:2])), mine)
        found: dict[str, int] = {}
        for rank, (_, _, names) in reversed(list(enumerate(told))):
            found.update(dict.fromkeys(names, rank))
        said = f"loss {loss}, gradient norm {grad_norm}"
        if not found:
            return said
        order = {".".join(weight.name): place for place, weight in enumerate(describe(self.config).weights())}
        last = max(found, key=order.__getitem__)
        others = f" and those of {len(found) - 1} weights before it" if len(found) > 1 else ""
        where = "" if self.mesh.world_size == 1 else f" (rank {found[last]})"
        return f"{said}, of the gradients that of {last}{where}{others}"

    def _end(self, step: int, what: str) -> NoReturn:
        self.saver.finish()
        last = latest_checkpoint(self.run_dir)
        left = "no checkpoint was saved" if last is None else (
            f"the last checkpoint is {last}: remove it to go on from an earlier one if it diverges again")
        raise TrainingError(f"step {step}: {what}; try a lower optim.lr or a longer optim.warmup_steps; {left}")
