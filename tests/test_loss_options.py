"""The options of distillation_loss, which other losses take by name: one list, one set of defaults, one error."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError, fields

import pytest
import torch

import pyfast
from pyfast.nn import DistillationLoss, LogitDistillationLoss
from pyfast.ops._arguments import LossOptions
from pyfast.parallel import vocab_parallel_distillation_loss, vocab_parallel_linear_distillation_loss

S, T = torch.randn(3, 10), torch.randn(3, 10)
HIDDEN, HEAD = torch.randn(3, 8), torch.randn(10, 8)
LINEAR = (HIDDEN, HEAD, HIDDEN, HEAD)
LAYERS = ([HIDDEN, HIDDEN], [HIDDEN, HIDDEN], torch.nn.Identity(), HEAD, torch.nn.Identity(), HEAD)
RESPONSES = ((S, T, None), (S, T, None))
# What takes the options, some positional arguments, and the options that it does not take.
TAKERS = {
    "distillation_value_and_grad": (pyfast.distillation_value_and_grad, (S, T), ()),
    "linear_distillation_loss": (pyfast.linear_distillation_loss, LINEAR, ()),
    "logit_lens_loss": (pyfast.logit_lens_loss, LAYERS, ()),
    "vocab_parallel_distillation_loss": (vocab_parallel_distillation_loss, (S, T), ("backend",)),
    "vocab_parallel_linear_distillation_loss": (vocab_parallel_linear_distillation_loss, LINEAR, ("backend",)),
    "contrastive_distillation_loss": (pyfast.contrastive_distillation_loss, RESPONSES, ("labels", "ce_weight")),
    "LogitDistillationLoss": (LogitDistillationLoss, (), ("labels", "mask", "num_items")),
    "DistillationLoss": (DistillationLoss, (), ("labels", "reduction")),
}


def test_the_list_is_that_of_distillation_loss():
    signature = list(inspect.signature(pyfast.distillation_loss).parameters.values())[2:]
    assert {(each.name, each.default) for each in signature} == {
        (each.name, each.default) for each in fields(LossOptions)
    }


@pytest.mark.parametrize("name", TAKERS)
def test_an_unknown_option_is_named_with_those_that_are_accepted(name):
    function, arguments, refused = TAKERS[name]
    for option in ("temprature", "divergance", *refused):
        with pytest.raises(
            TypeError, match=rf"^{name}: got the unknown option '{option}', accepted: .*temperature"
        ) as e:
            function(*arguments, **{option: None})
        accepted = str(e.value).split("accepted: ")[1].split(", ")
        assert option not in accepted and set(accepted) <= {each.name for each in fields(LossOptions)}


def test_every_option_arrives():
    """Each option changes what the function that takes it by name gives, as it changes distillation_loss."""
    labels, mask = torch.tensor([1, -7, 3]), torch.tensor([True, True, False])
    given = {
        "alpha": 0.3,
        "temperature": 2.0,
        "teacher_temperature": 3.0,
        "scale_by_t2": False,
        "softcap": 4.0,
        "teacher_softcap": 5.0,
        "ce_weight": 0.5,
        "reduction": "mean",
        "labels": labels,
        "ignore_index": -7,
        "mask": mask,
        "num_items": 7.0,
        "vocab_size": 9,
        "backend": "reference",
    }
    expected = pyfast.distillation_loss(S, T, "skew_kl", **given)
    assert torch.equal(pyfast.distillation_value_and_grad(S, T, "skew_kl", **given)[0], expected)
    eye = torch.eye(10)
    torch.testing.assert_close(pyfast.linear_distillation_loss(S, eye, T, eye, "skew_kl", **given), expected)
    for option in given.keys() - {"reduction", "backend", "ignore_index", "labels"}:
        default = next(each.default for each in fields(LossOptions) if each.name == option)
        assert pyfast.distillation_loss(S, T, "skew_kl", **{**given, option: default}) != expected, option


def test_options_do_not_change():
    with pytest.raises(FrozenInstanceError):
        LossOptions().temperature = 2.0
