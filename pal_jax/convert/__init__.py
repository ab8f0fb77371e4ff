"""Checkpoints of the public PyTorch implementation, as models of this library.

`python -m pal_jax.convert --checkpoint=FILE --out=FOLDER`
"""

from pal_jax.convert.reference import Options, convert
from pal_jax.convert.state_dict import Matched, match, read_state_dict

__all__ = ['Matched', 'Options', 'convert', 'match', 'read_state_dict']
