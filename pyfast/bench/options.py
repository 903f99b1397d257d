"""What a benchmark run was asked to do."""

from __future__ import annotations

from dataclasses import dataclass

SUITES = ("losses", "sparse", "layers", "model")
DEVICES = ("cpu", "cuda")
MODELS = ("qwen2.5-0.5b", "qwen2.5-3b", "llama-3.2-1b", "llama-3.1-8b")


@dataclass(frozen=True)
class Options:
    """Options of a run.

    ``device`` is "cpu" or "cuda". ``quick`` takes small shapes and short budgets (for tests and a first
    look). ``threads`` sets torch's threads, None leaves them. ``models`` are published dimensions by name;
    ``model_path`` is a local Hugging Face checkpoint and, where given, is measured instead of ``models``.
    """

    device: str = "cpu"
    quick: bool = False
    threads: int | None = None
    models: tuple[str, ...] = ("qwen2.5-0.5b",)
    model_path: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise ValueError(f"device: {self.device!r} is unknown; accepted are {', '.join(DEVICES)}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads: at least 1 is needed, got {self.threads}")
        unknown = [name for name in self.models if name not in MODELS]
        if unknown:
            raise ValueError(
                f"models: {unknown[0]!r} is neither a directory nor one of the known dimensions: {', '.join(MODELS)}"
            )

    def budget(self, seconds: float) -> float:
        """A budget in seconds for one case: a fifth of it in a quick run."""
        return seconds / 5 if self.quick else seconds
