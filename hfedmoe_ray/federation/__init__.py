"""The federated round loop, independent of where clients run. Imports neither ray nor deepspeed."""
