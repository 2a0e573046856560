"""Step 2: ask a judge about every image that has no record of this image, this item and this judge yet."""

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from reca import inference
from reca.data.errors import BadSample, DataError
from reca.data.pixels import read_image
from reca.errors import first_line
from reca.eval import records, scoring
from reca.eval.errors import EvaluationError
from reca.eval.judges.base import Judge, JudgeError
from reca.eval.records import Record
from reca.eval.suites import Item, Key, Suite
from reca.eval.suites.base import agree, image_hash
from reca.full_memory import is_memory_full

log = logging.getLogger("reca")
MOST_FAILURES = 5  # in a row, after which the judge is taken to be broken
TRIES = 2  # of an answer without a mark
SHOWN = 3  # images that a message names


def judge_images(
    judge: Judge, suite: Suite, items: Sequence[Item], found: Mapping[Key, Path], path: Path, partial: bool = False
) -> int:
    """Append a record for every image that has none. path: of records.jsonl.

    Returns the number of images that it was asked about. One that the judge fails on gets a record with the error, and
    is asked about again next time. Raises EvaluationError when the judge fails on several images in a row, and in the
    end for images that cannot be read, unless a part is enough.
    """
    by_id = {item.id: item for item in items}
    hashes = {key: image_hash(image) for key, image in found.items()}
    mine = judge.describe()
    known = valid(records.read(path), items, hashes, mine)
    done = {r.key for r in known if r.error is None and judge.repeats(r.key, r.answer)}
    todo = [key for key in found if key not in done]
    if not todo:
        return 0
    failures, last = 0, ""
    unreadable: list[str] = []

    def ask(key: Key) -> Record | None:
        item = by_id[key[0]]
        unsaid = Record(*key, hashes[key], mine, digest=item.judged)
        try:
            read_image(found[key])
        except DataError as error:
            unreadable.append(str(error))
            return None
        try:
            return unsaid._replace(answer=_answer(judge, suite, item, key, found[key]))
        except (JudgeError, DataError, BadSample) as error:  # the latter two: a file that is no image
            return unsaid._replace(error=str(error))
        except (EvaluationError, OSError):  # other images would fail alike
            raise
        except Exception as error:  # whatever a judge's library raises
            reason = first_line(error)
            if not is_memory_full(error):
                log.debug("%s failed on %s", judge.name, found[key], exc_info=True)
                return unsaid._replace(error=f"{type(error).__name__}: {reason}")
            raise inference.MemoryFull(
                f"memory is full while {judge.name} looks at {found[key]} ({reason}). All records are kept: give it a "
                "device to itself (--steps judge,score,report goes on in a process of its own)"
            ) from error

    with (
        records.Appender(path) as file,
        tqdm(total=len(todo), desc=f"{suite.name}: judge", unit="", disable=None) as bar,
    ):
        for record in _in_threads(ask, todo, judge.workers):
            bar.update()
            if record is None:
                continue
            file.append(record.line())
            failures, last = (0, "") if record.error is None else (failures + 1, record.error)
            if failures >= max(MOST_FAILURES, 2 * judge.workers):
                raise EvaluationError(
                    f"the judge failed on {failures} images in a row; of the last it said: {last}. All records are "
                    "kept: mend the cause and give the same command again, which goes on from there"
                )
    if cost := judge.cost():
        log.info("%s", cost)
    if unreadable:
        message = f"{len(unreadable)} of {len(found)} images cannot be read: {'; '.join(unreadable[:SHOWN])}"
        if not partial:
            raise EvaluationError(
                f"{message}. Replace them (what was generated here is drawn again once it is deleted), or give "
                "--partial to score the others"
            )
        log.warning("%s; they count as missing", message)
    return len(todo)


def _answer(judge: Judge, suite: Suite, item: Item, key: Key, image: Path) -> object:
    """Ask until the answer holds what the suite's rule reads."""
    reason = ""
    for _ in range(TRIES):
        answer = judge.judge(suite, item, key[1], image)
        failed = scoring.score(suite, {key: answer}, [item]).failed if suite.judge_kind != "rule" else []
        if not failed:
            return answer
        reason = failed[0][1]
    raise JudgeError(reason)


def _in_threads(ask: Callable[[Key], Record | None], todo: Sequence[Key], workers: int) -> Iterator[Record | None]:
    """Yield records as they come, from this many threads. An interruption starts no new ones, and waits for none."""
    if workers <= 1:
        yield from map(ask, todo)
        return
    rest, stop = iter(todo), threading.Event()
    ended = queue.SimpleQueue[Record | BaseException | None]()

    def work() -> None:
        for key in rest:
            if stop.is_set():
                return
            try:
                ended.put(ask(key))
            except BaseException as error:
                ended.put(error)

    for _ in range(min(workers, len(todo))):
        threading.Thread(target=work, daemon=True).start()  # the process ends without an answer that is late
    try:
        for _ in todo:
            found = ended.get()
            if isinstance(found, BaseException):
                others = [ended.get() for _ in range(ended.qsize())]
                yield from (one for one in others if isinstance(one, Record))  # what went well is kept
                raise found
            yield found
    finally:
        stop.set()


def valid(
    found: Sequence[Record], items: Sequence[Item], hashes: Mapping[Key, str], judge: Mapping[str, object]
) -> list[Record]:
    """Keep the newest record of every image that is of this image, of its item as it is now, and of this judge."""
    digests = {item.id: item.judged for item in items}
    newest = {
        record.key: record
        for record in found
        if (record.picture is None or hashes.get(record.key) == record.picture)
        and record.item in digests
        and agree(record.digest, digests[record.item])
        and dict(record.judge) == dict(judge)
    }
    return list(newest.values())
