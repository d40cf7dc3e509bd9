"""What protects clients and the model from each other, and from who looks on. Neither ray nor deepspeed."""
