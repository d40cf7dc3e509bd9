"""Updates as a hostile client might send them, and a second opinion on which of them are well-formed."""
