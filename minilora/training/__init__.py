"""Training: one plain loop and what it stands on. Nothing here knows of images or text: a
task brings both.

A run must be able to stop anywhere and end with the same bits as if it had not (on a GPU with
--deterministic), so everything that changes while training lives in one TrainState, and every
random number comes from (seed, epoch, step, rank) and not from a running generator. Read on:

trainer      the loop: Trainer.fit, train_one_epoch, train_step              one screen each
optim        parameter groups, schedules, the gradient's norm
state        what a checkpoint holds, as named tensors and JSON values
device       the device, and autocast to a precision
checkpoint   step-N/ written whole or not at all; which one to resume from
distributed  several processes: a step's batch is cut into shares that weigh every item equally
faults       NaN, out of memory, a lost process: each as one line with what to try
progress     the lines on the screen, train.log, metrics.jsonl
"""
