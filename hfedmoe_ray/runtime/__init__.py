"""Where clients run: actors on a Ray cluster, or this process. The only room of the package that knows Ray."""
