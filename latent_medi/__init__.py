"""latent-medi: metadata-guided latent diffusion for histopathology."""

import os
import sys

__version__ = "0.1.0"


def _leave_out_working_folder() -> None:
    """Have our commands import nothing that lies in the working folder, such as a ``scipy.py`` beside slides.

    ``python -m latent_medi…`` puts it first on the module path, and an empty entry in PYTHONPATH puts it there unasked.
    It stays where the package itself lies in it, or PYTHONPATH names it.
    """
    program = sys.argv[0] if getattr(sys, "argv", None) else ""
    # "-m" while Python looks for the module.
    module = program == "-m" and any(word.split(".")[0].endswith("latent_medi") for word in sys.orig_argv[1:])
    if not module and not os.path.basename(program).startswith("latent-medi"):
        return  # somebody else's program, which has its own path
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
    """diffusers imports bitsandbytes where it is installed, which then warns of kernels that nothing here uses."""
    import logging

    unused = "Failed to load CPU gemm_4bit_forward"
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.addFilter(lambda record: not str(record.msg).startswith(unused))


_leave_out_working_folder()  # before anything else is imported
_quieten_kernels()
