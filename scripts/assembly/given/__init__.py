"""What a command was given: keys that nothing reads, values of another type, paths, and what a resumed run changes."""
