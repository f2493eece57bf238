"""The engine: a child process that hosts one libtorrent session and nothing else."""
