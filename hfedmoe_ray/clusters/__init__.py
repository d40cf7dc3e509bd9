"""Files that start a Ray cluster for an experiment: launcher YAML, Kubernetes manifests, a Slurm script, images.

`design` turns the experiment's tiers into groups of nodes; every other module writes one kind of file from that design
through strict models, so that a key that does not exist can neither be written nor stay in a committed file. Nothing
here imports ray, and nothing is started.
"""
