"""Which model a command runs when none is named: the demo that a plugin bundles."""

from __future__ import annotations

from pathlib import Path

from mm_engine.plugins.discovery import default_model, demos


def choose_model(model: str | None) -> tuple[str, str | None]:
    """The model to run, and a remark if it was chosen among several.

    Raises:
        StartupError: none is named and no installed package bundles one.
    """
    if model is not None:
        return model, None
    chosen, bundled = default_model(), sorted(demos())
    remark = None
    if len(bundled) > 1:
        remark = f"several demos are installed ({', '.join(bundled)}): taking {chosen}"
    return chosen, remark


def other_demos(model: str) -> list[str]:
    """The bundled demos that could be served as well, if `model` is one of them."""
    bundled = sorted(demos())
    return [name for name in bundled if name != model] if model in bundled else []


def model_names(model: str) -> tuple[str, ...]:
    """The names under which a model is served by default: a folder's own name comes first."""
    folder = Path(model).expanduser()
    if model not in demos() and folder.is_dir():
        return (folder.resolve().name, model)
    return (model,)


def example_picture(checkpoint: Path) -> Path | None:
    """The picture that a checkpoint brings along to be asked about, if it does."""
    picture = checkpoint / "example.png"
    return picture if picture.is_file() else None
