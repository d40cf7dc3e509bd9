"""What protects clients from the server, the model from clients, and the server from what it is sent."""
