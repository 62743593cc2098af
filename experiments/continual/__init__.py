"""Many tasks one after another: what does a network forget, with which penalty?

    python -m experiments.continual --out experiment-results/continual
    python -m experiments.continual --problem permuted-mnist --data-dir DATA --out experiment-results/permuted_mnist
    python -m experiments.continual --problem split-mnist --heads shared --data-dir DATA --out experiment-results/split_mnist

Permuted problems: each task has the images' pixels in an order of its own, drawn by the seed, and ten classes. Split
problems: task `t` tells two classes apart, `2t` and `2t + 1`. `--heads own` gives each task a head, and the test says which
one to use (multi-head, task-incremental); other tasks' heads are frozen meanwhile and keep their curvature. `--heads shared`
has one head for all (single-head); in split problems it has two outputs, even or odd class, and is not told the task
(domain-incremental). The body is 100-100 ReLU units for digits, three small convolutions for CIFAR-10.

Adam, or with `--optimizer natural-gradient` natural gradients that know the penalty's curvature, lowers the mean
cross-entropy of the batch plus the penalty by the number of the task's examples, started afresh for each task with a rate
that decays linearly to zero. All runs of a seed start from the same weights and see the same batches.
Joint training, the ceiling, goes on with the batches of all tasks so far mixed, for as many epochs; neither it nor "none"
has a penalty.

Every method is run with each strength of the same grid, and the best is the one with the largest average accuracy after the
last task, on test images, a mean over the seeds: a comparison of what the methods can do, not of what one gets without
looking at test images. With "by evidence", the strength is set after each epoch by the evidence of the new task
(`ContinualLaplace.tune_strength`), in one run that looks at no test image.

A program that was killed goes on where it was when it is started again: finished runs are read back, and an unfinished one
goes on after its last task, with the same numbers as without the break. So a grid may be extended with other methods,
strengths, and seeds; other options that change the numbers are refused in the same folder.
"""
