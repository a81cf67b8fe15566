"""fastnn inside two trainers: swapped while training, stock again after it.

    trainer = transformers.Trainer(model, ..., callbacks=[trainer_callback()])
    trainer = lightning.pytorch.Trainer(..., callbacks=[lightning_callback()])

The parameters stay the same objects, so that optimizers, checkpoints and schedules see no change.
"""

from __future__ import annotations

from fastnn import swap_, unswap_


def trainer_callback(**options):
    """For transformers' Trainer; the options are those of `swap_`.

    With `lm_loss=True` the outputs of a language model with labels have no logits: let the trainer
    evaluate with `prediction_loss_only=True`.
    """
    from transformers import TrainerCallback

    class Swapped(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **_):
            self.report = swap_(model, **options)

        def on_train_end(self, args, state, control, model, **_):
            unswap_(model)

    return Swapped()


def lightning_callback(**options):
    """For Lightning's Trainer; the options are those of `swap_`."""
    from lightning.pytorch import Callback

    class Swapped(Callback):
        def on_fit_start(self, trainer, pl_module):
            self.report = swap_(pl_module, **options)

        def on_fit_end(self, trainer, pl_module):
            unswap_(pl_module)

    return Swapped()
