"""The errors that only models in Ray can have; each is also the gpusched error that it is a kind of.

All survive pickling. What the daemon answers comes as the classes of ``gpusched.errors``.
"""

from __future__ import annotations

from gpusched.errors import DeadlineExceeded, IllegalTransition, MechanismError, ProcessLost


class ModelFrozen(IllegalTransition):
    """A call on a frozen model whose policy is ``raise``. The call was not executed."""

    retryable = True


class DrainTimeout(DeadlineExceeded):
    """Calls were still under way when the time to drain was over. The model runs on as before."""


class HostLost(ProcessLost):
    """The connection to the model's host process broke: the host has ended."""


class HookFailed(MechanismError):
    """A model's ``before_freeze`` or ``after_thaw`` raised; the message has its text."""


class HostError(RuntimeError):
    """An exception in the host that cannot be pickled; its text is the original's, with its traceback."""
