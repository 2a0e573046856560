"""Step 2: ask the judge about each image without a record for the same image, item and judge."""

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
from reca.hardware.full_memory import is_memory_full
from reca.options.names import option

log = logging.getLogger("reca")
MOST_FAILURES = 5  # consecutive failures after which judging stops
TRIES = 2  # attempts per image to get an answer that the suite's rule can read
SHOWN = 3  # maximum number of images in a message


def judge_images(
    judge: Judge, suite: Suite, items: Sequence[Item], found: Mapping[Key, Path], path: Path, partial: bool = False
) -> int:
    """Append a record for each image without a valid one. path: records.jsonl.

    Returns the number of images judged. An image on which the judge fails gets a record with the error, and is judged
    again by the next call. Raises EvaluationError if the judge fails on several images in a row and, after all others
    are judged, if images cannot be read, unless `partial`.
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
        record = Record(*key, hashes[key], mine, digest=item.digest)
        try:
            read_image(found[key])
        except DataError as error:
            unreadable.append(str(error))
            return None
        try:
            return record._replace(answer=_answer(judge, suite, item, key, found[key]))
        except (JudgeError, DataError, BadSample) as error:  # the latter two: a file that is not an image
            return record._replace(error=str(error))
        except (EvaluationError, OSError):  # other images would fail in the same way
            raise
        except Exception as error:  # a judge's library can raise anything
            reason = first_line(error)
            if not is_memory_full(error):
                log.debug("%s failed on %s", judge.name, found[key], exc_info=True)
                return record._replace(error=f"{type(error).__name__}: {reason}")
            raise inference.MemoryFull(
                f"out of memory while {judge.name} judged {found[key]} ({reason}). All records are kept: run the judge "
                "in a separate process, without the model in memory, with "
                f"{option('steps', ['judge', 'score', 'report'])}"
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
                    f"the judge failed on {failures} images in a row; the last error: {last}. All records are kept: "
                    "fix the cause, then run the same command again to resume"
                )
    if cost := judge.cost():
        log.info("%s", cost)
    if unreadable:
        message = f"{len(unreadable)} of {len(found)} images cannot be read: {'; '.join(unreadable[:SHOWN])}"
        if not partial:
            raise EvaluationError(
                f"{message}. Replace them (generated images can be deleted; they are then generated again), or set "
                f"{option('partial', True)} to score the others"
            )
        log.warning("%s; they count as missing", message)
    return len(todo)


def _answer(judge: Judge, suite: Suite, item: Item, key: Key, image: Path) -> object:
    """Return an answer that the suite's rule can read. Raises JudgeError after TRIES attempts."""
    reason = ""
    for _ in range(TRIES):
        answer = judge.judge(suite, item, key[1], image)
        failed = scoring.score(suite, {key: answer}, [item]).failed
        if not failed:
            return answer
        reason = failed[0][1]
    raise JudgeError(reason)


def _in_threads(ask: Callable[[Key], Record | None], todo: Sequence[Key], workers: int) -> Iterator[Record | None]:
    """Yield records in order of completion, from `workers` threads. On an interruption no pending call is awaited."""
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
        threading.Thread(target=work, daemon=True).start()  # daemon: the process can exit while calls are pending
    try:
        for _ in todo:
            found = ended.get()
            if isinstance(found, BaseException):
                others = [ended.get() for _ in range(ended.qsize())]
                yield from (one for one in others if isinstance(one, Record))  # keep the successful ones
                raise found
            yield found
    finally:
        stop.set()


def valid(
    found: Sequence[Record], items: Sequence[Item], hashes: Mapping[Key, str], judge: Mapping[str, object]
) -> list[Record]:
    """Return the newest record of each image that matches the image file, the current item and this judge."""
    digests = {item.id: item.digest for item in items}
    newest = {
        record.key: record
        for record in found
        if (record.picture is None or hashes.get(record.key) == record.picture)
        and record.item in digests
        and agree(record.digest, digests[record.item])
        and dict(record.judge) == dict(judge)
    }
    return list(newest.values())
