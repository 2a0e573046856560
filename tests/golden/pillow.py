"""The Pillow that golden pixels were recorded with.

Its resizing rounds otherwise in versions before 13: with 12.3 some pixels differ from the recorded ones by up to three
levels of 255. What is computed from them then differs, too.
"""

import PIL
import pytest

RECORDED = 13
SAME = int(PIL.__version__.split(".")[0]) >= RECORDED
LEVELS = 0 if SAME else 3  # by which a resized pixel may differ from a recorded one

needs_recorded_pixels = pytest.mark.skipif(
    not SAME, reason=f"the golden numbers are of pixels that Pillow {RECORDED} resized; this is {PIL.__version__}"
)
