//! What will be done: every default, limit and name resolved, each with its origin.
