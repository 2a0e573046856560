"""Peak throughput of GPUs."""

import re

# Dense bf16 with fp32 accumulation, in TFLOP/s, by words of the device name; the first match counts. From NVIDIA's data
# sheets and white papers (Ampere, Ada, Hopper, Blackwell), halved if they assume 2:4 sparsity.
PEAK_TFLOPS = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("GH200", 989.4),
    ("H200 NVL", 835.5),
    ("H200", 989.4),
    ("H100 NVL", 835.5),
    ("H100 PCIe", 756.4),
    ("H100", 989.4),
    ("H800 PCIe", 756.4),
    ("H800", 989.4),
    ("H20", 148.0),
    ("A100", 311.8),
    ("A800", 311.8),
    ("A40", 149.7),
    ("RTX A6000", 154.8),
    ("L40S", 362.05),
    ("L40", 181.05),
    ("L4", 121.0),
    ("RTX 6000 Ada", 364.2),
    ("RTX 5090", 209.5),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
)


OTHER_CARD = re.compile(r"\b(Laptop|Ti|D|SUPER|MIG)\b")  # variants and parts of a card, with a different peak


def known_peak(name: str) -> float | None:
    """Look up the dense bf16 peak of a device by name, in FLOP/s; None if unknown."""
    if OTHER_CARD.search(name):
        return None
    return next((peak * 1e12 for words, peak in PEAK_TFLOPS if re.search(rf"\b{words}\b", name)), None)
