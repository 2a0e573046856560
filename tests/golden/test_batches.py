"""Golden tests take the number of samples of a case from its own tensors: folders whose cases differ in it pass too."""

import copy

import pytest
import torch.nn.functional as F

from tests.golden import test_show_o as show_o
from tests.golden.conftest import Golden

matches = show_o.matches
loaded, model = show_o.loaded, show_o.model  # fixtures


class OneSample:
    """A golden folder whose cases of one task have their first sample alone."""

    def __init__(self, golden: Golden, task: str):
        self.folder, self.config, self.weights = golden.folder, golden.config, golden.weights
        self.cases = copy.deepcopy(golden.cases)
        self.cases["grad_norms"] = {key: {} for key in self.cases["grad_norms"]}  # of other batches
        self.data = dict(golden.data)
        for name, tensor in golden.data.items():
            if name.startswith(task) and not name.endswith(".loss"):
                self.data[name] = tensor[:1]
        if task == "t2i":
            rest = golden.data["joint_vq.logits"][len(golden.data["t2i.labels"]) :]
            first = golden.data["joint_vq.logits"][:1]
            self.data["joint_vq.logits"] = first.new_empty(1 + len(rest), *first.shape[1:])
            self.data["joint_vq.logits"][:1], self.data["joint_vq.logits"][1:] = first, rest
            image = slice(self.config["max_text_len"] + 1, None)  # what counts
            loss = F.cross_entropy(first[0, image], self.data["t2i.labels"][0, image])
            self.data["joint_vq.loss_t2i"] = loss[None]
            self.cases["tensors"]["t2i.texts"]["value"] = golden.cases["tensors"]["t2i.texts"]["value"][:1]
        for case in (name for name in ("recon_clip", *show_o.RECON_VQ) if name.startswith(task)):
            logits, labels = self.data[f"{case}.img_logits"][0], self.data[f"{case}.mask_labels"][0]
            self.data[f"{case}.loss"] = F.cross_entropy(logits, labels)[None]


def test_a_text_to_image_case_of_one_sample(golden, model):
    one = OneSample(golden, "t2i")
    show_o.test_masking(one, model, "t2i")
    show_o.test_t2i_sequence(one, model)
    show_o.test_t2i_hidden_states(one, model)
    show_o.test_joint_logits(one, model)
    show_o.test_joint_loss_and_gradients(one, model)


@pytest.mark.parametrize("case", ["recon_clip", *show_o.RECON_VQ])
def test_reconstruction_cases_of_one_sample(golden, model, case):
    one = OneSample(golden, "recon")
    show_o.test_masking(one, model, case)
    if case == "recon_clip":
        show_o.test_reca_clip_sequence(one, model)
    else:
        show_o.test_reca_vq_sequence(one, model, case)
    show_o.test_reca_logits(one, model, case)
    for name in (name for name, (known, _) in show_o.RECA.items() if known == case):
        show_o.test_reca_loss_and_gradients(one, model, name)
