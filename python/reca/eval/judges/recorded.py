"""A judge that replays recorded answers: records of an evaluation, or a result file of the benchmark's own scripts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reca.eval import records
from reca.eval.judges.base import Judge, JudgeError
from reca.eval.suites import Item, Key, Suite
from reca.eval.suites.base import image_hash


class RecordedJudge(Judge):
    """Replays the answers of a file. Its description is that of the judge whose answers they are."""

    def __init__(self, path: Path, suite: Suite, items: Sequence[Item]):
        self.path, self.records = path, records.import_answers(path, suite, items)
        self.origin = next(iter(self.records.values())).judge

    @classmethod
    def check(cls, argument: str, **options: Any) -> None:
        records.check_there(Path(argument))

    def describe(self) -> dict[str, Any]:
        return dict(self.origin)

    def repeats(self, key: Key, answer: Any) -> bool:
        return key in self.records and self.records[key].answer == answer

    def judge(self, suite: Suite, item: Item, k: int, image: Path) -> Any:
        record = self.records.get((item.id, k))
        if record is None:
            raise JudgeError(f"{self.path} has no answer about image {k} of item {item.id}")
        if record.picture is not None and record.picture != image_hash(image):
            raise JudgeError(f"{self.path} was recorded for a different image {k} of item {item.id} than {image}")
        return record.answer
