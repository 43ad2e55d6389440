"""loce: long-tailed instance segmentation in plain PyTorch (LOCE, ICCV 2021, and the methods it is compared with)."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["evaluate_lvis", "load_model"]


def __getattr__(name: str) -> Any:
    """Public functions are imported on first use, so that `import loce` stays fast."""
    if name == "evaluate_lvis":
        from loce.evaluation import evaluate_lvis

        return evaluate_lvis
    if name == "load_model":
        from loce.checkpoint.load import load_model

        return load_model
    raise AttributeError(f"module 'loce' has no attribute {name!r}")
