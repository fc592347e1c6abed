"""The state of a training on disk: outside any declared output, and only ever used by its owner."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel

from stages.core.artifacts.files import replacing
from stages.core.artifacts.provenance import provenance
from stages.core.models.denoiser import Denoiser
from stages.core.training.early_stopping import KeptWeights

log = logging.getLogger(__name__)

Records = list[dict[str, Any]]

RUN_TIME = ("execution", "threads", "trackers", "work", "prompts_per_batch")
"""Arguments that change how a training runs and not what it ends with."""


def identity_of(stage: str, arguments: object, inputs: Sequence[Path]) -> str:
    """What names a training's state: all that decides its result, not how it runs."""
    made_by = provenance(stage, arguments, inputs)
    given = json.loads(made_by["sail_arguments"])
    decisive = {name: value for name, value in given.items() if name not in RUN_TIME}
    text = json.dumps({**made_by, "sail_arguments": decisive}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class TrainingState:
    """Weights, optimizer, scaler, average and kept weights of a training, saved and restored under an identity.

    Order, timesteps and noise follow from the step's number alone, so that no generator's state is
    needed besides. The record names the file of the weights and is written last.
    """

    def __init__(
        self,
        folder: Path,
        identity: str,
        policy: Denoiser,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        average: EMAModel | None,
        kept: KeptWeights,
    ) -> None:
        self.folder, self.identity = folder, identity
        self.policy, self.optimizer = policy, optimizer
        self.scaler, self.average, self.kept = scaler, average, kept
        self.saved_step = 0

    def restore(self) -> dict[str, Records]:
        """Load a saved state of the same identity; its records of steps and curve, or none."""
        record = self.folder / "state.json"
        if not record.is_file():
            return {"steps": [], "curve": []}
        saved = json.loads(record.read_text())
        if saved["identity"] != self.identity:
            log.info("%s holds the state of another training; starting afresh", self.folder)
            return {"steps": [], "curve": []}
        state = torch.load(self.folder / saved["weights"], map_location="cpu", weights_only=True)
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
            self.average.to(next(self.policy.parameters()).device)
        self.kept.saved = state["kept"]
        self.saved_step = len(saved["steps"])
        log.info("continuing from step %d (%s)", self.saved_step, self.folder)
        return {"steps": saved["steps"], "curve": saved["curve"]}

    def save(self, steps: Sequence[Mapping[str, Any]], curve: Sequence[Mapping[str, Any]]) -> None:
        """Save everything and the records so far; forget the state before."""
        name = f"step-{len(steps):06d}.pt"
        state = {
            "policy": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "kept": self.kept.saved,
        }
        with replacing(self.folder / name) as part, part.open("wb") as file:
            torch.save(state, file)  # to an open file: a full disk is named as such
        record = {
            "identity": self.identity,
            "weights": name,
            "steps": list(steps),
            "curve": list(curve),
        }
        with replacing(self.folder / "state.json") as part:
            part.write_text(json.dumps(record))
        for old in (*self.folder.glob("step-*.pt"), *self.folder.glob(".*.part")):
            if old.name != name:
                old.unlink()  # also what a killed training had half written
        self.saved_step = len(steps)
