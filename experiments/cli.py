"""What the command lines share: their ``main``, how a user's mistake ends, and where compiled programs are kept."""

import contextlib
import functools
import linecache
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import jax
import tyro
from jax.experimental import checkify

from experiments import stopping

Result = TypeVar("Result")
COMPILED = Path("runs/compiled")  # Where commands keep compiled programs, unless told otherwise.
PACKAGES = ("s2sam_jax", "experiments", "__main__")


def command(main: Callable[[Any], Result]) -> Callable[..., Result]:
    """Makes a command of a function of ``arguments: Arguments``, whose fields are its options.

    It is called with a list of words, or with nothing for those of the process.
    """
    kind = get_type_hints(main)["arguments"]

    @functools.wraps(main)
    @one_line()
    def of_words(argv: Sequence[str] | None = None) -> Result:
        return main(tyro.cli(kind, prog=program(), args=argv))

    return of_words


def program() -> str | None:
    """How this process was started, for the help text: ``python -m experiments.train``, not the path of a file."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return None if spec is None else f"python -m {spec.name}"


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Ends a mistake of the user in its message and exit code 1; what nobody foresaw keeps its traceback.

    A mistake is a file that cannot be opened, a fault that ``checked`` finds, or an error that our own code raises,
    rather than a library that it calls. Ctrl-C and SIGTERM end in a line too, with the notes that the exception has
    got on its way, and the exit codes that shells have for them, 130 and 143. (Of several processes JAX keeps SIGTERM
    to itself.)
    """
    try:
        with stopping.stops_raise():
            yield
    except KeyboardInterrupt as stop:
        print("; ".join(["stopped", *getattr(stop, "__notes__", ())]), file=sys.stderr)
        sys.exit(128 + (signal.SIGTERM if isinstance(stop, stopping.Terminated) else signal.SIGINT))
    except OSError as error:
        sys.exit(f"error: {error}")
    except checkify.JaxRuntimeError as error:
        sys.exit(f"error: {textwrap.shorten(str(error), 1000)}")
    except (ValueError, TypeError, FloatingPointError) as error:
        if not _raised_by_us(error):
            raise
        sys.exit(f"error: {error}")


def _raised_by_us(error: BaseException) -> bool:
    """Whether a ``raise`` of ours made it: Python's own ``not enough values to unpack`` is a bug, in whatever file."""
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    ours = frame.f_globals.get("__name__", "").partition(".")[0] in PACKAGES
    return ours and linecache.getline(frame.f_code.co_filename, line).lstrip().startswith("raise ")


def keep_compiled(folder: Path, min_seconds: float = 0.5) -> None:
    """Keeps programs that took longer than this to compile in a folder, for the next run."""
    jax.config.update("jax_compilation_cache_dir", str(folder.resolve()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", min_seconds)
