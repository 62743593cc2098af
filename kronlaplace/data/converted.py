"""Loaders of batches in any form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

__all__ = ["ConvertedLoader"]


class ConvertedLoader:
    """A loader whose batches a function turns into ``(inputs, targets)``, in every pass over it.

        >>> data = kl.ConvertedLoader(loader, lambda batch: (batch.image, batch.label))  # doctest: +SKIP

    It can be read as often as the loader, which it never copies. Whatever else it is asked for (``sampler``,
    ``dataset``, ``generator``) it takes from the loader.

    Args:
        loader: A loader, such as a `torch.utils.data.DataLoader`.
        convert: Function of one batch, as the loader yields it, that returns a batch as `KronLaplace.fit` takes it: a pair
            ``(inputs, targets)``, or inputs alone.

    Raises:
        TypeError: If the loader can be read only once, or ``convert`` is not a function.
    """

    def __init__(self, loader: Iterable[Any], convert: Callable[[Any], Any]) -> None:
        if isinstance(loader, Iterator) or not isinstance(loader, Iterable):
            raise TypeError(
                f"loader must be a loader that can be read again and again, such as a DataLoader or a list; got "
                f"{type(loader).__name__}. Convert what a generator yields in the generator itself."
            )
        if not callable(convert):
            raise TypeError(f"convert must be a function of a batch, got {convert!r}.")
        self._loader = loader
        self._convert = convert

    def __iter__(self) -> Iterator[Any]:
        return map(self._convert, self._loader)

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]  # raises TypeError if it has none

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._loader, name)
