"""The parts of the rehearsal at full size, see ``rehearsal.py``."""
