"""Objects that ranks send each other are signed with the group's key, and unpickled only if the signature is right.

torch's collectives of objects (`broadcast_object_list`, `all_gather_object`, …), which Megatron and torch's checkpoints
use too, pickle with two names of one module; both are replaced here, for the whole process. Needs torch.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

from torch.distributed import distributed_c10d

from vime.system.handshake import SIGNATURE_BYTES, same, sign

_WHAT = b"object"


class UnsignedObject(RuntimeError):
    """An object came over a group that no rank of this run sent."""


def sign_objects(key: bytes) -> None:
    """From now on objects are sent signed, and others are refused with UnsignedObject."""

    class Pickler:
        def __init__(self, file: Any) -> None:
            self._file = file

        def dump(self, item: Any) -> None:
            content = pickle.dumps(item)
            self._file.write(sign(key, _WHAT, content) + content)

    class Unpickler:
        def __init__(self, file: Any) -> None:
            self._content = file.read()

        def load(self) -> Any:
            signature, content = self._content[:SIGNATURE_BYTES], self._content[SIGNATURE_BYTES:]
            if not same(signature, sign(key, _WHAT, content)):
                raise UnsignedObject("an object without the run's signature came over a process group: not unpickled")
            return pickle.load(io.BytesIO(content))

    for name, replacement in (("_pickler", Pickler), ("_unpickler", Unpickler)):
        getattr(distributed_c10d, name)  # an AttributeError with a torch that pickles in another way
        setattr(distributed_c10d, name, replacement)


def leave_objects_unsigned() -> None:
    """Undo `sign_objects`."""
    for name, original in (("_pickler", pickle.Pickler), ("_unpickler", pickle.Unpickler)):
        setattr(distributed_c10d, name, original)
