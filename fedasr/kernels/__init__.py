"""Computations whose derivative or loop is written by hand, apart from the models that use them.

Each module holds the fast implementation and, as `reference`, the same function written for
reading: without hand-written derivatives, in the dtype that it is given, at any price in time and
memory. A test beside it in `tests/kernels` compares values and gradients of the two.

    ctc           the CTC loss: one loop forwards and backwards in time, which is its derivative
                  (ctc_accelerated: as kernels for TPUs and GPUs, chosen by `devices`, and tried
                  by `trial` on those that are there)
    rnnt          the RNN-T loss over diagonals of the lattice (rnnt_accelerated: likewise)
    attention     attention by way of all scores, JAX's fused one, and one for long recordings
    dense         a product with a matrix that all frames share
    depthwise     a convolution over time of each feature by itself
    gru           the loop of a gated recurrent unit
    frontend      windows of frames, and a product with windows of normalised features
    checkpoint    gradient checkpointing that compilers keep

Which implementation runs follows from the platform that a program is compiled for
(`jax.lax.platform_dependent`; for kernels in Pallas, which no compiler divides among devices, the
devices of the `jax.shard_map` around), never from the machine that compiles it. A kernel is right
for every argument that can have a gradient: what leaves one out does so because that argument is
not being differentiated, which JAX tells it.
"""
