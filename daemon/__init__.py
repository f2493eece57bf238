"""Effects: the trio daemon, its engine process, its store and its control socket."""
