"""What reca.data.dali takes of nvidia.dali 2.4's dynamic mode, on the CPU, with Pillow inside.

A batch fails as DALI's does: as a whole, with an error that is of use to nobody.
"""

import contextlib
import io
import sys
import types

import numpy as np
from PIL import Image


class Images:
    def __init__(self, arrays):
        self.tensors = arrays


class Calls(list):
    """How many files each call of the decoder got."""


def install(monkeypatch):
    """Put the modules in place. Returns the calls of the decoder, as they come."""
    calls = Calls()

    def image(files, device, output_type, adjust_orientation, jpeg_fancy_upsampling):
        assert (device, output_type, adjust_orientation, jpeg_fancy_upsampling) == ("cpu", "RGB", False, True)
        calls.append(len(files))
        arrays = []
        for number, file in enumerate(files):
            try:
                with Image.open(io.BytesIO(bytes(file)), formats=["JPEG"]) as opened:
                    opened.load()
                    arrays.append(np.array(opened.convert("RGB")))
            except Exception:
                raise RuntimeError(f"Failed to decode sample #{number} :\nin two lines") from None
        return Images(arrays)

    class EvalContext(contextlib.nullcontext):
        def __init__(self, *, num_threads, device_id, cuda_stream):
            assert num_threads >= 1 and device_id is None and cuda_stream is None
            super().__init__()

    dynamic = types.ModuleType("nvidia.dali.experimental.dynamic")
    dynamic.EvalContext, dynamic.as_batch = EvalContext, list
    dynamic.EvalMode = types.SimpleNamespace(sync_full=contextlib.nullcontext())
    dynamic.decoders = types.SimpleNamespace(image=image)
    dali, experimental = types.ModuleType("nvidia.dali"), types.ModuleType("nvidia.dali.experimental")
    dali.types, dali.experimental, experimental.dynamic = types.SimpleNamespace(RGB="RGB"), experimental, dynamic
    nvidia = types.ModuleType("nvidia")
    nvidia.dali = dali
    for module in (nvidia, dali, experimental, dynamic):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "nvidia.dali.types", dali.types)
    return calls
