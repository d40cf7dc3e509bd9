"""Protecting clients from the server, and the model from clients. Neither ray nor deepspeed."""
