"""Fixtures of the tests of studies."""

import pytest

from reca.processes import side_by_side
from reca.processes.side_by_side import Failure

SCALE = ["--scale", "0.004"]
STUDY = """
question: Does it run?
paper: [{says: it does, source: Table 0}]
variants:
  RECA: {about: images alone}
  SFT: {about: captions, overrides: [objective.reca.weight=0, objective.t2i.weight=1],
        toy: ["data.captions={unlabeled}&caption_detail=full"]}
  SFT-RECA: {about: one after the other, after: SFT}
  never: {about: not with this model, toy: {bagel: [model.hv_source=vae]}}
claims:
  - {says: they draw alike, measure: {toy: seen, published: toy}, variant: RECA, than: SFT, expect: equal, margin: 100}
  - {says: it needs a thousand images, measure: {published: toy}, variant: RECA, than: before}
"""


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "does_it_run.yaml"
    path.write_text(STUDY)
    return str(path)


@pytest.fixture
def in_this_process(monkeypatch):
    """Make the jobs one after the other, here. Returns the names of those that were made."""
    made = []

    def run(jobs, slots, on_end, on_wait, on_start):
        for job in jobs:
            on_start(job)
            made.append(job.name)
            on_wait()
            try:
                on_end(job, job.work(*job.given))
            except Exception as error:
                on_end(job, Failure(error))

    monkeypatch.setattr(side_by_side, "run", run)
    return made
