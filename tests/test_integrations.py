"""The Trainer that distils, on tiny models; and the loss that patches TRL's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import relative_error
from tiny_models import batch, tiny
from torch import nn
from torch.utils.data import Dataset

from pyfast.integrations import trl
from pyfast.nn import DistillationLoss, linear_schedule

ROOT = Path(__file__).resolve().parent.parent
GROUPED = {"num_key_value_heads": 2}


class Rows(Dataset):
    """The rows of :func:`tiny_models.batch`."""

    def __init__(self, rows: int = 8, **options: Any):
        tokens = batch(rows=rows, **options)
        self.rows = [{name: value[row] for name, value in tokens.items()} for row in range(rows)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]


def student(**options: Any) -> Any:
    return tiny("Llama", **{**GROUPED, **options})


def teacher(**options: Any) -> Any:
    return tiny("Llama", seed=1, **{"num_hidden_layers": 4, **GROUPED, **options})


@pytest.fixture
def train(tmp_path):
    """Makes a DistillationTrainer; options whose names TrainingArguments knows go there."""
    pytest.importorskip("accelerate")
    from transformers import TrainingArguments

    from pyfast.integrations.transformers import DistillationTrainer

    def make(model=None, taught_by=None, rows=8, trainer=DistillationTrainer, **options):
        known = {name for name in options if name in TrainingArguments.__dataclass_fields__}
        arguments = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 4,
            "max_steps": 1,
            "logging_steps": 1,
            "optim": "sgd",
            "learning_rate": 0.1,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "report_to": "none",
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            **{name: options.pop(name) for name in known},
        }
        return trainer(
            model=student() if model is None else model,
            args=TrainingArguments(**arguments),
            teacher=teacher() if taught_by is None else taught_by,
            train_dataset=Rows(rows),
            **options,
        )

    return make


def after(trainer) -> list[torch.Tensor]:
    trainer.train()
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def same(got: list[torch.Tensor], expected: list[torch.Tensor], start: nn.Module, tolerance: float = 1e-4) -> bool:
    """Whether both runs moved the parameters alike, by the size of the move."""
    moves = [
        torch.cat([(each - begin.detach()).flatten() for each, begin in zip(run, start.parameters(), strict=True)])
        for run in (got, expected)
    ]
    return moves[1].norm() > 0 and relative_error(*moves) < tolerance


def test_the_loss_falls_and_its_parts_are_logged(train):
    ours, theirs = student(), teacher()
    frozen = {name: value.clone() for name, value in theirs.state_dict().items()}
    trainer = train(
        ours,
        theirs,
        max_steps=25,
        optim="adamw_torch",
        learning_rate=1e-2,
        distillation={
            "hidden": 0.1,
            "attention": linear_schedule(0.0, 0.2, 20),
            "hidden_options": {"kind": "cosine"},
            "attention_options": {"layers": [(-1, -1)]},
        },
    )
    trainer.train()
    logs = [each for each in trainer.state.log_history if "loss" in each]
    assert logs[-1]["loss"] < 0.5 * logs[0]["loss"]
    for each in logs:
        attention = each["distill/attention_weight"] * each.get("distill/attention", 0.0)
        total = each["distill/logits"] + 0.1 * each["distill/hidden"] + attention
        assert each["loss"] == pytest.approx(total, rel=1e-3)
    assert "distill/attention" not in logs[0] and logs[-1]["distill/attention_weight"] == pytest.approx(0.2)
    assert not theirs.training and all(torch.equal(value, frozen[name]) for name, value in theirs.state_dict().items())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in theirs.parameters())
    assert trainer.distillation.shift is True


SIGNALS = {
    "logits": {},
    "every signal": {
        "hidden": 1.0,
        "attention": 1.0,
        "lens": 1.0,
        "hidden_options": {"layers": "last"},
        "lens_options": {"divergence": "forward_kl"},
    },
}


@pytest.mark.parametrize("signals", SIGNALS)
@pytest.mark.parametrize("size", [1, 2])
def test_accumulation_is_one_large_batch(train, signals, size):
    """Rows differ in their count of tokens, so that a mean of means would not be the mean."""
    options = {"rows": 4, "distillation": SIGNALS[signals]}
    whole = after(train(**options))
    accumulated = after(train(**options, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size))
    assert same(accumulated, whole, student())


def test_accumulation_with_a_model_that_takes_no_loss_arguments(train):
    def model(seed=0):
        made = tiny("Bert", "ForMaskedLM", seed=seed, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        made.accepts_loss_kwargs = False
        return made

    runs = [
        train(model(), model(1), rows=4, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size)
        for size in (4, 1)
    ]
    assert runs[0].distillation.shift is False
    assert same(after(runs[1]), after(runs[0]), model())


def test_the_step_is_that_of_the_loss_by_hand(train):
    ours, theirs, tokens = student(), teacher(), batch(rows=4)
    loss = DistillationLoss(temperature=2.0, shift=True)
    given = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    out = loss(ours(**given), theirs(**given), labels=tokens["labels"], attention_mask=tokens["attention_mask"])
    grads = torch.autograd.grad(out.loss, list(ours.parameters()))
    expected = [parameter.detach() - 0.1 * grad for parameter, grad in zip(ours.parameters(), grads, strict=True)]
    trainer = train(ours, theirs, rows=4, distillation=loss)
    assert same(after(trainer), expected, student())
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(out.loss), rel=1e-4)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_fused_linear_makes_no_logits_and_the_same_step(train, accumulation):
    options = {"rows": 4, "per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    plain = after(train(**options))
    model, shapes = student(), []
    model.lm_head.register_forward_hook(lambda _, inputs, logits: shapes.append(logits.shape))
    trainer = train(model, **options, fused_linear=True)
    assert same(after(trainer), plain, student())
    assert shapes and all(shape[1] == 0 for shape in shapes)


def test_evaluation_and_predictions(train):
    trainer = train(fused_linear=True, distillation={"hidden": 1.0, "hidden_options": {"layers": "last"}})
    metrics = trainer.evaluate(Rows(4))
    parts = [metrics["eval_distill/logits"], metrics["eval_distill/hidden"]]
    assert metrics["eval_loss"] == pytest.approx(sum(parts), rel=1e-4)
    assert trainer.state.log_history[-1]["eval_distill/hidden"] == parts[1]
    predictions = trainer.predict(Rows(4)).predictions
    assert predictions.shape == (4, 9, 61)
    assert trainer.evaluate(Rows(4))["eval_distill/hidden"] == pytest.approx(parts[1])  # not added to what was before


def test_checkpoints_hold_the_student_alone_and_reload(train, tmp_path):
    from transformers import AutoModelForCausalLM

    trainer = train(save_strategy="steps", save_steps=1)
    trainer.train()
    checkpoint = tmp_path / "out" / "checkpoint-1"
    assert not (checkpoint / "distillation_loss.pt").exists()
    reloaded = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    ids = batch()["input_ids"]
    assert torch.equal(reloaded(ids).logits, trainer.model.eval()(ids).logits)


def test_projections_are_trained_saved_and_resumed(train, tmp_path):
    def loss():
        torch.manual_seed(5)
        return DistillationLoss(hidden=1.0, hidden_options={"projection": nn.Linear(32, 48, bias=False)})

    wide = teacher(hidden_size=48)
    first = train(taught_by=wide, distillation=loss(), max_steps=2, save_strategy="steps", save_steps=1, seed=3)
    start = first.distillation.projection.weight.detach().clone()
    first.train()
    trained = first.distillation.projection.weight.detach()
    assert not torch.equal(trained, start)
    second = train(taught_by=wide, distillation=loss(), max_steps=2, seed=3)
    second.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert relative_error(second.distillation.projection.weight, trained) < 1e-6


def test_a_teacher_by_its_path_in_its_own_dtype(train, tmp_path):
    teacher().to(torch.bfloat16).save_pretrained(tmp_path / "teacher")
    trainer = train(taught_by=str(tmp_path / "teacher"))
    assert trainer.teacher.dtype == torch.bfloat16 and not trainer.teacher.training
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0


def test_the_mixin_works_over_another_trainer(train):
    from transformers import Trainer

    from pyfast.integrations.transformers import DistillationMixin

    class Counting(Trainer):
        steps = 0

        def training_step(self, *args, **kwargs):
            self.steps += 1
            return super().training_step(*args, **kwargs)

    class Distilling(DistillationMixin, Counting):
        pass

    trainer = train(trainer=Distilling, max_steps=3)
    trainer.train()
    assert trainer.steps == 3 and "distill/logits" in trainer.state.log_history[0]


def test_labels_that_are_shifted_already(train):
    trainer = train()
    tokens = batch(rows=4)
    plain = trainer.compute_loss(trainer.model, dict(tokens))
    moved = torch.nn.functional.pad(tokens["labels"][:, 1:], (0, 1), value=-100)
    assert torch.equal(trainer.compute_loss(trainer.model, {**tokens, "shift_labels": moved}), plain)


def test_bad_arguments_are_named(train):
    ours = student()
    with pytest.raises(TypeError, match="teacher: got int"):
        train(taught_by=3)
    with pytest.raises(ValueError, match="teacher: got the student itself"):
        train(ours, ours)
    with pytest.raises(ValueError, match="vocab_size"):
        train(taught_by=teacher(vocab_size=64))
    train(taught_by=teacher(vocab_size=64), distillation={"vocab_size": 61}).train()
    with pytest.raises(TypeError, match="distillation: got str"):
        train(distillation="forward_kl")
    with pytest.raises(TypeError, match="temprature"):
        train(distillation={"temprature": 2.0})
    with pytest.raises(ValueError, match="fused_linear"):
        train(tiny("Bert", "ForMaskedLM"), tiny("Bert", "ForMaskedLM", seed=1), fused_linear=True)


TWO_PROCESSES = """
import os
import sys
sys.path[:0] = [sys.argv[1]]
import torch
from test_integrations import Rows, student, teacher
from transformers import TrainingArguments
from pyfast.integrations.transformers import DistillationTrainer

trainer = DistillationTrainer(
    model=student(), teacher=teacher(), train_dataset=Rows(4), fused_linear=sys.argv[3] == "fused",
    args=TrainingArguments(output_dir=sys.argv[2], per_device_train_batch_size=2, max_steps=1, optim="sgd",
        learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0.0, report_to="none", save_strategy="no",
        use_cpu=True, ddp_backend="gloo", disable_tqdm=True, logging_steps=1),
)
trainer.train()
if trainer.is_world_process_zero():
    logs = {name: value for name, value in trainer.state.log_history[0].items()}
    torch.save(([each.detach() for each in trainer.model.parameters()], logs), sys.argv[2] + "/result.pt")
torch.distributed.barrier()  # a process that leaves while the other still writes, or without this, may be terminated
torch.distributed.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # past the end of the interpreter, where a thread of torch's that asks for the GIL aborts one run of fifty
"""


@pytest.mark.parametrize("path", ["logits", "fused"])
def test_two_processes_give_the_step_of_one(train, tmp_path, path):
    whole = train(rows=4)
    expected = after(whole)
    script, out = tmp_path / "two.py", tmp_path / "two"
    script.write_text(TWO_PROCESSES)
    out.mkdir()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, str(ROOT / "tests"), str(out), path], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-4000:]
    parameters, logs = torch.load(out / "result.pt")
    assert same(parameters, expected, student())
    log = whole.state.log_history[0]
    assert logs["distill/logits"] == pytest.approx(log["distill/logits"], rel=1e-4)


class Gkd:
    """A trainer with a loss of TRL's form."""

    @staticmethod
    def generalized_jsd_loss(student_logits, teacher_logits, labels=None, beta=0.5, temperature=1.0):
        return "former"

    def compute(self, logits):
        return self.generalized_jsd_loss(student_logits=logits, teacher_logits=logits, labels=None, beta=0)


def test_patching_the_loss_of_trl_and_back():
    logits = torch.randn(2, 3, 5)
    restore = trl.patch_gkd(Gkd)
    assert torch.is_tensor(Gkd().compute(logits)) and abs(Gkd().compute(logits)) < 1e-6
    restore()
    assert Gkd().compute(logits) == "former"

    class Inheriting(Gkd):
        pass

    restore = trl.patch_gkd(Inheriting)
    assert torch.is_tensor(Inheriting().compute(logits)) and Gkd().compute(logits) == "former"
    restore()
    assert Inheriting().compute(logits) == "former" and "generalized_jsd_loss" not in vars(Inheriting)
    with pytest.raises(TypeError, match="trainer"):
        trl.patch_gkd(int)


def test_the_mixin_for_trl():
    class Fused(trl.GKDMixin, Gkd):
        pass

    assert torch.is_tensor(Fused().compute(torch.randn(2, 3, 5)))


def test_patching_finds_the_trainer_of_trl(monkeypatch):
    import types

    for name in ("trl", "trl.experimental", "trl.experimental.gkd"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    with pytest.raises(ImportError, match="GKDTrainer"):
        trl.patch_gkd()
    sys.modules["trl"].GKDTrainer = type("GKDTrainer", (Gkd,), {})
    trl.patch_gkd()
    assert torch.is_tensor(sys.modules["trl"].GKDTrainer().compute(torch.randn(2, 3, 5)))
    sys.modules["trl.experimental.gkd"].GKDTrainer = newer = type("GKDTrainer", (Gkd,), {})
    trl.patch_gkd()
    assert "generalized_jsd_loss" in vars(newer)
