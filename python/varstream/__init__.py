"""Train transformers on real tokens only, and on long sequences in little memory.

Public names are re-exported here; each is documented where it is defined.
"""

from varstream._load import extension as _extension

__version__: str = _extension.build_info()["version"]
