"""A dense model made a Mixture of Experts, keeping what it knows.

split: the neurons of each FFN are clustered by their input weights into E experts of equal size. An expert is then a
summand of the FFN, and the router must find the K summands that matter for a token. It starts at the cluster centroids,
scaled down until it is nearly uniform, so that at K = E the model is the dense one; layer by layer it is then distilled
from the dense FFN on calibration texts.

copy: every expert is the whole FFN plus noise; the router starts small and random. Without noise the model is the
dense one for every K, because the weights of the top-k sum to 1.

adapters: the FFN stays as it is, and E small two-layer networks are added to it, of which a token uses K (FFT-MoE,
arXiv 2508.18663). Their second layers start at zero (ours): the model is the dense one, bit for bit, until they train.

    target.py      what each dense family becomes: the config.json, torch-free
    dense.py       where a dense family keeps its neurons, and how they are written as experts
    clusters.py    neurons to experts of equal size
    calibrate.py   distillation of a router
    assemble.py    a dense model to a MoE, layer by layer

A further dense family is a line in `target.DENSE_FAMILIES` and a class in `dense.py`; if it becomes a MoE family that
none became before, also a function in `target.py`.

All of it but the form of the adapters is ours. Legend: N tokens, H hidden, D neurons of the dense FFN, F neurons of an
expert, E experts, K top-k.
"""
