"""latent-medi: metadata-guided latent diffusion for histopathology."""

# No other import: the working folder is still on the module path here.
import os
import sys

__version__ = "0.1.0"


def __getattr__(name):
    """``MediPipeline``, which is imported when it is first asked for: torch and diffusers take seconds."""
    if name == "MediPipeline":
        import importlib

        return importlib.import_module("latent_medi.diffusion.pipeline").MediPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _leave_out_working_folder() -> None:
    """Remove the working folder from the module path of our commands, so that they do not import a user's ``scipy.py``.

    ``python -m latent_medi…`` and an empty entry in PYTHONPATH put the working folder there. It is kept if it contains
    this package, or if PYTHONPATH names it.
    """
    program = sys.argv[0] if getattr(sys, "argv", None) else ""
    # The program is "-m" while Python looks for the module.
    module = program == "-m" and any(word.split(".")[0].endswith("latent_medi") for word in sys.orig_argv[1:])
    if not module and not os.path.basename(program).startswith("latent-medi"):
        return  # another program that imports this package
    try:
        here = os.getcwd()
    except FileNotFoundError:  # it was removed
        return
    if os.path.samefile(here, os.path.join(os.path.dirname(__file__), os.pardir)):
        return
    if module and not sys.flags.safe_path and sys.path[:1] == [here]:
        del sys.path[0]
    listed = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if len(listed) > 1 and "" in listed and here not in {os.path.abspath(entry) for entry in listed if entry}:
        sys.path[:] = [entry for entry in sys.path if entry != here]


def _quieten_kernels() -> None:
    """Hide a warning of bitsandbytes, which diffusers imports if it is installed, about kernels that are not used."""
    import logging

    unused = "Failed to load CPU gemm_4bit_forward"
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.addFilter(lambda record: not str(record.msg).startswith(unused))


_leave_out_working_folder()  # before anything else is imported
_quieten_kernels()
