"""The command line: one file per group of verbs; talks to the daemon over its socket."""
