"""python -m benchmarks.dispatch: write the dispatch tables from the measurements in benchmarks/results.

reca_kernels/dispatch_table.json says which backend runs an op at which sizes. The backends that were timed for an op,
device and dtype are compared at every size by the time of a complete call. The first of the default order is used
unless another is clearly faster: p80 of the other below p20 of the first. The reference replaces the kernels for all
sizes or for none, so that the formula never depends on the batch size. It does so if it is clearly faster than every
kernel at the largest size at which it was timed.

reca_kernels/attention/order.json orders the impls of attention per device by the geometric mean of their times over the
models' layouts.
"""

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path

from benchmarks.rows import BY_SIZE, OURS, RESULTS, Row, all_results, complete
from reca_kernels import dispatch
from reca_kernels.attention.order import TABLE as ORDER_TABLE

Timed = dict[int, dict[str, Row]]  # size -> backend -> row


def table(folder: Path = RESULTS) -> dict:
    """Return the content of dispatch_table.json: the rules of each (op, device, dtype) and their measurements."""
    entries = []
    for device in ("cpu", "cuda"):
        newest: dict[tuple[str, str], Timed] = {}
        for rows in all_results(device, folder):
            newest.update(_timed(rows))
        for (op, dtype), sizes in sorted(newest.items(), key=lambda item: (dispatch.OPS.index(item[0][0]), item[0][1])):
            key = {"op": op, "device": device, "dtype": dtype}
            entries.append({**key, "rules": rules(sizes, device), **_evidence(sizes)})
    return {"made_by": "python -m benchmarks.dispatch", "entries": entries}


def _timed(rows: list[Row]) -> dict[tuple[str, str], Timed]:
    """Return the complete calls of our backends. CUDA graph timings, without launch overhead, are preferred if every
    backend has one.
    """
    clocks: dict[tuple, dict[str, dict[str, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in complete(rows):
        backend = row.provider.removeprefix(f"{OURS}: ")
        if backend in dispatch.BACKENDS and row.op in dispatch.OPS:
            clocks[row.op, row.dtype, row.numel][row.timing][backend] = row
    found: dict[tuple[str, str], Timed] = defaultdict(dict)
    for (op, dtype, numel), by_clock in clocks.items():
        graphs = by_clock.pop("graph", {})
        others = next(iter(by_clock.values()), {})
        found[op, dtype][numel] = graphs if graphs.keys() >= others.keys() else others
    return found


def rules(sizes: Timed, device: str) -> list[dict]:
    """Return [{"backend", "min_numel", "max_numel"}]. A limit is the geometric mean of sizes with different winners."""
    if _definition_wins(sizes):
        return [{"backend": "reference", "min_numel": 0, "max_numel": None}]
    winners = []
    for numel, backends in sorted(sizes.items()):
        kernels = sorted((b for b in backends if b != "reference"), key=dispatch.ORDER[device].index)
        if not kernels:
            continue
        best = kernels[0]
        for other in kernels[1:]:
            if backends[other].ms_p80 < backends[best].ms_p20:
                best = other
        winners.append((numel, best))
    made: list[dict] = []
    for i, (numel, backend) in enumerate(winners):
        if made and made[-1]["backend"] == backend:
            continue
        start = math.isqrt(winners[i - 1][0] * numel) if made else 0
        if made:
            made[-1]["max_numel"] = start
        made.append({"backend": backend, "min_numel": start, "max_numel": None})
    return made


def _definition_wins(sizes: Timed) -> bool:
    both = [n for n, backends in sizes.items() if "reference" in backends and len(backends) > 1]
    if not both:
        return False
    backends = dict(sizes[max(both)])
    definition = backends.pop("reference")
    return all(definition.ms_p80 < row.ms_p20 for row in backends.values())


def _evidence(sizes: Timed) -> dict:
    row = next(iter(sizes[max(sizes)].values()))
    times = {n: {b: r.ms_p50 for b, r in sorted(backends.items())} for n, backends in sorted(sizes.items())}
    return {"measured_on": row.device, **_facts(row), "ms": times}


def _facts(row: Row) -> dict:
    return {name: getattr(row, name) for name in ("command", "date", "driver", "torch", "triton", "threads", "commit")}


def attention_order(folder: Path = RESULTS) -> dict:
    """Return the content of attention/order.json: the impls of each GPU, fastest first, and their measurements."""
    devices = {}
    for rows in all_results("cuda", folder):  # the last of a device is the newest
        rows = [r for r in complete(rows) if r.op == "attention" and not r.shape.startswith(BY_SIZE)]
        times: dict[str, dict[str, float]] = defaultdict(dict)
        for row in rows:
            if row.provider.startswith(f"{OURS}: ") and row.timing != "graph":
                times[f"{row.shape}, {row.dtype}"][row.provider.removeprefix(f"{OURS}: ")] = row.ms_p50
        if times:
            everywhere = set.intersection(*(set(by) for by in times.values()))
            order = sorted(everywhere, key=lambda impl: sum(math.log(by[impl]) for by in times.values()))
            devices[rows[0].device] = {"device": rows[0].device, "order": order, **_facts(rows[0]), "ms": dict(times)}
    return {"made_by": "python -m benchmarks.dispatch", "devices": list(devices.values())}


def text(folder: Path = RESULTS) -> str:
    return json.dumps(table(folder), indent=1) + "\n"


def order_text(folder: Path = RESULTS) -> str:
    return json.dumps(attention_order(folder), indent=1) + "\n"


if __name__ == "__main__":
    argparse.ArgumentParser(
        prog="python -m benchmarks.dispatch", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    ).parse_args()
    dispatch.TABLE.write_text(text())
    ORDER_TABLE.write_text(order_text())
    for entry in attention_order()["devices"]:
        print(f"attention on {entry['device']}: {', '.join(entry['order'])}")
    for entry in table()["entries"]:
        chosen = ", ".join(f"{rule['backend']} from {rule['min_numel']} elements on" for rule in entry["rules"])
        print(f"{entry['op']} on {entry['device']}, {entry['dtype']}: {chosen}")
    print(f"wrote {dispatch.TABLE} and {ORDER_TABLE}")
