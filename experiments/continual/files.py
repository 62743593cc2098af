"""The files of runs, from which a program that was killed goes on."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from experiments.continual.sequence import Run
from kronlaplace._storage import load_tensors, save_tensors

KIND = "sequence of tasks"
SETTINGS = "settings.json"
RUNS = "runs"


class ChangedSettingsError(Exception):
    """A folder has runs with other settings."""


def prepare_folder(out, settings, fresh):
    """Make the folder of the runs, and check that those that it has are of the same settings.

    Args:
        out: The folder of all results.
        settings: All that changes the numbers of a run, JSON-compatible.
        fresh: Whether to delete the runs that are there.

    Raises:
        ChangedSettingsError: If there are runs with other settings.
    """
    path, runs = out / SETTINGS, out / RUNS
    if fresh:
        path.unlink(missing_ok=True)
        shutil.rmtree(runs, ignore_errors=True)
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [
            f"{key} was {before.get(key)} and is {settings.get(key)}"
            for key in {**before, **settings}
            if before.get(key) != settings.get(key)
        ]
        if changed:
            raise ChangedSettingsError(
                f"{out} has runs with other settings: {'; '.join(changed)}. Use the same settings to go on, another --out, "
                "or --fresh to delete these runs."
            )
    runs.mkdir(exist_ok=True)
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return runs


@dataclass(frozen=True)
class RunFiles:
    """The files of one run: its numbers and the weights after the last task, and the memory then.

    The optimizer and the order of the batches begin anew with each task, so nothing else is needed. The memory is written
    first, under a name of its own for each task, and counts once the other file has been replaced.
    """

    path: Path

    @classmethod
    def of(cls, folder, method, strength, seed):
        name = re.sub(r"[^a-z0-9]+", "-", method.lower()).strip("-")
        return cls(folder / f"{name}_strength_{strength:g}_seed_{seed}.safetensors")

    def read(self, model, method):
        """Return the run, the number of its tasks that are done, whether that is all, and the memory; None if there is none.

        The model gets the weights of then.
        """
        if not self.path.exists():
            return None
        tensors, values = load_tensors(self.path, KIND, "cpu")
        run, n_done = Run.from_tensors(tensors), values["tasks"]
        if values["is_finished"]:
            return run, n_done, True, None
        model.load_state_dict({name: tensors[f"weights/{name}"] for name in model.state_dict()})
        model.eval()
        memory = None if method is None else method.load(self._memory(n_done), model)
        return run, n_done, False, memory

    def write(self, run, n_done, is_finished, model, memory):
        tensors = run.to_tensors()
        if not is_finished:
            tensors |= {f"weights/{name}": tensor for name, tensor in model.state_dict().items()}
            if memory is not None:
                memory.save(self._memory(n_done))
        save_tensors(self.path, KIND, tensors, {"tasks": n_done, "is_finished": is_finished})
        for path in self.path.parent.glob(f"{self.path.stem}_memory_*"):
            if is_finished or path != self._memory(n_done):
                path.unlink()

    def _memory(self, n_done):
        return self.path.with_name(f"{self.path.stem}_memory_{n_done}.safetensors")
