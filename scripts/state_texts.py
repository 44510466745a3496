"""What the states and triggers of a process mean, for people: the texts of docs/states.md."""

from __future__ import annotations

from gpusched.domain.states import ProcState, Trigger

#: What a state means, for people. A state without a line here is an error (see ``states``).
STATES: dict[ProcState, str] = {
    ProcState.STARTING: "Its supervisor was asked to start it; no outcome yet.",
    ProcState.ACTIVE: "It runs, or may run, on its GPUs.",
    ProcState.FREEZING: "A freeze is under way. It cannot be cancelled, only waited for.",
    ProcState.FROZEN: "Its VRAM is in host RAM, its CPU threads are stopped, its GPUs are free but for a kept context.",
    ProcState.THAWING: "A thaw is under way. It cannot be cancelled, only waited for.",
    ProcState.HIBERNATING: "An image of it is being written. For a hibernation it ends when that is committed.",
    ProcState.HIBERNATED: "It is on disk: no process, no RAM, no VRAM. Its image survives restarts and reboots.",
    ProcState.WAKING: "Its processes are coming back from the image, which stays until they run.",
    ProcState.FAILED: "The driver says that it is neither running nor restorable, or will not say.",
    ProcState.DEAD: "Its main process has ended. The entry keeps its name until `kill` or the owner's next `run`.",
}

#: What a trigger means.
TRIGGERS: dict[Trigger, str] = {
    Trigger.STARTED: "the command was executed, or the process adopted",
    Trigger.FREEZE: "a freeze begins",
    Trigger.DEEPEN: "the context that it has kept begins to leave the GPU",
    Trigger.DEEPENED: "its context has left the GPU",
    Trigger.THAW: "a thaw begins",
    Trigger.HIBERNATE: "a hibernation begins",
    Trigger.WAKE: "it begins to come back from disk",
    Trigger.SAVE: "an image for copies of it is begun",
    Trigger.RETREAT: "what has just come from disk goes back there",
    Trigger.SAVED: "the image for copies is complete",
    Trigger.DONE: "the move ended at its goal",
    Trigger.ROLLED_BACK: "the move failed and was taken back whole",
    Trigger.LOST: "the move failed and could not be taken back",
    Trigger.EXITED: "the main process ended",
    Trigger.FOUND_ACTIVE: "a look at the driver showed it running",
    Trigger.FOUND_FROZEN: "a look at the driver showed its contents off the GPU",
    Trigger.FOUND_HIBERNATED: "its image is complete and it does not run",
    Trigger.FOUND_BROKEN: "a look at the driver showed neither",
}
