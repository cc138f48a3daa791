"""Questions about latents in Python: `Questions(store, transcoder)`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evaluate.questions.contexts import Context, Contexts
    from evaluate.questions.questions import Questions

__all__ = ["Context", "Contexts", "Questions"]


def __getattr__(name: str) -> Any:
    """The names of `__all__`, when they are first asked for: they import torch, which takes 2 s."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from evaluate.questions import contexts, questions

    return getattr(contexts if hasattr(contexts, name) else questions, name)
