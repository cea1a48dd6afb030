"""What a person types, a module a subject: a command reads its options and calls one function of a wiring module."""
