"""The worker's side: stages, the sessions that use them, and the threads that serve them."""
